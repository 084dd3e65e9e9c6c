"""A world for ``bench shift``: recorded text in simulated time, real drafters, real training, exact replay.

The text of every request is known beforehand, because it never depends on the drafter. What a version would have
accepted on it is replayed by the drafter that would serve, once per version and conversation; a cycle takes what the
cost curve says. Training, scoring and swaps run for real and take the seconds that they take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from specblock.bandit.actions import CompareReport, Focus, Mix, ParityReport, SwapReport, TrainReport, WindowSummary
from specblock.bandit.config import Arm, CostConfig
from specblock.bandit.cost import charge_s
from specblock.bandit.events import AcceptanceEvent
from specblock.bandit.simulation.scenario import START_S
from specblock.bandit.simulation.world import DRAFT_SHARE
from specblock.daemon.actors import newest_within, window_limits
from specblock.daemon.bench_breakeven_stage import Stage
from specblock.daemon.demo_fault import DesynchronisedDrafter
from specblock.daemon.shift_live import LivePhase, live_phase
from specblock.daemon.shift_recording import Accepted, Pools, request_s
from specblock.daemon.shift_traffic import ShiftTraffic
from specblock.daemon.windows import (
    HELDOUT_WINDOWS,
    PARITY_WINDOWS,
    TRAIN_WINDOWS,
    WindowStore,
    in_mix,
    window_summary,
)
from specblock.drafter.replay import replay


class RecordedWorld:
    """Implements ``ServedWorld``.

    Args:
        bench: target, trainer and engine of this run alone, serving its base version.
        pools: recorded conversations.
        traffic: every request of the run.
        cost: prices, the policy's own; applied to what was really used.
        cycle_s: device-seconds of one cycle of one request.
        live: conversations served live at the end of every phase, see ``shift_live``; nobody pays for that.
    """

    def __init__(
        self,
        bench: Stage,
        pools: Pools,
        traffic: ShiftTraffic,
        cost: CostConfig,
        cycle_s: float,
        live: int = 0,
    ) -> None:
        self._bench, self._pools, self.traffic, self._cost, self._cycle_s = bench, pools, traffic, cost, cycle_s
        self._store = WindowStore(window_limits(bench.config), lambda: self.now_s)
        self._walked: dict[tuple[str, bool, str], Sequence[Accepted]] = {
            (bench.base, False, domain): walked for domain, walked in pools.base.items()
        }
        self._serving = bench.base
        self.now_s = self.free_s = START_S
        self.served = self.trainings = self.updates = self.rollbacks = 0
        self.serving_s = self.charged_s = 0.0
        self.tokens = 0
        size = len(traffic.time_s)
        self.cycles: NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.committed: NDArray[np.int64] = np.zeros(size, dtype=np.int64)
        self.request_s: NDArray[np.float64] = np.zeros(size)
        self.charges: list[tuple[float, float]] = []
        self.promoted_s: list[float] = []
        self._versions: list[str] = []
        self._accepted: list[Accepted] = []
        self._live, self.live_phases = live, list[LivePhase]()
        self.on_request: Callable[[int], None] = lambda number: None

    @property
    def end_s(self) -> float:
        """When the traffic ends."""
        return self.traffic.end_s

    def serve_until(self, now_s: float) -> None:
        """Serve everything that arrives before ``now_s`` with the version that serves now."""
        first, until = self.served, int(np.searchsorted(self.traffic.time_s, now_s))
        for number in range(first, until):
            self._serve(number)
            last = number + 1 == len(self.traffic.phase)
            if self._live and (last or self.traffic.phase[number + 1] != self.traffic.phase[number]):
                self._serve_live(number)
        self.now_s, self.served = now_s, until
        for number in range(first, until):
            self.on_request(number)

    def acceptance(self, number: int) -> float:
        """Acceptance length of a request that was served."""
        return float(self.committed[number] / self.cycles[number])

    def event(self, number: int) -> AcceptanceEvent:
        """What an engine would have reported of it."""
        cycles = int(self.cycles[number])
        device_s = cycles * self._cycle_s
        return AcceptanceEvent(
            incarnation="recorded",
            sequence=number,
            time_s=float(self.traffic.time_s[number]),
            request_id=f"r{number}",
            engine="engine-0",
            drafter_version=self._versions[number],
            domain=self._domain(number),
            cycles=cycles,
            committed_tokens=int(self.committed[number]),
            accepted_histogram=tuple(np.bincount(self._accepted[number]).tolist()),
            draft_s=DRAFT_SHARE * device_s,
            verify_s=(1 - DRAFT_SHARE) * device_s,
            other_s=0.0,
            draft_nodes=self._bench.settings.node_budget * cycles,
        )

    def windows(self) -> WindowSummary:
        """Conversations kept now, per domain."""
        return window_summary(self._store.summary())

    def parity(self, version: str, after_time_s: float | None = None) -> ParityReport:
        """Live cycles beside replayed ones, on the newest conversations that ``version`` served."""
        windows = self._store.pull(version=version, after_time_s=after_time_s)[-PARITY_WINDOWS:]
        report = self._bench.trainer.parity(version, windows)
        self._spend(report.device_s)
        return report

    def train(
        self,
        decision_id: str,
        arm: Arm,
        base_version: str,
        fraction: float,
        resume: bool,
        focus: Mapping[str, Focus],
    ) -> TrainReport:
        """Trains on the newest conversations of the training side."""
        if not resume:
            self.trainings += 1
        kept = self._store.pull(heldout=False)[-TRAIN_WINDOWS:]
        windows = newest_within(kept, self._bench.config.trainer.max_positions)
        report = self._bench.trainer.train(decision_id, arm, base_version, fraction, resume, windows, focus)
        self._spend(report.device_s, report.train_s)
        return report

    def compare(
        self, old_version: str, new_version: str, after_time_s: float | None, mix: Mix | None = None
    ) -> CompareReport:
        """Replays both versions on the newest held-out conversations."""
        windows = in_mix(self._store.pull(heldout=True, after_time_s=after_time_s), mix)[-HELDOUT_WINDOWS:]
        report = self._bench.trainer.compare(old_version, new_version, windows, self._cycle_s)
        self._spend(report.device_s)
        return report

    def promote(self, decision_id: str, candidate_version: str) -> SwapReport:
        """Stores the candidate and swaps it into the engine."""
        version = self._bench.trainer.store(candidate_version, decision_id)
        self.updates += 1
        self.promoted_s.append(self.now_s)
        report = self._swap(version)
        self._bench.trainer.discard(candidate_version)
        return report

    def versions(self) -> tuple[str, ...]:
        """What is stored."""
        return self._bench.trainer.versions()

    def restore(self, decision_id: str, version: str) -> SwapReport:
        """Swaps a stored version in."""
        self.updates += 1
        self.promoted_s.append(self.now_s)
        return self._swap(version)

    def rollback(self, decision_id: str, to_version: str) -> SwapReport:
        """Swaps an earlier version back in."""
        self.rollbacks += 1
        return self._swap(to_version)

    def discard(self, candidate_version: str) -> None:
        """Forgets a candidate."""
        self._bench.trainer.discard(candidate_version)

    def serving_version(self) -> str:
        """Name of what serves."""
        return self._serving

    def _serve(self, number: int) -> None:
        traffic, domain = self.traffic, self._domain(number)
        broken = bool(traffic.time_s[number] >= traffic.fault_s)
        chosen = int(traffic.served[number])
        walked, heldout = self._walk(domain, broken), self._pools.heldout[domain]
        window, accepted = heldout[chosen], walked[chosen]
        cycles, committed = len(accepted), sum(accepted) + len(accepted)
        self.cycles[number], self.committed[number] = cycles, committed
        self.request_s[number] = request_s(accepted, window.num_generated, self._cycle_s)
        self.serving_s += float(self.request_s[number])
        self.tokens += window.num_generated
        self._versions.append(self._serving)
        self._accepted.append(accepted)
        time_s, kept = float(traffic.time_s[number]), int(traffic.kept[number])
        if kept < 0:
            live, judged = walked[-1 - kept], heldout[-1 - kept]
            self._store.add(replace(judged, time_s=time_s, drafter_version=self._serving, accepted=live, plans=()))
        else:
            other = self._pools.train[domain][kept]
            self._store.add(replace(other, time_s=time_s, drafter_version="", accepted=(), plans=()))

    def _serve_live(self, last: int) -> None:
        """What the version that serves now takes for some of the phase that ends with the request ``last``."""
        phase, domain = int(self.traffic.phase[last]), self._domain(last)
        mine = self.traffic.served[: last + 1][self.traffic.phase[: last + 1] == phase]
        chosen = list(dict.fromkeys(mine[::-1].tolist()))[: self._live]
        windows, walked = self._pools.heldout[domain], self._walk(domain, broken=False)
        found = [windows[n] for n in chosen], [walked[n] for n in chosen]
        self.live_phases.append(live_phase(self._bench, phase, self._serving, *found, self._cycle_s))

    def _walk(self, domain: str, broken: bool) -> Sequence[Accepted]:
        """Accepted drafts of what serves now on every held-out conversation of a domain."""
        key = (self._serving, broken, domain)
        if key not in self._walked:
            bench = self._bench
            # A new one each time: a slipped cache starts with whatever its slot saw last.
            drafter = DesynchronisedDrafter(bench.drafter.model, bench.settings) if broken else bench.drafter
            bare = [replace(window, plans=()) for window in self._pools.heldout[domain]]
            self._walked[key] = [one.accepted for one in replay(drafter, bare)]
        return self._walked[key]

    def _domain(self, number: int) -> str:
        name: str = self.traffic.domains[int(self.traffic.domain[number])]
        return name

    def _swap(self, version: str) -> SwapReport:
        result = self._bench.host.swap(version, self._bench.trainer.weights(version))
        self._bench.trainer.registry.promote(version)
        self._serving = version
        self._charge(charge_s(self._cost, stall_s=result.stall_s))
        return SwapReport(ok=True, stall_s=result.stall_s, detail="", version=version)

    def _spend(self, device_s: float, train_s: float = 0.0) -> None:
        self._charge(charge_s(self._cost, device_s=device_s, train_s=train_s))
        self.free_s = max(self.free_s, self.now_s) + device_s

    def _charge(self, device_s: float) -> None:
        self.charged_s += device_s
        self.charges.append((self.now_s, device_s))
