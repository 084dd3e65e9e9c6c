"""Measures the cost curve at start-up: verification by rows, drafting by block, for one request and for every slot.

Tokens and features are random, because time does not depend on them. Points are measured most telling first, and what
does not fit the time is left to interpolation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch

from specblock.cuda_ext.noise import NoiseWindow
from specblock.cuda_ext.sampling import SamplingBatch, SamplingParams
from specblock.cuda_ext.tree import DraftTree
from specblock.daemon.cost_curve import CostCurve, RowCurve, Timing
from specblock.daemon.tree_planner import TreePlanner
from specblock.drafter.interface import AnyDrafter, NewPositions
from specblock.drafter.plan import DraftPlan, PlannedLimits
from specblock.verifier.history import ChoiceState
from specblock.verifier.model import TargetModel
from specblock.verifier.verify import verify

Clock = Callable[[], float]

_ROWS = (1, 32, 8, 64, 16, 4, 2, 9, 12, 24)  # most telling first; kernels take rows by eights or sixteens
_POSITIONS = (4, 8, 2)  # besides 1
_LEAVES = (8, 1, 16, 4)
_DEPTH = 8  # of the trees that stand for drafted ones
_PREFIX_TOKENS = 128
_REPEATS = 4
_ROUNDS, _LEAST_ROUNDS = 12, 2  # of verification, whose shape decides on nodes
_VERIFY_SHARE = 0.6  # of the time
_OVERHEAD_S = 5e-4  # until cycles have been seen


def profiled_planner(target: TargetModel, drafter: AnyDrafter, slots: int, seed: int) -> TreePlanner:
    """A planner with the costs of the device that both are on, measured now in two to three seconds.

    Args:
        target: with its weights loaded.
        drafter: with its weights loaded.
        slots: requests decoded together at most.
        seed: of the planner's exploration.
    """
    curve = measure(target, drafter, slots, time.perf_counter)
    return TreePlanner(curve, drafter.settings, time.perf_counter, Random(seed))


@torch.inference_mode()
def measure(target: TargetModel, drafter: AnyDrafter, slots: int, clock: Clock, *, budget_s: float = 2.5) -> CostCurve:
    """Profiles a target and a drafter on the device they are on.

    Args:
        target: with its weights loaded.
        drafter: with its weights loaded.
        slots: requests decoded together at most.
        clock: seconds; wall-clock time, since other work on the machine costs too.
        budget_s: no further point is begun after this time, except one per curve.
    """
    begin_s = clock()
    # Drafts come before every verification that is timed: what they read puts the target's weights out of the cache.
    cycle = DraftCycle(drafter, target.feature_size, slots, runs=len(_ROWS) * (_ROUNDS + 1))
    usual = DraftPlan((), drafter.settings.node_budget)
    timed = _Verifications(target, slots, clock)
    plain_points = [Timing(1, batch, timed.seconds(1, batch)) for batch in sorted({1, slots})]
    until_s = begin_s + _VERIFY_SHARE * budget_s
    verify_points = list(timed.points(until_s, lambda: cycle.run(usual, 1, 1)))
    first_points, later_points = measure_drafting(drafter, target.feature_size, slots, clock, begin_s + budget_s)
    first_block = RowCurve.fit(first_points)
    return CostCurve(
        verify=RowCurve.fit(verify_points),
        first_block=first_block,
        later_block=RowCurve.fit(later_points) if later_points else first_block,
        overhead_s=_OVERHEAD_S,
        plain=RowCurve.fit(plain_points),
    )


def measure_drafting(
    drafter: AnyDrafter, feature_size: int, slots: int, clock: Clock, until_s: float
) -> tuple[list[Timing], list[Timing]]:
    """Times block 1 by new positions and the next block by leaves, as the difference of cycles with and without it.

    Returns:
        Points of block 1, and of later blocks (none if this drafter has no later block).
    """
    cycle = DraftCycle(drafter, feature_size, slots)
    first: list[Timing] = []
    later: list[Timing] = []
    settings = drafter.settings
    leaves = [n for n in _LEAVES if n < settings.leaf_cap] + [settings.leaf_cap]
    for batch in sorted({1, slots}):
        first.append(Timing(1, batch, cycle.seconds(DraftPlan((), settings.node_budget), batch, 1, clock)))
    for index in range(max(len(_POSITIONS), len(leaves))):
        for batch, alone in [(t.batch, t.seconds) for t in first if t.rows == 1]:
            in_time = index == 0 or clock() < until_s
            if settings.blocks > 1 and index < len(leaves) and in_time:
                plan = DraftPlan((leaves[index],), settings.node_budget)
                if cycle.run(plan, batch, 1) == plan:
                    both = cycle.seconds(plan, batch, 1, clock)
                    later.append(Timing(leaves[index], batch, max(both - alone, 0.05 * alone)))
            if index < len(_POSITIONS) and in_time:
                positions = _POSITIONS[index]
                seconds = cycle.seconds(DraftPlan((), settings.node_budget), batch, positions, clock)
                first.append(Timing(positions, batch, seconds))
    return first, later


class DraftCycle:
    """Drafts again and again for the first slots of a cache, each time a few positions further."""

    def __init__(self, drafter: AnyDrafter, feature_size: int, slots: int, runs: int = 0) -> None:
        """Room is made for what ``measure_drafting`` does, and for ``runs`` runs of two positions more."""
        self.device = drafter.device
        self._drafter, self._feature_size = drafter, feature_size
        # Every run appends: slot 0 takes part in the measurements of both batches.
        appended = 2 * (_REPEATS + 1) * (1 + sum(_POSITIONS)) + 2 * (_REPEATS + 2) * (len(_LEAVES) + 1)
        self._cache: Any = drafter.new_cache(slots, _PREFIX_TOKENS + appended + 2 * runs)
        drafter.use_graphs(self._cache)
        self._params = [SamplingParams(temperature=1.0, top_p=0.95, seed=slot) for slot in range(slots)]
        self._noise: NoiseWindow | None = None
        if drafter.shares_noise:
            self._noise = NoiseWindow(slots, drafter.max_depth + 1, drafter.vocab_size, self.device)
        drafter.refresh(self._cache, list(range(slots)), self._new(slots, _PREFIX_TOKENS))

    def run(self, plan: DraftPlan, batch: int, positions: int) -> DraftPlan:
        """One cycle of the first ``batch`` slots; returns the plan that was followed."""
        slots = list(range(batch))
        if self._noise is not None:
            following = [self._cache.positions[slot] + positions + 1 for slot in slots]
            self._noise.advance(slots, following, [p.seed for p in self._params[:batch]], [0] * batch)
        sampling = SamplingBatch.of(self._params[:batch], self.device)
        root = torch.zeros(batch, dtype=torch.int64, device=self.device)
        new = self._new(batch, positions)
        return self._drafter.draft(self._cache, slots, new, root, sampling, self._noise, PlannedLimits(plan)).plan

    def seconds(self, plan: DraftPlan, batch: int, positions: int, clock: Clock) -> float:
        """Seconds of such a cycle."""
        return _timed(lambda: self.run(plan, batch, positions), clock, self.device)

    def refresh(self, positions: int) -> None:
        """Absorbs new positions of the first slot without drafting."""
        self._drafter.refresh(self._cache, [0], self._new(1, positions))

    def _new(self, batch: int, positions: int) -> NewPositions:
        generator = torch.Generator().manual_seed(positions)
        features = torch.randn(batch, positions, self._feature_size, generator=generator)
        tokens = torch.zeros(batch, positions, dtype=torch.int64, device=self.device)
        return NewPositions(features.to(self.device, self._drafter.dtype), tokens, [positions] * batch)


class _Verifications:
    """Verifies trees of any size for the first slots of a cache, again and again."""

    def __init__(self, target: TargetModel, slots: int, clock: Clock) -> None:
        self._target, self._slots, self._clock = target, slots, clock
        self._cache = target.new_cache(slots, _PREFIX_TOKENS + max(_ROWS))
        target.use_graphs(self._cache)
        self._cache.advance(
            list(range(slots)), [_PREFIX_TOKENS] * slots
        )  # what is in a prefix does not change the time
        self._params = [SamplingParams(temperature=1.0, top_p=0.95, seed=slot) for slot in range(slots)]
        self._states = [ChoiceState(p, [], target.vocab_size, target.device) for p in self._params]
        self._noise = NoiseWindow(slots, _DEPTH + 1, target.vocab_size, target.device)

    def seconds(
        self,
        rows: int,
        batch: int,
        between: Callable[[], object] | None = None,
        repeats: int = _REPEATS,
        warm_up: bool = True,
    ) -> float:
        """Seconds of one verification, with something done before it."""
        target, tree = self._target, stand_in_tree(rows, batch, self._target.device)
        sampling, states = SamplingBatch.of(self._params[:batch], target.device), self._states[:batch]
        slots = list(range(batch))

        def once() -> None:
            verify(target, self._cache, slots, tree, _DEPTH, states, self._noise, sampling=sampling)

        return _timed(once, self._clock, target.device, between, repeats, warm_up)

    def points(self, until_s: float, between: Callable[[], object]) -> Iterator[Timing]:
        """Points of the curve, most telling first; two of each batch however little time there is.

        All of them round by round: what slows the machine down for a while then slows every size, and does not bend the
        curve.
        """
        best: dict[tuple[int, int], float] = {}
        every = [(rows, batch) for rows in _ROWS for batch in sorted({1, self._slots})]
        least = 2 * len({1, self._slots})
        for number in range(_ROUNDS):
            for index, size in enumerate(every if number == 0 else list(best)):
                if index >= (least if number < _LEAST_ROUNDS else 0) and self._clock() >= until_s:
                    break
                seconds = self.seconds(*size, between, repeats=1, warm_up=number == 0)
                best[size] = min(seconds, best.get(size, seconds))
        return (Timing(*size, seconds) for size, seconds in best.items())


def stand_in_tree(rows: int, batch: int, device: torch.device) -> DraftTree:
    """Chains of depth 8 from the root, R = ``rows`` in all."""
    order = torch.arange(rows, device=device)
    depth = torch.where(order > 0, (order - 1) % _DEPTH + 1, 0)
    parent = torch.where(depth > 1, order - 1, 0)

    def every(row: torch.Tensor) -> torch.Tensor:
        return row.expand(batch, -1).contiguous()

    none = torch.full_like(order, -1)
    size = torch.full((batch,), rows, device=device)
    return DraftTree(
        every(order), every(parent), every(depth), -every(depth).to(torch.float32), every(none), every(none), size
    )


def _timed(
    call: Callable[[], object],
    clock: Clock,
    device: torch.device,
    between: Callable[[], object] | None = None,
    repeats: int = _REPEATS,
    warm_up: bool = True,
) -> float:
    """Seconds of the fastest of a few calls, after one to warm up if wanted, each after ``between``.

    Other work on the machine only ever adds time, and unevenly: the fastest call says most about the shape of the
    curve. What the load adds on average, the online correction learns.
    """
    seconds: list[float] = []
    for _ in range(repeats + warm_up):
        if between is not None:
            between()
            _wait(device)
        begin_s = clock()
        call()
        _wait(device)
        seconds.append(clock() - begin_s)
    return min(seconds[warm_up:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
