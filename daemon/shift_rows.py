"""What the policies of ``bench shift`` made of the same traffic, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from specblock.daemon.resampling import Interval, interval_95, resampled
from specblock.daemon.shift_traffic import ShiftTraffic

ORACLE = "oracle"
_DRAWS = 1000
_RECENT_REQUESTS = 64
_RECOVERED = 0.95
"""Share of the phase's plateau at which a policy has recovered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRun:
    """One policy through one run; device-seconds, per request [N].

    Attributes:
        tokens: of all requests, the same for every policy.
        request_s: serving of each request.
        cycles, committed: complete cycles of each request and the tokens they committed.
        charged_s: everything but serving.
        faults: decisions that reported a fault; None for policies that cannot.
        wall_s: real seconds that the run took.
        charges: when what was charged, simulated Unix seconds.
        promoted_s: when versions went live.
    """

    policy: str
    seed: int
    tokens: int
    request_s: NDArray[np.float64]
    cycles: NDArray[np.int64]
    committed: NDArray[np.int64]
    charged_s: float
    updates: int
    trainings: int
    rollbacks: int
    faults: int | None
    wall_s: float
    charges: tuple[tuple[float, float], ...] = ()
    promoted_s: tuple[float, ...] = ()

    @property
    def total_s(self) -> float:
        """Serving and everything charged."""
        return float(self.request_s.sum()) + self.charged_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftRow:
    """One policy over all runs.

    Attributes:
        net_tokens_per_s, gross_tokens_per_s: tokens per device-second, with and without everything charged.
        ratio_to_static: net, over doing nothing; its interval resamples the recorded conversations, and runs if there
            are several.
        acceptance_length: pooled over complete cycles, bonus included.
        updates, trainings, rollbacks, cost_device_s: means over the runs.
        recovery_requests: requests until acceptance is back at 95 % of the best plateau of its phase, averaged over
            those of the phases counted in ``recovered`` in which it gets there; None: in none.
        recovered: share of the phases in which doing nothing never gets there in which this policy does; None: there is
            no such phase.
        faults: decisions that reported a fault, mean; None for policies that cannot.
    """

    policy: str
    net_tokens_per_s: float
    gross_tokens_per_s: float
    ratio_to_static: float
    ratio_interval: Interval
    acceptance_length: float
    acceptance_by_phase: tuple[float, ...]
    updates: float
    trainings: float
    rollbacks: float
    cost_device_s: float
    recovery_requests: float | None
    recovered: float | None
    faults: float | None
    wall_s: float


def shift_rows(runs: Sequence[PolicyRun], traffic: dict[int, ShiftTraffic], static: str) -> list[ShiftRow]:
    """One row per policy, in the order they first occur, and an estimate of what there is to win.

    Args:
        runs: every policy once per seed.
        traffic: of each seed.
        static: name of the policy that does nothing.
    """
    groups: dict[str, list[PolicyRun]] = {}
    for one in runs:
        groups.setdefault(one.policy, []).append(one)
    plateaus = {seed: _plateaus([r for r in runs if r.seed == seed], own) for seed, own in traffic.items()}
    slow = {r.seed: [n is None for n in _recoveries(r, traffic[r.seed], plateaus[r.seed])] for r in groups[static]}
    rows = [_row(group, groups[static], traffic, plateaus, slow) for group in groups.values()]
    return [*rows, _oracle(rows[list(groups).index(static)], runs, groups[static], traffic)]


def lines(rows: Sequence[ShiftRow]) -> Iterator[str]:
    """The table for people."""
    yield (
        f"{'policy':<14}{'net tok/s':>10}{'gross':>8}{'x static':>10}{'95 % interval':>18}{'accept':>8}{'updates':>9}"
        f"{'trained':>9}{'cost dev-s':>12}{'recovered':>11}{'after':>8}{'faults':>8}"
    )
    for row in rows:
        low, high = row.ratio_interval
        recovery = "-" if row.recovery_requests is None else f"{row.recovery_requests:.0f}"
        faults = "-" if row.faults is None else f"{row.faults:.0f}"
        share = "-" if row.recovered is None else f"{row.recovered:.0%}"
        yield (
            f"{row.policy:<14}{row.net_tokens_per_s:>10.1f}{row.gross_tokens_per_s:>8.1f}{row.ratio_to_static:>10.3f}"
            f"{f'{low:.3f} to {high:.3f}':>18}{row.acceptance_length:>8.2f}{row.updates:>9.1f}{row.trainings:>9.1f}"
            f"{row.cost_device_s:>12.0f}{share:>11}{recovery:>8}{faults:>8}"
        )


def _row(
    group: list[PolicyRun],
    static: list[PolicyRun],
    traffic: dict[int, ShiftTraffic],
    plateaus: dict[int, list[float]],
    slow: dict[int, list[bool]],
) -> ShiftRow:
    tokens = sum(r.tokens for r in group)
    found = [
        n
        for r in group
        for n, wanted in zip(_recoveries(r, traffic[r.seed], plateaus[r.seed]), slow[r.seed], strict=True)
        if wanted
    ]
    there = [n for n in found if n is not None]
    faults = [r.faults for r in group if r.faults is not None]
    phases = range(int(max(t.phase.max() for t in traffic.values())) + 1)
    return ShiftRow(
        policy=group[0].policy,
        net_tokens_per_s=tokens / sum(r.total_s for r in group),
        gross_tokens_per_s=tokens / sum(float(r.request_s.sum()) for r in group),
        ratio_to_static=sum(r.total_s for r in static) / sum(r.total_s for r in group),
        ratio_interval=_interval(group, static, traffic),
        acceptance_length=sum(int(r.committed.sum()) for r in group) / sum(int(r.cycles.sum()) for r in group),
        acceptance_by_phase=tuple(_in_phase(group, traffic, phase) for phase in phases),
        updates=float(np.mean([r.updates for r in group])),
        trainings=float(np.mean([r.trainings for r in group])),
        rollbacks=float(np.mean([r.rollbacks for r in group])),
        cost_device_s=float(np.mean([r.charged_s for r in group])),
        recovery_requests=float(np.mean(there)) if there else None,
        recovered=len(there) / len(found) if found else None,
        faults=float(np.mean(faults)) if faults else None,
        wall_s=sum(r.wall_s for r in group),
    )


