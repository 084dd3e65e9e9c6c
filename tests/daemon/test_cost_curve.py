"""Curves are monotone whatever was measured, extrapolate a line, and follow the machine."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specblock.daemon.cost_curve import CostCurve, OnlineCorrection, Phase, RowCurve, Timing
from specblock.daemon.cost_profile import measure
from specblock.daemon.cycle_cost import CycleCost
from specblock.daemon.plain_price import PlainLooks, PlainPrice
from specblock.drafter.plan import DraftPlan
from tests.daemon.test_engine import drafter_of, target_of

timings = st.lists(
    st.builds(Timing, rows=st.integers(1, 64), batch=st.sampled_from([1, 4]), seconds=st.floats(1e-4, 1.0)),
    min_size=1,
    max_size=14,
)


class Ticks:
    """A clock that moves by a fixed step per reading."""

    def __init__(self, step_s: float) -> None:
        self.now_s, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


@given(timings)
def test_more_rows_or_requests_never_cost_less(points: list[Timing]) -> None:
    curve = RowCurve.fit(points)
    for batch in (1, 2, 4, 9):
        seconds = curve.table(np.arange(1, 200, dtype=np.float64), batch)
        assert bool((np.diff(seconds) >= -1e-12).all()) and seconds[0] > 0
        assert seconds.tolist() == pytest.approx([curve.at(rows, batch) for rows in range(1, 200)])
    for rows in (1, 7, 64):
        by_batch = [curve.at(rows, batch) for batch in range(1, 12)]
        assert all(a <= b + 1e-12 for a, b in pairwise(by_batch))


def test_measured_points_are_met_and_the_end_is_a_line() -> None:
    def truth(rows: int, batch: int) -> float:
        return 0.01 + 1e-4 * max(0, rows * batch - 32) + 5e-4 * (batch - 1)

    points = [Timing(r, b, truth(r, b)) for r in (1, 2, 4, 8, 16, 32, 64) for b in (1, 4)]
    curve = RowCurve.fit(points)
    assert curve.per_request_s == pytest.approx(5e-4)
    for rows, batch in [(1, 1), (32, 1), (64, 1), (16, 4), (64, 4), (48, 1), (200, 4), (1000, 1), (16, 3)]:
        assert curve.at(rows, batch) == pytest.approx(truth(rows, batch), rel=0.01)


def test_a_flat_noisy_end_does_not_make_rows_free() -> None:
    curve = RowCurve((1, 32, 64), (0.01, 0.02, 0.02))
    assert curve.at(1000, 1) > 0.1


def test_one_point_is_a_constant() -> None:
    assert RowCurve.fit([Timing(4, 2, 0.5)]).at(100, 1) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("rows", "seconds"), [((), ()), ((2, 1), (1.0, 2.0)), ((1, 2), (2.0, 1.0)), ((1,), (0.0,)), ((0,), (1.0,))]
)
def test_impossible_curves_are_refused(rows: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="cost curve"):
        RowCurve(rows, seconds)


def test_a_stored_curve_comes_back() -> None:
    curve = CostCurve(RowCurve((1, 9), (0.1, 0.2), 0.01), RowCurve((1,), (0.3,)), RowCurve((4,), (0.4,)), 0.001)
    assert CostCurve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve
    assert curve.plain_s(1) == pytest.approx(0.101)
    assert (curve.draft_s(0, 1, 1), curve.draft_s(2, 8, 1)) == (0.3, 0.4)


@given(st.lists(st.floats(1e-6, 1e3), max_size=60))
def test_correction_stays_within_its_limit(measured: list[float]) -> None:
    correction = OnlineCorrection(rate=0.5, limit=3.0)
    for seconds in measured:
        correction.observe(Phase.VERIFY, seconds, 0.01)
    assert 1 / 3 - 1e-9 <= correction.factor(Phase.VERIFY) <= 3 + 1e-9
    assert correction.factor(Phase.FIRST_BLOCK) == 1


def test_correction_converges_and_ignores_a_blind_clock() -> None:
    correction = OnlineCorrection()
    for _ in range(200):
        correction.observe(Phase.LATER_BLOCK, 0.03, 0.02)
        correction.observe(Phase.LATER_BLOCK, 0.0, 0.02)
    assert correction.factor(Phase.LATER_BLOCK) == pytest.approx(1.5, rel=0.01)


def test_plain_cycles_amid_speculation_correct_the_price_of_plain_decoding_only() -> None:
    curve = CostCurve(RowCurve((1, 33), (0.01, 0.02)), RowCurve((1,), (0.002,)), RowCurve((1,), (0.002,)), 0.001)
    cost = CycleCost(curve)
    tree_s = cost.cycle_s(DraftPlan((), 32), 1, 1)
    for _ in range(200):
        cost.observe_plain(0.008, 0.009, 1, amid_speculation=True)
    assert cost.plain_s(1) == pytest.approx(0.009, rel=0.02)
    assert cost.cycle_s(DraftPlan((), 32), 1, 1) == tree_s
    for _ in range(200):  # the whole machine slows down while speculation is off
        cost.observe_plain(0.016, 0.017, 1, amid_speculation=False)
    assert cost.plain_s(1) == pytest.approx(0.017, rel=0.03)
    assert cost.cycle_s(DraftPlan((), 32), 1, 1) > 1.5 * tree_s


def test_profiling_covers_every_phase_and_keeps_to_its_time() -> None:
    target = target_of("llama", torch.float32)
    drafter = drafter_of(target, leaf_cap=6)
    full = measure(target, drafter, 3, Ticks(1e-4), budget_s=1.0)
    assert full.verify.total_rows[0] == 1 and full.verify.total_rows[-1] == 64 * 3
    assert full.first_block.total_rows[-1] == 8 * 3
    assert full.later_block.total_rows[-1] == 6 * 3
    assert all(math.isfinite(s) for s in full.verify.seconds)
    short = measure(target, drafter, 3, Ticks(0.1), budget_s=1.0)
    assert len(short.verify.total_rows) < len(full.verify.total_rows)
    assert short.later_block.total_rows[-1] <= 6 * 3


def test_a_slow_moment_does_not_bend_the_curve() -> None:
    """The machine takes five times as long for the first quarter of the time."""
    target = target_of("llama", torch.float32)
    drafter, calls = drafter_of(target, blocks=1), [0]

    def clock() -> float:
        calls[0] += 1
        return 1e-4 * (5 * min(calls[0], 60) + max(calls[0] - 60, 0))

    verify = measure(target, drafter, 1, clock, budget_s=1.0).verify
    assert max(verify.seconds) < 1.5 * min(verify.seconds)


def test_a_drafter_of_one_block_has_no_later_points() -> None:
    target = target_of("llama", torch.float32)
    curve = measure(target, drafter_of(target, blocks=1), 1, Ticks(1e-4), budget_s=1.0)
    assert curve.later_block == curve.first_block


def test_the_price_of_plain_cycles_is_learned_by_size_of_the_batch() -> None:
    price = PlainPrice()
    assert price.factor(3) == 1 and price.seen(3) == 0
    for _ in range(12):
        price.observe(1, 0.8, 1.0)
    price.observe(8, 1.2, 1.0)
    price.observe(8, 0.0, 1.0)  # a blind clock
    assert price.factor(1) == pytest.approx(0.8, rel=0.04)
    assert price.factor(2) == price.factor(1), "the nearest that is known"
    assert 1 < price.factor(5) < 1.2 and price.seen(7) == 1, "one look among five to eight counts half"


def test_looks_are_runs_whose_first_cycles_do_not_count_and_rare_once_enough_was_seen() -> None:
    looks, draws = PlainLooks(0.006), np.random.default_rng(0)
    found = [looks.next(draws.random(), seen=0) for _ in range(4000)]
    runs = [look.counts for look in found if look is not None]
    assert runs[:20] == 2 * ([False] * 6 + [True] * 4) and 0.10 < len(runs) / len(found) < 0.2
    found = [looks.next(draws.random(), seen=20) for _ in range(40_000)]
    assert 0.004 < sum(look is not None for look in found) / len(found) < 0.008
    shares = [
        sum(looks.next(draws.random(), 20, speed) is not None for _ in range(40_000)) for speed in (0.9, 1.02, 2.0)
    ]
    assert 0.017 < shares[0] / 40_000 < 0.032 and 0.017 < shares[1] / 40_000 < 0.032 and shares[2] / 40_000 < 0.003
    assert all(PlainLooks(0.0).next(draws.random(), seen=0) is None for _ in range(100))


def test_absorbing_a_prompt_ends_a_run_of_looks() -> None:
    looks = PlainLooks(0.01)
    assert looks.next(0.0, 0) is not None and looks.next(1.0, 0) is not None
    looks.disturbed()
    assert looks.next(1.0, 0) is None, "the drafter's weights are in the cache again"


def test_what_speculation_does_to_verification_is_not_charged_to_plain_decoding() -> None:
    """Verification behind a drafter takes 1.3 times the curve; plain cycles do not."""
    curve = CostCurve(RowCurve((1, 33), (0.01, 0.02)), RowCurve((1,), (0.002,)), RowCurve((1,), (0.002,)), 0.001)
    cost = CycleCost(curve)
    for number in range(400):
        cost.observe_verify(1.3 * curve.verify_s(9, 1), 9, 1, 0.001)
        if number % 40 == 0:
            cost.observe_plain(0.010, 0.011, 1, amid_speculation=True)
    assert cost.plain_s(1) == pytest.approx(0.011, rel=0.06)
    assert cost.cycle_s(DraftPlan((), 8), 1, 1) == pytest.approx(0.002 + 1.3 * curve.verify_s(9, 1) + 0.001, rel=0.02)
