"""Whether to speculate at all, per domain, and how to notice later that it would pay again.

A domain's worth is a ratio of sums, tokens committed over tokens that plain decoding would have committed in the same
seconds, so that it does not depend on the batch. While a domain is off, runs of cycles of one request probe it, paid
from a budget of device time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specblock.drafter.forgetting import ForgettingRatio

# Of a Poisson count; about two of what drafts accepted one after the other vary by at three tokens a cycle. Being wrong
# costs far more than waiting: coming back is paid from the probes' budget.
_DOUBT_SD = 3.0
# Of the same, for a domain that has been seen for a while: being off by bad luck costs what it would have won, until a
# probe; being on without gain costs little.
_SLOW_SD = 1.0
_LONG = 4  # times the fewest cycles: a request that lasts so long says enough by itself
_ABSORBED_HALF_LIFE_CYCLES = 500.0
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
        on_above: speed a probe must show before it goes on.
        min_cycles: cycles of one request seen since it went on before it may go off by its estimated speed.
        hopeless_cycles: cycles of the engine after which it may go off already, if not even chance explains the speed.
        hopeless_below: speed that chance must not explain as long as few requests were seen.
        min_requests: requests seen since it went on before it may go off otherwise: one that suits the drafter badly
            says little about the next.
        half_life_cycles: cycles of one request after which evidence counts half.
        probe_cycles: length of a probe.
        probe_share: part of all device seconds that probes may take.
        prior_speed: speed over plain decoding assumed without evidence.
        prior_tokens: how many tokens that assumption is worth.
        max_domains: domains told apart.
        forget_cycles: cycles after which a domain that was not seen gives its place to a new one.
    """

    off_below: float = 1.0
    on_above: float = 1.03
    min_cycles: int = 24
    hopeless_cycles: int = 4
    hopeless_below: float = 0.8
    min_requests: int = 3
    half_life_cycles: float = 150.0
    probe_cycles: int = 16
    probe_share: float = 0.01
    prior_speed: float = 1.1
    prior_tokens: float = 8.0
    max_domains: int = 64
    forget_cycles: int = 100_000

    def __post_init__(self) -> None:
        if not 0 < self.off_below <= self.on_above:
            raise ValueError("speculation: off_below must be above 0 and not above on_above")
        if (
            not 0 <= self.probe_share < 1
            or min(self.probe_cycles, self.min_cycles, self.hopeless_cycles, self.max_domains) < 1
        ):
            raise ValueError("speculation: probe_share must be in [0, 1), counts at least 1")


class ProbeBudget:
    """Lets probes take at most a share of all device seconds, and not all of a long quiet time at once.

    Credit grows with every second of work and is capped at what two probes cost; a probe starts only when its expected
    cost is covered. A grant lets a probe start at once, on credit that later work pays back.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._credit_s = 0.0
        self._cap_s = 0.0
        self._grants = 0
        self.total_s = 0.0
        self.probe_s = 0.0

    def grant(self, probes: int) -> None:
        """Allows the next ``probes`` probes whatever the credit is."""
        self._grants = probes

    def take(self, expected_s: float) -> bool:
        """Whether a probe of this cost may start now."""
        self._cap_s = 2 * expected_s
        if self._credit_s >= expected_s:
            return True
        granted = self._grants > 0
        self._grants -= granted
        return granted

    def spend(self, seconds: float, *, probing: bool) -> None:
        """Counts the device seconds of one cycle."""
        self.total_s += seconds
        self._credit_s += self._share * seconds
        # The cap forgets unused time; what a probe took beyond its expectation stays owed.
        self._credit_s = min(self._credit_s, self._cap_s) if self._cap_s else self._credit_s
        if probing:
            self.share(seconds)

    def share(self, seconds: float) -> None:
        """Counts a probe's part of a cycle that ``spend`` has counted already."""
        self.probe_s += seconds
        self._credit_s -= seconds

    @property
    def probe_share(self) -> float:
        """Seconds spent probing over all device seconds so far."""
        return self.probe_s / self.total_s if self.total_s else 0.0