def _oracle(
    row: ShiftRow, runs: Sequence[PolicyRun], static: list[PolicyRun], traffic: dict[int, ShiftTraffic]
) -> ShiftRow:
    """An estimate of what there is to win: every phase served as by the policy that was fastest in its last quarter.

    From the phase's first request on, and free of charge; on the same requests, so that luck in text plays no part.
    """
    total_s, cycles = 0.0, 0.0
    by_phase: list[list[float]] = []
    for run in static:
        others = [r for r in runs if r.seed == run.seed]
        by_phase.append([])
        for phase in range(int(traffic[run.seed].phase.max()) + 1):
            where, late = _in_and_late(traffic[run.seed], phase)
            share = min(float(r.request_s[late].sum()) for r in others) / float(run.request_s[late].sum())
            total_s += share * float(run.request_s[where].sum())
            needed = share * float(run.cycles[where].sum())
            by_phase[-1].append(float(run.committed[where].sum()) / needed)
            cycles += needed
    tokens_per_s = sum(r.tokens for r in static) / total_s
    ratio = sum(float(r.request_s.sum()) for r in static) / total_s
    return replace(
        row,
        policy=ORACLE,
        net_tokens_per_s=tokens_per_s,
        gross_tokens_per_s=tokens_per_s,
        ratio_to_static=ratio,
        ratio_interval=(ratio, ratio),
        acceptance_length=sum(int(r.committed.sum()) for r in static) / cycles,
        acceptance_by_phase=tuple(float(np.mean(phase)) for phase in zip(*by_phase, strict=True)),
        recovery_requests=None,
        recovered=None,
        faults=None,
        wall_s=0.0,
    )


def _in_phase(group: list[PolicyRun], traffic: dict[int, ShiftTraffic], phase: int) -> float:
    committed = sum(int(r.committed[traffic[r.seed].phase == phase].sum()) for r in group)
    return committed / max(1, sum(int(r.cycles[traffic[r.seed].phase == phase].sum()) for r in group))


def _interval(group: list[PolicyRun], static: list[PolicyRun], traffic: dict[int, ShiftTraffic]) -> Interval:
    """Of the ratio of net tokens per second: recorded conversations drawn anew, the same ones for both policies."""
    seeds = sorted(traffic)
    own, other = ({r.seed: r for r in runs} for runs in (group, static))
    chosen = resampled(len(seeds), _DRAWS, seed=1)
    totals = np.zeros((2, _DRAWS, len(seeds)))
    for column, seed in enumerate(seeds):
        for line, run in enumerate((own[seed], other[seed])):
            totals[line, :, column] = run.charged_s + _resampled_s(run.request_s, traffic[seed])
    drawn = np.take_along_axis(totals, np.broadcast_to(chosen, totals.shape), axis=2).sum(axis=2)
    return interval_95(drawn[1] / drawn[0])


def _resampled_s(request_s: NDArray[np.float64], traffic: ShiftTraffic) -> NDArray[np.float64]:
    """Serving seconds [draws] with the conversations of every kind of text drawn with replacement."""
    total = np.zeros(_DRAWS)
    for index in range(len(traffic.domains)):
        mine = traffic.domain == index
        count = traffic.num_served[index]
        spent = np.bincount(traffic.served[mine], weights=request_s[mine], minlength=count)
        times = np.bincount(traffic.served[mine], minlength=count)
        # The same conversations for every policy and every run: all runs draw from the same recording.
        drawn = resampled(count, _DRAWS, seed=2 + index)
        # A conversation that happened to be drawn more often must not count more: totals are scaled to the traffic.
        total += spent[drawn].sum(axis=1) * times.sum() / np.maximum(times[drawn].sum(axis=1), 1)
    return total


def _in_and_late(traffic: ShiftTraffic, phase: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of a phase's requests, and of those in its last quarter."""
    where = np.flatnonzero(traffic.phase == phase)
    return where, where[len(where) * 3 // 4 :]


def _plateaus(runs: Sequence[PolicyRun], traffic: ShiftTraffic) -> list[float]:
    """The best acceptance that any policy shows in the last quarter of each phase."""
    best = []
    for phase in range(int(traffic.phase.max()) + 1):
        _, late = _in_and_late(traffic, phase)
        best.append(max(float(r.committed[late].sum() / r.cycles[late].sum()) for r in runs))
    return best


def _recoveries(run: PolicyRun, traffic: ShiftTraffic, plateaus: Sequence[float]) -> list[int | None]:
    """Per phase: requests until the recent acceptance reaches 95 % of the plateau; None: never."""
    found: list[int | None] = []
    for phase, plateau in enumerate(plateaus):
        where = np.flatnonzero(traffic.phase == phase)
        width = min(_RECENT_REQUESTS, len(where))
        ones = np.ones(width)
        recent = np.convolve(run.committed[where], ones, "valid") / np.convolve(run.cycles[where], ones, "valid")
        reached = np.flatnonzero(recent >= _RECOVERED * plateau)
        found.append(int(reached[0]) + width if len(reached) else None)
    return found
