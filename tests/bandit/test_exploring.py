"""Trials near the margin: how often, with what probability on record, and never where something else forbids them."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specblock.bandit.config import CostConfig, ExploreConfig, PolicyConfig
from specblock.bandit.decision import CHECK, FAULT, PROBE, SKIP, Decision, PolicyState
from specblock.bandit.exploring import MOST_SHARE, draw, explore_probability, near_margin
from specblock.bandit.ledger import Balance
from specblock.bandit.policy import decide
from specblock.bandit.replay import reproductions
from tests.bandit.test_policy import CONFIG, CONTEXT, checked
from tests.bandit.test_service import drive, make, records
from tests.bandit.world import DEAR_S, small_policy

EXPLORING = replace(CONFIG, explore=ExploreConfig(every_s=120.0, seed=3))
BROKEN = replace(checked().parity.evidence, verdict="broken")  # type: ignore[union-attr]


def near_config() -> PolicyConfig:
    """A price at which the best arm is expected to pay but may not."""
    for price in np.geomspace(1, 1000, 400):
        config = replace(EXPLORING, cost=CostConfig(price=float(price)))
        options = decide(replace(CONTEXT, since_s=30.0), checked(), config)[0].options
        if not any(o.value.net_lower > 0 for o in options) and any(near_margin(o.value) for o in options):
            return config
    raise AssertionError("no price puts an arm near the margin")


NEAR = near_config()


def decisions(
    state: PolicyState, config: PolicyConfig = NEAR, since_s: float = 30.0, count: int = 4000
) -> list[Decision]:
    # The same inputs at slightly different times; only the draw changes (parity is the newest within a second).
    times = 10_000.0 + np.arange(count) / count
    return [decide(replace(CONTEXT, now_s=float(t), since_s=since_s), state, config)[0] for t in times]


def test_near_the_margin_it_tries_as_often_as_it_says() -> None:
    taken = decisions(checked())
    chance = explore_probability(30.0, NEAR.explore)
    tried = [d for d in taken if d.action == PROBE]
    assert {d.probability for d in tried} == {chance}
    assert {d.probability for d in taken if d.action == SKIP} == {1 - chance}
    assert len(tried) + sum(d.action == SKIP for d in taken) == len(taken)
    spread = (chance * (1 - chance) * len(taken)) ** 0.5
    assert abs(len(tried) - chance * len(taken)) < 4 * spread
    assert "a trial will tell" in tried[0].reason


def test_inverse_probabilities_give_an_unbiased_count() -> None:
    weights = [1 / d.probability if d.action == PROBE else 0.0 for d in decisions(checked())]
    assert np.mean(weights) == pytest.approx(1.0, abs=4 * np.std(weights) / len(weights) ** 0.5)


@pytest.mark.parametrize(
    ("state", "num_changes"),
    [
        (checked(BROKEN), 0),
        (checked(), 1),
        (replace(checked(), ended_s=9_999.0, cooldown_s=3_600.0), 0),
    ],
    ids=["fault", "unattributed change", "cooling down"],
)
def test_nothing_is_tried_where_something_comes_first(state: PolicyState, num_changes: int) -> None:
    eager = replace(NEAR, explore=ExploreConfig(every_s=60.0))
    for time_s in 10_000.0 + np.arange(100) / 100:
        context = replace(CONTEXT, now_s=float(time_s), since_s=60.0, num_changes=num_changes)
        decision, _ = decide(context, state, eager)
        assert decision.action != PROBE and decision.probability == 1.0
        assert (decision.verdict == FAULT) == (state.parity.evidence.verdict == "broken")  # type: ignore[union-attr]


def test_a_parity_check_and_the_trial_after_it_are_one_draw() -> None:
    stale = checked(time_s=9_000.0 - 500.0)
    config = replace(NEAR, parity=replace(NEAR.parity, every_s=1e6, max_share=0.9))
    for time_s in 10_000.0 + np.arange(400) / 400:
        first, _ = decide(replace(CONTEXT, now_s=float(time_s), since_s=30.0), stale, config)
        then, _ = decide(replace(CONTEXT, now_s=float(time_s), since_s=30.0), checked(time_s=float(time_s)), config)
        assert (first.action == CHECK) == (then.action == PROBE)
        # Of the two, the last one has the chance on record.
        assert (first.probability == 1.0) == (first.action == CHECK) and then.probability < 1


def test_what_surely_pays_or_surely_does_not_is_no_matter_of_chance() -> None:
    assert {(d.action, d.probability) for d in decisions(checked(), EXPLORING, count=50)} == {(PROBE, 1.0)}
    dear = replace(EXPLORING, cost=CostConfig(price=1e6))
    assert {(d.action, d.probability) for d in decisions(checked(), dear, count=50)} == {(SKIP, 1.0)}


def test_never_means_never_and_a_first_decision_stands_for_no_time() -> None:
    never = replace(NEAR, explore=ExploreConfig(every_s=0.0))
    for taken in (decisions(checked(), never, count=200), decisions(checked(), since_s=0.0, count=200)):
        assert {(d.action, d.probability) for d in taken} == {(SKIP, 1.0)}


@given(since_s=st.floats(0.0, 1e6), parts=st.integers(1, 50))
def test_the_rate_does_not_depend_on_how_often_it_decides(since_s: float, parts: int) -> None:
    config = ExploreConfig(every_s=600.0)
    since_s = min(since_s, MOST_SHARE * 600.0)
    whole, part = explore_probability(since_s, config), explore_probability(since_s / parts, config)
    assert 1 - (1 - part) ** parts == pytest.approx(whole, abs=1e-12)
    assert explore_probability(1e9, config) == explore_probability(MOST_SHARE * 600.0, config)


def test_draws_are_uniform_and_differ_by_seed() -> None:
    times = np.linspace(1.7e9, 1.8e9, 20_000)
    one, other = (np.array([draw(float(t), ExploreConfig(seed=s)) for t in times]) for s in (1, 2))
    ordered = np.sort(one)
    assert np.abs(ordered - (np.arange(len(ordered)) + 0.5) / len(ordered)).max() < 1.95 / len(ordered) ** 0.5
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


def test_a_trial_by_chance_is_on_record_replays_and_puts_nothing_off(tmp_path: Path) -> None:
    plain = small_policy()
    # A bound that nothing passes, tried every minute, and telling at once that there is nothing to win.
    telling = replace(plain.arm("head"), probe_gain_share=0.8, probe_gain_share_sd=0.05, prior_s_per_position=DEAR_S)
    policy = replace(
        plain,
        arms=(plain.arm("skip"), telling),
        confidence=0.9999,
        explore=ExploreConfig(every_s=60.0),
    )
    world, service = make(tmp_path, policy)
    world.recovers["head"], world.s_per_position = 0.0, DEAR_S
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    drive(world, service, now_s, 90)
    tried = [r for r in records(tmp_path) if r.stage == "decided" and r.action == PROBE]
    assert tried and all(0 < r.probability < 1 for r in tried) and all(r.options[0].value.net_lower <= 0 for r in tried)
    assert any(r.stage == "abandoned" for r in records(tmp_path))
    assert service.state.policy.training.in_row == 0 and service.state.policy.training.wasted_s == 0
    assert [r for r in reproductions(records(tmp_path), policy) if not r.reproduced] == []
    assert functools.reduce(Balance.add, records(tmp_path), Balance()).explored == len(tried)