@dataclass(slots=True)
class _DomainState:
    speed: ForgettingRatio  # prompts that the drafter absorbs included
    decoding: ForgettingRatio
    on: bool = True
    cycles_since_change: int = 0
    engine_cycles: int = 0
    requests: set[str] = field(default_factory=set)  # the first few since the last change
    last_probe: int = -1
    last_cycle: int = 0

    def change(self, *, on: bool) -> None:
        """Goes on or off; what was seen before no longer counts for the next change."""
        self.on = on
        self.begin_anew()

    def begin_anew(self) -> None:
        """As if it had just gone on or off."""
        self.cycles_since_change, self.engine_cycles = 0, 0
        self.requests.clear()


@dataclass(slots=True)
class _Probe:
    request_id: str
    domain: str
    cycles: int = 0
    speed: ForgettingRatio = field(default_factory=lambda: ForgettingRatio(1e9))


class SpeculationGate:
    """Turns speculation on and off per domain, with hysteresis, and runs probes while it is off."""

    def __init__(self, settings: GateSettings | None = None) -> None:
        self.settings = settings or GateSettings()
        self.budget = ProbeBudget(self.settings.probe_share)
        self.probes = 0
        self._cycles = 0
        self._domains: dict[str, _DomainState] = {}
        self._probe: _Probe | None = None
        # Plain cycles that absorbing prompts took, over cycles that drafted: what a probe does not see.
        self._absorbed = ForgettingRatio(_ABSORBED_HALF_LIFE_CYCLES)

    def decide(self, participants: Sequence[Participant], probe_cycle_s: Callable[[], float]) -> tuple[bool, ...]:
        """Which requests of the next cycle speculate.

        Args:
            participants: the requests that will decode.
            probe_cycle_s: answers the expected seconds of a cycle in which one request is probed.
        """
        on = [self._state(p.domain).on for p in participants]
        if all(on) and self._probe is None:
            return tuple(on)
        off = [index for index, yes in enumerate(on) if not yes]
        # Beside requests that draft anyway the probed one joins in, or its domain could stay off for ever.
        chosen = self._probed([participants[i] for i in off], probe_cycle_s)
        probed = None if chosen is None else off[chosen]
        return tuple(yes or index == probed for index, yes in enumerate(on))

    def is_probe(self, participants: Sequence[Participant], speculate: Sequence[bool]) -> bool:
        """Whether the one request that speculates does so as a probe; one that joins others is not meant."""
        chosen = [p for p, yes in zip(participants, speculate, strict=True) if yes]
        return self._probe is not None and [p.request_id for p in chosen] == [self._probe.request_id]

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
            usual_s: seconds that speculation is judged by: the same, without what is paid only once; for a probe those
                of a cycle in which all requests speculate.
            plain_s: predicted seconds of a plain cycle of the same requests.
        """
        self._cycles += 1
        probing = self.is_probe(participants, speculate)
        self.budget.spend(seconds, probing=probing)
        num_drafted = sum(speculate)
        if not num_drafted:
            return
        if probing:
            chosen = list(speculate).index(True)
            self._record_probe(committed[chosen], usual_s / plain_s)
            return
        # Extra seconds hold up everyone in the batch, and those who speculate are charged for all of it.
        charge = (usual_s - plain_s) / plain_s * len(participants) / num_drafted
        for participant, yes, tokens in zip(participants, speculate, committed, strict=True):
            state = self._state(participant.domain)
            if yes and (state.on or self._probe is None):
                state.speed.add(tokens, max(1.0 + charge, 0.05))
                state.decoding.add(tokens, max(1.0 + charge, 0.05))
                state.cycles_since_change += 1
                if len(state.requests) < self.settings.min_requests:
                    state.requests.add(participant.request_id)
                self._absorbed.add(0.0)
            elif yes:
                self.budget.share(seconds / num_drafted)
                self._record_probe(tokens, max(1.0 + charge, 0.05))
        for domain in {p.domain for p, yes in zip(participants, speculate, strict=True) if yes}:
            self._state(domain).engine_cycles += 1
            self._maybe_off(self._state(domain))

    def absorbed(self, domain: str, plain_cycles: float) -> None:
        """Charges a domain with what its drafter took outside of cycles, such as absorbing a prompt.

        Args:
            domain: kind of text.
            plain_cycles: cycles of one request that plain decoding would have made in that time, of all in the batch.
        """
        self._state(domain).speed.add(0.0, plain_cycles, observations=0)
        self._absorbed.add(plain_cycles, 0.0, observations=0)

    def drafter_changed(self) -> None:
        """Forgets what was learned about the drafter before and lets one probe start at once."""
        for state in self._domains.values():
            state.speed, state.decoding = self._unknown(), self._unknown()
            state.last_probe = -1
            state.begin_anew()
        self._probe = None
        self.budget.grant(sum(not state.on for state in self._domains.values()))

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
        prior = (self.settings.prior_speed, self.settings.prior_tokens)
        return sum(max(1.0, self._state(p.domain).decoding.value(*prior)) for p in participants)

    def _speed(self, state: _DomainState, doubt: float = 0.0) -> float:
        """Estimated speed; with ``doubt`` its upper bound, so many standard deviations of the count of tokens away."""
        tokens = state.speed.numerator
        bound = ForgettingRatio(1.0, tokens + doubt * math.sqrt(tokens), state.speed.denominator)
        return bound.value(self.settings.prior_speed, self.settings.prior_tokens)

    def _state(self, domain: str) -> _DomainState:
        if domain not in self._domains and len(self._domains) >= self.settings.max_domains:
            oldest = min(self._domains, key=lambda name: self._domains[name].last_cycle)
            if self._cycles - self._domains[oldest].last_cycle > self.settings.forget_cycles:
                del self._domains[oldest]
            else:
                domain = _OVERFLOW
        if domain not in self._domains:
            self._domains[domain] = _DomainState(self._unknown(), self._unknown())
        state = self._domains[domain]
        state.last_cycle = self._cycles
        return state

    def _unknown(self) -> ForgettingRatio:
        return ForgettingRatio(self.settings.half_life_cycles)

    def _maybe_off(self, state: _DomainState) -> None:
        rules = self.settings
        enough = len(state.requests) >= rules.min_requests or state.cycles_since_change >= _LONG * rules.min_cycles
        least = rules.off_below if enough else min(rules.off_below, rules.hopeless_below)
        settled = enough and state.cycles_since_change >= rules.min_cycles
        slow = settled and self._speed(state, _SLOW_SD) < rules.off_below
        # One stall holds up every request of a batch: what counts here is how often the engine was slow.
        hopeless = state.engine_cycles >= rules.hopeless_cycles and self._speed(state, _DOUBT_SD) < least
        if slow or hopeless:
            state.change(on=False)

    def _probed(self, participants: Sequence[Participant], probe_cycle_s: Callable[[], float]) -> int | None:
        """Index of the request to probe in the next cycle, if any."""
        if self._probe is not None:
            same = [i for i, p in enumerate(participants) if p.request_id == self._probe.request_id]
            # A request that ended hands its probe on within the domain; otherwise the probe ends with it.
            heirs = same or [i for i, p in enumerate(participants) if p.domain == self._probe.domain]
            if heirs:
                self._probe.request_id = participants[heirs[0]].request_id
                return heirs[0]
            self._probe = None
        if not participants or not self.budget.take(self.settings.probe_cycles * probe_cycle_s()):
            return None
        index = min(range(len(participants)), key=lambda i: self._state(participants[i].domain).last_probe)
        self._state(participants[index].domain).last_probe = self.probes
        self._probe = _Probe(participants[index].request_id, participants[index].domain)
        self.probes += 1
        return index

    def _record_probe(self, tokens: int, plain_cycles: float) -> None:
        assert self._probe is not None
        self._probe.speed.add(tokens, plain_cycles + self._absorbed.value())
        self._probe.cycles += 1
        if self._probe.cycles >= self.settings.probe_cycles:
            self._judge(self._probe)
            self._probe = None

    def _judge(self, probe: _Probe) -> None:
        state = self._state(probe.domain)
        shown = (probe.speed.numerator, probe.speed.denominator)
        state.speed, state.decoding = (ForgettingRatio(self.settings.half_life_cycles, *shown) for _ in range(2))
        if probe.speed.value() > self.settings.on_above:
            state.change(on=True)
