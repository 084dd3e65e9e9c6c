"""Whether to speculate at all, per domain, and how to notice later that it would pay again.

A domain's worth is its speed over plain decoding (``speed_evidence.py``), which does not depend on the batch. While a
domain is off, runs of cycles of one request probe it, paid from a budget of device time: where drafts nearly pay,
probes lose little, and there are many of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specblock.daemon.probe_budget import ProbeBudget
from specblock.daemon.speed_evidence import SpeedEvidence
from specblock.drafter.forgetting import ForgettingRatio

# Of a Poisson count; about two of what drafts accepted one after the other vary by at three tokens a cycle. Being wrong
# costs far more than waiting: coming back is paid from the probes' budget.
_DOUBT_SD = 3.0
# Of what stretches of requests differ by, where some have been seen: to go off, and for probes to show that it pays.
_SLOW_SD = _FAST_SD = 1.0
_PROBES_REMEMBERED = 4
_MOST_STALL = 16.0  # plain cycles
_LEAST_LOSS = 0.1  # of a probe's seconds: what is thought to cost nothing may do so after all
_ABSORBED_HALF_LIFE_CYCLES, _ABSORBED_PRIOR_CYCLES = 500.0, 64.0
_OVERFLOW = ""  # stands for every domain beyond the limit: names come from clients


@dataclass(frozen=True, slots=True)
class Participant:
    """One request of a cycle."""

    request_id: str
    domain: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    """When speculation goes off and on.

    Attributes:
        off_below: speed over plain decoding below which a domain goes off.
        on_above: speed that probes must show, beyond doubt, before it goes on.
        min_cycles: cycles of one request that must have been seen before it may go off by its estimated speed.
        hopeless_cycles: cycles of the engine after which it may go off already, if not even chance explains the speed.
        hopeless_below: speed that chance must not explain as long as few requests were seen.
        min_stretches: requests, or stretches of long ones, that must have been seen before it may go off otherwise:
            one that suits the drafter badly says little about the next.
        window_cycles: cycles of one request that count as evidence, the newest.
        probe_cycles: length of a probe.
        probe_share: part of the device seconds that off domains are served in, which probes may lose against plain
            decoding.
        prior_speed: speed over plain decoding assumed without evidence.
        prior_cycles: how many cycles of plain decoding that assumption is worth.
        max_domains: domains told apart.
        forget_cycles: cycles after which a domain that was not seen gives its place to a new one.
    """

    off_below: float = 1.0
    on_above: float = 1.03
    min_cycles: int = 24
    hopeless_cycles: int = 4
    hopeless_below: float = 0.8
    min_stretches: int = 3
    window_cycles: int = 400
    probe_cycles: int = 16
    probe_share: float = 0.005
    prior_speed: float = 1.1
    prior_cycles: float = 8.0
    max_domains: int = 64
    forget_cycles: int = 100_000

    def __post_init__(self) -> None:
        if not 0 < self.off_below <= self.on_above:
            raise ValueError("speculation: off_below must be above 0 and not above on_above")
        if (
            not 0 <= self.probe_share < 1
            or min(self.probe_cycles, self.min_cycles, self.hopeless_cycles, self.min_stretches, self.max_domains) < 1
        ):
            raise ValueError("speculation: probe_share must be in [0, 1), counts at least 1")
        if self.window_cycles < self.min_cycles or self.prior_cycles < 0:
            raise ValueError("speculation: window_cycles must not be under min_cycles, prior_cycles not under 0")


@dataclass(slots=True)
class _DomainState:
    evidence: SpeedEvidence
    assumed: float  # speed, as far as there is no evidence
    budget: ProbeBudget
    on: bool = True
    engine_cycles: int = 0  # with drafts, since the last change
    last_probe: int = -1
    last_cycle: int = 0


@dataclass(slots=True)
class _Probe:
    request_id: str
    domain: str
    cycles: int = 0


class SpeculationGate:
    """Turns speculation on and off per domain, with hysteresis, and runs probes while it is off."""

    def __init__(self, settings: GateSettings | None = None) -> None:
        self.settings = settings or GateSettings()
        self.probes = 0
        self._total_s = self._probe_s = self._lost_s = 0.0
        self._cycles = 0
        self._domains: dict[str, _DomainState] = {}
        self._probe: _Probe | None = None
        # Plain cycles that absorbing prompts took, over cycles that drafted: what a probe does not see.
        self._absorbed = ForgettingRatio(_ABSORBED_HALF_LIFE_CYCLES)

    def decide(
        self, participants: Sequence[Participant], probing_s: Callable[[], tuple[float, float]]
    ) -> tuple[bool, ...]:
        """Which requests of the next cycle speculate.

        Args:
            participants: the requests that will decode.
            probing_s: answers the expected seconds of a cycle in which one request is probed, and of a plain one.
        """
        on = [self._state(p.domain).on for p in participants]
        if all(on) and self._probe is None:
            return tuple(on)
        off = [index for index, yes in enumerate(on) if not yes]
        # Beside requests that draft anyway the probed one joins in, or its domain could stay off for ever.
        chosen = self._probed([participants[i] for i in off], len(participants), probing_s)
        probed = None if chosen is None else off[chosen]
        return tuple(yes or index == probed for index, yes in enumerate(on))

    @property
    def probing(self) -> bool:
        """Whether a probe is under way, alone or beside requests that draft anyway."""
        return self._probe is not None

    @property
    def probe_share(self) -> float:
        """Seconds spent probing over all device seconds so far."""
        return self._probe_s / self._total_s if self._total_s else 0.0

    @property
    def lost_share(self) -> float:
        """Seconds that probes lost over all device seconds so far; below 0 if they won more."""
        return self._lost_s / self._total_s if self._total_s else 0.0

    def is_probe(self, participants: Sequence[Participant], speculate: Sequence[bool]) -> bool:
        """Whether the one request that speculates does so as a probe; one that joins others is not meant."""
        if self._probe is None:
            return False
        chosen = [p.request_id for p, yes in zip(participants, speculate, strict=True) if yes]
        return chosen == [self._probe.request_id]

    def record(
        self,
        participants: Sequence[Participant],
        speculate: Sequence[bool],
        committed: Sequence[int],
        seconds: float,
        usual_s: float,
        plain_s: float,
    ) -> None:
        """Learns from one cycle.

        Args:
            participants: its requests.
            speculate: which of them speculated.
            committed: tokens each kept.
            seconds: the cycle's device seconds.
            usual_s: seconds that speculation is judged by: what such cycles usually take, without what is paid only
                once; for a probe those of a cycle in which all requests speculate.
            plain_s: predicted seconds of a plain cycle of the same requests.
        """
        self.spent(participants, seconds)
        num_drafted, batch = sum(speculate), len(participants)
        if not num_drafted:
            return
        # Extra seconds hold up everyone in the batch, and those who speculate are charged for all of it.
        solo = self.is_probe(participants, speculate)
        charge = (usual_s - plain_s) / plain_s * (1 if solo else batch / num_drafted)
        plain_cycles = max(1.0 + charge, 0.05)
        judged = set()
        for participant, yes, tokens in zip(participants, speculate, committed, strict=True):
            state = self._state(participant.domain)
            if yes and (solo or not (state.on or self._probe is None)):
                took_s = min(seconds, _MOST_STALL * plain_s)  # one stall must not end probes for long
                lost_s = (took_s - plain_s) / num_drafted - (tokens - 1) * plain_s / batch
                self._probe_s += seconds / num_drafted
                self._lost_s += lost_s
                state.budget.lose(lost_s)
                self._record_probe(tokens, plain_cycles)
            elif yes:
                state.evidence.add(participant.request_id, tokens, plain_cycles)
                self._absorbed.add(0.0)
                judged.add(participant.domain)
        for domain in judged:
            self._state(domain).engine_cycles += 1
            self._maybe_off(self._state(domain))

    def spent(self, participants: Sequence[Participant], seconds: float) -> None:
        """Counts a cycle's device seconds, which pay for probes of the domains in it that are off."""
        self._cycles += 1
        self._total_s += seconds
        off = {id(state): state for state in (self._state(p.domain) for p in participants) if not state.on}
        for state in off.values():
            state.budget.earn(seconds / len(off))

    def absorbed(self, domain: str, plain_cycles: float) -> None:
        """Charges a domain with what its drafter took outside of cycles, such as absorbing a prompt.

        Args:
            domain: kind of text.
            plain_cycles: cycles of one request that plain decoding would have made in that time, of all in the batch.
        """
        self._state(domain).evidence.absorbed(plain_cycles)
        self._absorbed.add(plain_cycles, 0.0, observations=0)

    def drafter_changed(self) -> None:
        """Forgets what was learned about the drafter before and lets a probe of every domain start at once."""
        for state in self._domains.values():
            state.evidence = self._unknown() if state.on else self._of_probes()
            state.assumed = self.settings.prior_speed
            state.last_probe, state.engine_cycles = -1, 0
            if not state.on:
                state.budget.grant()
        self._probe = None

    def is_on(self, domain: str) -> bool:
        """Whether a domain speculates; one never seen does."""
        return self._state(domain).on

    def speeds(self) -> dict[str, float]:
        """Estimated speed over plain decoding per domain."""
        return {name: self._speed(state) for name, state in self._domains.items()}

    def speed_of_all(self, participants: Sequence[Participant]) -> float:
        """Tokens of all requests in the time in which plain decoding commits one of each, at the best they can do.

        What absorbing prompts takes is no part of it: no size of a tree changes that.
        """
        states = (self._state(p.domain) for p in participants)
        return sum(max(1.0, state.evidence.decoding(*self._prior(state))) for state in states)

    def _speed(self, state: _DomainState) -> float:
        return state.evidence.speed(*self._prior(state))

    def _prior(self, state: _DomainState) -> tuple[float, float]:
        return state.assumed, self.settings.prior_cycles

    def _state(self, domain: str) -> _DomainState:
        if domain not in self._domains and len(self._domains) >= self.settings.max_domains:
            oldest = min(self._domains, key=lambda name: self._domains[name].last_cycle)
            if self._cycles - self._domains[oldest].last_cycle > self.settings.forget_cycles:
                del self._domains[oldest]
            else:
                domain = _OVERFLOW
        if domain not in self._domains:
            budget = ProbeBudget(self.settings.probe_share)
            self._domains[domain] = _DomainState(self._unknown(), self.settings.prior_speed, budget)
        state = self._domains[domain]
        state.last_cycle = self._cycles
        return state

    def _unknown(self) -> SpeedEvidence:
        return SpeedEvidence(self.settings.window_cycles)

    def _of_probes(self) -> SpeedEvidence:
        return SpeedEvidence(_PROBES_REMEMBERED * self.settings.probe_cycles)

    def _maybe_off(self, state: _DomainState) -> None:
        rules, seen, speed = self.settings, state.evidence, self._speed(state)
        if speed >= rules.off_below:
            return
        enough = len(seen) >= rules.min_stretches
        least = rules.off_below if enough else min(rules.off_below, rules.hopeless_below)
        slow = enough and seen.count >= rules.min_cycles and speed + _SLOW_SD * seen.doubt() < rules.off_below
        # One stall holds up every request of a batch: what counts here is how often the engine was slow.
        long = state.engine_cycles >= rules.hopeless_cycles
        if slow or (long and seen.lucky(_DOUBT_SD, *self._prior(state)) < least):
            state.on, state.engine_cycles, state.assumed = False, 0, speed
            state.evidence = self._of_probes()

    def _probed(
        self, participants: Sequence[Participant], batch: int, probing_s: Callable[[], tuple[float, float]]
    ) -> int | None:
        """Index of the request to probe in the next cycle of a batch, if any; ``participants`` may be."""
        if self._probe is not None:
            same = [i for i, p in enumerate(participants) if p.request_id == self._probe.request_id]
            # A request that ended hands its probe on within the domain; otherwise the probe ends with it.
            heirs = same or [i for i, p in enumerate(participants) if p.domain == self._probe.domain]
            if heirs:
                self._probe.request_id = participants[heirs[0]].request_id
                return heirs[0]
            self._end_probe()
        if not participants:
            return None
        states = [self._state(p.domain) for p in participants]
        near = [i for i, state in enumerate(states) if state.budget.is_near()]
        if not near:
            return None
        index = min(near, key=lambda i: states[i].last_probe)
        state = states[index]
        cycle_s, plain_s = probing_s()
        # The others wait for the whole cycle and win nothing by it.
        speed = state.evidence.decoding(*self._prior(state))
        loses_s = cycle_s * (1 - speed / batch) - plain_s * (batch - 1) / batch
        if not state.budget.take(self.settings.probe_cycles * max(loses_s, _LEAST_LOSS * cycle_s)):
            return None
        state.last_probe = self.probes
        self._probe = _Probe(participants[index].request_id, participants[index].domain)
        self.probes += 1
        return index

    def _record_probe(self, tokens: int, plain_cycles: float) -> None:
        probe = self._probe
        assert probe is not None
        state = self._state(probe.domain)
        absorbing = self._absorbed.value(0.0, _ABSORBED_PRIOR_CYCLES)
        state.evidence.add(probe.request_id, tokens, plain_cycles, absorbing)
        self._absorbed.fade(0.5 ** (1 / _ABSORBED_HALF_LIFE_CYCLES))  # or one dear prompt would be charged for ever
        probe.cycles += 1
        if probe.cycles >= self.settings.probe_cycles:
            self._end_probe()

    def _end_probe(self) -> None:
        """Judges by this probe and those before it; one cut short counts as far as it went."""
        assert self._probe is not None
        state, self._probe = self._state(self._probe.domain), None
        seen = state.evidence
        enough = seen.count >= self.settings.probe_cycles
        if not state.on and enough and seen.speed() - _FAST_SD * seen.doubt() > self.settings.on_above:
            state.on, state.engine_cycles = True, 0
            seen.window_cycles = self.settings.window_cycles
