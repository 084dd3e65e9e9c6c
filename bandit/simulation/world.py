"""The modelled world: serves traffic, keeps conversations, trains, replays, swaps, and charges for all of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from specblock.bandit.actions import (
    CompareReport,
    DomainWindows,
    Focus,
    Mix,
    PairedReplay,
    ParityReport,
    ParityRow,
    SwapReport,
    TrainReport,
    WindowSummary,
)
from specblock.bandit.config import Arm, CostConfig
from specblock.bandit.cost import charge_s
from specblock.bandit.events import AcceptanceEvent
from specblock.bandit.reach import newest_of_each
from specblock.bandit.simulation.curves import Curves
from specblock.bandit.simulation.drafters import (
    Conversations,
    Floats,
    Levels,
    after_update,
    described_steps,
    training_mix,
)
from specblock.bandit.simulation.scenario import START_S, Traffic
from specblock.bandit.simulation.versions import Version, base_version, child_version, histogram, whole_cycles

BASE, CANDIDATE = "v0", "candidate-"
DRAFT_SHARE = 0.25
"""Share of a cycle that drafting takes (README.md: 7.5 of 28.7 ms); nothing in the rule depends on it."""
NOTHING: Mapping[str, Focus] = MappingProxyType({})
"""An update that is meant for no domain in particular."""


class World:
    """Implements ``Actions``. Actions take simulated time (``free_s``), during which the old version goes on serving.

    Args:
        traffic: every request of the run.
        curves: what training does and everything costs.
        cost: prices, the policy's own; applied to what was really used.
        seed: of training luck and of how versions differ.
    """

    def __init__(self, traffic: Traffic, curves: Curves, cost: CostConfig, seed: int) -> None:
        self.traffic, self.curves, self.cost, self.seed = traffic, curves, cost, seed
        self._tokens = curves.request_tokens
        self.known = Levels.of(curves, traffic.kinds)
        self.serving = base_version(BASE, self.known.base, traffic, curves)
        self.drafters: dict[str, Version] = {BASE: self.serving}
        self.now_s = self.free_s = START_S
        self.served = 0
        self.serving_s = self.charged_s = 0.0
        self.trainings = self.updates = self.stored = self.rollbacks = 0
        self._done = 0.0
        self.live_cycles: NDArray[np.int64] = np.zeros(len(traffic.time_s), dtype=np.int64)
        self.live_version: list[str] = []
        self.on_request: Callable[[int], None] = lambda number: None

    def serve_until(self, now_s: float) -> None:
        """Serve everything that arrives before ``now_s`` with the version that serves now."""
        until = int(np.searchsorted(self.traffic.time_s, now_s))
        batch = slice(self.served, until)
        cycles = self.serving.cycles[batch]
        broken = self.traffic.time_s[batch] >= self.traffic.fault_s
        if broken.any():
            healthy = self._tokens / self.serving.cycles[self.served :]
            slower = whole_cycles(healthy * (1 - self.curves.fault_loss), self.traffic, self.curves, self.served)
            cycles = np.where(broken, slower[: until - self.served], cycles)
        self.live_cycles[batch] = cycles
        self.live_version.extend([self.serving.name] * (until - self.served))
        self.serving_s += float(cycles.sum()) * self.curves.cycle_s
        self.now_s, self.served, first = now_s, until, self.served
        for number in range(first, until):
            self.on_request(number)

    @property
    def tokens(self) -> int:
        """Tokens committed so far."""
        return self.served * self._tokens

    @property
    def end_s(self) -> float:
        """When the traffic ends."""
        return self.traffic.end_s

    def acceptance(self, number: int) -> float:
        """Acceptance length of a request that was served."""
        return self._tokens / int(self.live_cycles[number])

    def event(self, number: int) -> AcceptanceEvent:
        """What an engine would have reported of it."""
        cycles = int(self.live_cycles[number])
        device_s = cycles * self.curves.cycle_s
        return AcceptanceEvent(
            incarnation="simulation",
            sequence=number,
            time_s=float(self.traffic.time_s[number]),
            request_id=f"c{number}",
            engine="engine-0",
            drafter_version=self.live_version[number],
            domain=self.traffic.domains[self.traffic.domain[number]],
            cycles=cycles,
            committed_tokens=self._tokens,
            accepted_histogram=histogram(cycles, self._tokens),
            draft_s=DRAFT_SHARE * device_s,
            verify_s=(1 - DRAFT_SHARE) * device_s,
            other_s=0.0,
            draft_nodes=7 * cycles,
        )

    def mix(self, focus: Mapping[str, Focus]) -> Floats:
        """Shares of the kinds of text in the training set of an update that is meant for ``focus``."""
        traffic, newest = self.traffic, self._kept(heldout=False)
        newest = newest[newest_of_each(traffic.domain[newest].tolist(), [1] * len(newest), self.curves.train_windows)]
        by_index = {traffic.domains.index(name): one for name, one in focus.items() if name in traffic.domains}
        cycles = self.live_cycles[newest].astype(np.float64)
        alike = np.array([f"{traffic.domain[n]} {self.live_version[n]}" for n in newest])
        for one in np.unique(alike):
            cycles[alike == one] /= cycles[alike == one].mean()
        given = Conversations(domain=traffic.domain[newest], kind=traffic.kind[newest], hardness=cycles)
        return training_mix(given, len(traffic.kinds), by_index)

    def windows(self) -> WindowSummary:
        """Conversations kept now, per domain."""
        train, heldout = self._kept(heldout=False), self._kept(heldout=True)
        return WindowSummary(
            domains=tuple(
                DomainWindows(
                    domain=name,
                    num_train=int((self.traffic.domain[train] == index).sum()),
                    num_heldout=int((self.traffic.domain[heldout] == index).sum()),
                    train_positions=self._tokens * int((self.traffic.domain[train] == index).sum()),
                )
                for index, name in enumerate(self.traffic.domains)
            )
        )

    def parity(self, version: str, after_time_s: float | None = None) -> ParityReport:
        """Live cycles beside replayed ones, on the newest conversations that ``version`` served."""
        all_N = self._kept()
        new_N = all_N if after_time_s is None else all_N[self.traffic.time_s[all_N] > after_time_s]
        kept = [n for n in new_N if self.live_version[n] == version][-self.curves.parity_windows :]
        replayed_N = self.drafters[version].cycles
        rows = tuple(
            ParityRow(
                conversation_id=f"c{n}",
                tokens=self._tokens,
                live_cycles=int(self.live_cycles[n]),
                replay_cycles=int(replayed_N[n]),
            )
            for n in kept
        )
        return ParityReport(rows=rows, device_s=self._replayed(len(rows)))

    def train(
        self,
        decision_id: str,
        arm: Arm,
        base_version: str,
        fraction: float,
        resume: bool,
        focus: Mapping[str, Focus] = NOTHING,
    ) -> TrainReport:
        """Train up to ``fraction`` of the arm's steps on the newest conversations, on what it is meant for.

        Raises:
            ValueError: the curves say nothing of such an arm.
        """
        described = described_steps(arm, self.curves)
        name = f"{CANDIDATE}{decision_id}"
        if not resume:
            self.trainings += 1
        seed = [self.seed, 1, self.trainings]
        luck = max(0.0, 1 + self.curves.luck_sd * float(np.random.default_rng(seed).standard_normal()))
        base = self.drafters[base_version]
        done, mix_K = fraction * described, self.mix(focus)
        levels_K = after_update(base.levels, arm.name, done, mix_K, luck, self.curves, self.known)
        progress = min(1.0, self.curves.progress(done))
        seed, first = [self.seed, 2, self.trainings], max(0, self.served - self.curves.kept_windows)
        child = child_version(name, base, levels_K, progress, seed, self.traffic, self.curves, first)
        share = fraction - (self._done if resume else 0.0)
        self._done, self.drafters[name] = fraction, child
        device_s = share * described * self.curves.arms[arm.name].train_s
        self._spend(device_s, train_s=device_s)
        return TrainReport(
            candidate_version=name,
            positions=round(share * arm.steps * self.curves.positions_per_step),
            train_s=device_s,
            device_s=device_s,
            cutoff_time_s=self.now_s,
        )

    def compare(
        self, old_version: str, new_version: str, after_time_s: float | None, mix: Mix | None = None
    ) -> CompareReport:
        """Cycles of both versions on the newest held-out conversations; what the old one served is known."""
        kept = self._kept(heldout=True)
        if after_time_s is not None:
            kept = kept[self.traffic.time_s[kept] > after_time_s]
        if mix is not None:
            kept = kept[mix.chosen([self.traffic.domains[self.traffic.domain[n]] for n in kept])]
        kept = kept[-self.curves.heldout_windows :]
        known_N = np.array([self.live_version[n] == old_version for n in kept], dtype=bool)
        old_N, new_N = self.drafters[old_version].cycles[kept], self.drafters[new_version].cycles[kept]
        old_N = np.where(known_N, self.live_cycles[kept], old_N)
        rows = tuple(
            PairedReplay(
                conversation_id=f"c{n}",
                domain=self.traffic.domains[self.traffic.domain[n]],
                time_s=float(self.traffic.time_s[n]),
                tokens=self._tokens,
                cycles_old=int(old),
                cycles_new=int(new),
                live_version=self.live_version[n],
                live_cycles=int(self.live_cycles[n]),
            )
            for n, old, new in zip(kept, old_N, new_N, strict=True)
        )
        device_s, cycle_s = self._replayed(2 * len(rows) - int(known_N.sum())), self.curves.cycle_s
        return CompareReport(rows=rows, cycle_s_old=cycle_s, cycle_s_new=cycle_s, device_s=device_s)

    def versions(self) -> tuple[str, ...]:
        """What has served so far: the base, then the newest first."""
        base, *others = (name for name in self.drafters if not name.startswith(CANDIDATE))
        return (base, *reversed(others))

    def restore(self, decision_id: str, version: str) -> SwapReport:
        """An earlier version serves again, because it is better."""
        self.updates += 1
        return self._swap(version)

    def promote(self, decision_id: str, candidate_version: str) -> SwapReport:
        """The candidate serves from now on, under a name of its own."""
        self.updates += 1
        self.stored += 1
        name = f"v{self.stored}"
        found = self.drafters.pop(candidate_version)
        self.drafters[name] = Version(name, found.levels, found.scatter, found.cycles)
        return self._swap(name)

    def rollback(self, decision_id: str, to_version: str) -> SwapReport:
        """An earlier version serves again."""
        self.rollbacks += 1
        return self._swap(to_version)

    def discard(self, candidate_version: str) -> None:
        """Forget a candidate."""
        if candidate_version.startswith(CANDIDATE):
            self.drafters.pop(candidate_version, None)

    def serving_version(self) -> str:
        """Name of what serves."""
        return self.serving.name

    def _kept(self, *, heldout: bool | None = None) -> NDArray[np.int64]:
        """Conversations that are still kept, oldest first; of one side of the split if asked for."""
        kept = np.arange(max(0, self.served - self.curves.kept_windows), self.served)
        return kept if heldout is None else kept[self.traffic.heldout[kept] == heldout]

    def _replayed(self, conversations: int) -> float:
        device_s = conversations * self._tokens * self.curves.replay_s_per_token
        self._spend(device_s)
        return device_s

    def _spend(self, device_s: float, train_s: float = 0.0) -> None:
        self.charged_s += charge_s(self.cost, device_s=device_s, train_s=train_s)
        self.free_s = max(self.free_s, self.now_s) + device_s

    def _swap(self, version: str) -> SwapReport:
        self.serving = self.drafters[version]
        self.charged_s += charge_s(self.cost, stall_s=self.curves.stall_s)
        return SwapReport(ok=True, stall_s=self.curves.stall_s, detail="", version=version)
