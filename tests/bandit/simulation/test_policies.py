"""What the policies make of the scenarios. Sampling noise and the luck of single updates are allowed ``NOISE``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specblock.bandit.config import PolicyConfig
from specblock.bandit.simulation.catalogue import (
    COST_AWARE,
    NEVER,
    ORACLE,
    WITHOUT_RESIDUAL,
    Settings,
    policies,
    simulate,
)
from specblock.bandit.simulation.curves import Curves
from specblock.bandit.simulation.drafters import Floats
from specblock.bandit.simulation.oracle import EPOCH_S, Oracle
from specblock.bandit.simulation.run import Outcome
from specblock.bandit.simulation.scenario import SCENARIOS, make_traffic, scenario_named
from specblock.bandit.simulation.table import lines, rows
from specblock.bandit.simulation.world import World
from tests.bandit.simulation.small import CURVES, POLICY, cheap

NOISE = 0.005


def settings(
    policy: PolicyConfig = POLICY, curves: Curves = CURVES, duration_s: float = 2400.0, rate_per_s: float = 1.0
) -> Settings:
    return Settings(policy=policy, curves=curves, duration_s=duration_s, rate_per_s=rate_per_s)


def outcome(tmp_path: Path, scenario: str, policy: str, chosen: Settings, seed: int = 0) -> Outcome:
    directory = tmp_path / f"{scenario}-{policy}-{seed}-{len(list(tmp_path.iterdir()))}"
    directory.mkdir()
    return simulate(scenario_named(scenario), policy, seed, chosen, directory)


@pytest.fixture(scope="module")
def all_outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """Every policy in every scenario, with training cheap enough for updates to pay within the short run."""
    path = tmp_path_factory.mktemp("all")
    chosen = settings(curves=cheap(train=0.05, replay=0.05), duration_s=1800.0, rate_per_s=0.8)
    chosen = replace(chosen, every_n=(80, 200, 800))
    return [outcome(path, s.name, policy, chosen) for s in SCENARIOS for policy in policies(chosen)]


def test_nobody_beats_the_oracle(all_outcomes: list[Outcome]) -> None:
    best = {o.scenario: o.net_tokens_per_s for o in all_outcomes if o.policy == ORACLE}
    assert len(best) == len(SCENARIOS)
    assert [o for o in all_outcomes if o.net_tokens_per_s > (1 + NOISE) * best[o.scenario]] == []
    never = {o.scenario: o.net_tokens_per_s for o in all_outcomes if o.policy == NEVER}
    assert best["abrupt"] > 1.05 * never["abrupt"], "the bound is about more than doing nothing"
    assert best["stationary"] == pytest.approx(never["stationary"], rel=NOISE)


def test_all_policies_see_the_same_traffic_and_pay_for_what_they_do(all_outcomes: list[Outcome]) -> None:
    for scenario in SCENARIOS:
        mine = [o for o in all_outcomes if o.scenario == scenario.name]
        assert len({o.tokens for o in mine}) == 1
        checking = (COST_AWARE, WITHOUT_RESIDUAL)
        assert all((o.charged_s > 0) == (o.trainings > 0 or o.policy in checking) for o in mine)
    # Schedules pay by the update.
    by_name = {o.policy: o for o in all_outcomes if o.scenario == "abrupt"}
    assert by_name["every_80"].charged_s > by_name["every_200"].charged_s > by_name["every_800"].charged_s > 0
    assert by_name["always_full"].gross_tokens_per_s > by_name[NEVER].gross_tokens_per_s
    assert by_name["dual_ema"].updates >= 1 and by_name["without_model"].trainings >= 2


def test_a_run_is_a_function_of_its_seed(tmp_path: Path) -> None:
    chosen = settings(curves=cheap(), duration_s=1200.0)
    for policy in (COST_AWARE, "dual_ema", "without_model", ORACLE):
        first, again = (outcome(tmp_path, "abrupt", policy, chosen) for _ in range(2))
        assert first == again and first != outcome(tmp_path, "abrupt", policy, chosen, seed=1)


def test_a_fault_is_reported_and_nothing_is_trained(all_outcomes: list[Outcome], tmp_path: Path) -> None:
    mine = {o.policy: o for o in all_outcomes if o.scenario == "fault"}
    for found in (mine[COST_AWARE], mine[WITHOUT_RESIDUAL], outcome(tmp_path, "fault", COST_AWARE, settings())):
        assert found.faults is not None and found.faults >= 10 and found.trainings == 0
    assert mine["always_full"].trainings > 0 and mine["always_full"].faults is None


def test_at_its_reference_nothing_is_trained_and_only_parity_checks_cost(tmp_path: Path) -> None:
    chosen = settings(duration_s=3000.0)
    aware, never = (outcome(tmp_path, "stationary", policy, chosen) for policy in (COST_AWARE, NEVER))
    assert aware.trainings == aware.updates == aware.faults == 0
    assert aware.serving_s == never.serving_s
    often = replace(POLICY, parity=replace(POLICY.parity, max_share=0.02))
    more = outcome(tmp_path, "stationary", COST_AWARE, settings(often, duration_s=3000.0))
    assert 0 < aware.charged_s < more.charged_s and 1 - aware.net_tokens_per_s / never.net_tokens_per_s < 0.005


def test_with_absurd_costs_it_never_trains(tmp_path: Path) -> None:
    arms = tuple(replace(arm, prior_s_per_position=50.0) if arm.steps else arm for arm in POLICY.arms)
    dear = replace(POLICY, arms=arms, budget_device_s_per_hour=1e9)
    found = outcome(tmp_path, "abrupt", COST_AWARE, settings(dear))
    assert found.trainings == found.updates == 0


def test_the_bound_is_what_trying_everything_finds() -> None:
    chosen = settings(curves=replace(cheap(train=0.2), luck_sd=0.0), duration_s=4 * EPOCH_S * 5)
    traffic = make_traffic(scenario_named("abrupt"), chosen.curves, 0, chosen.duration_s, 1.0)
    world = World(traffic, chosen.curves, POLICY.cost, 0)
    value = Oracle(world, POLICY).value
    start = value.epochs - 5
    levels = np.array([2.15, 1.8])

    def least_s(epoch: int, at: Floats) -> float:
        """Every sequence of actions from ``epoch`` on, with exact levels."""
        if epoch >= value.epochs:
            return 0.0
        costs = [float(value.serve_s(epoch, at, 0.0, EPOCH_S)) + least_s(epoch + 1, at)]
        for arm in POLICY.arms[1:]:
            for focus in value.focuses:
                paid_s, after, last = value.trained(epoch, at, arm, focus)
                costs.append(float(paid_s) + least_s(last, after))
        return min(costs)

    assert float(value.left_s(start, levels)) == pytest.approx(least_s(start, levels), rel=2e-3)


def test_a_policy_whose_arm_has_no_curve_is_refused() -> None:
    other = replace(POLICY, arms=(POLICY.arms[0], replace(POLICY.arms[1], name="rank_head")))
    with pytest.raises(ValueError, match="arm 'rank_head' has no learning curve; the curves know head, full"):
        policies(settings(other))
    with pytest.raises(ValueError, match="no arm that trains"):
        policies(settings(replace(POLICY, arms=POLICY.arms[:1])))


def test_rows_average_over_seeds_against_each_seeds_oracle() -> None:
    def one(policy: str, seed: int, charged_s: float, faults: int | None = None) -> Outcome:
        return Outcome(
            scenario="abrupt",
            policy=policy,
            seed=seed,
            tokens=1000,
            serving_s=10.0,
            charged_s=charged_s,
            updates=seed,
            trainings=2,
            rollbacks=0,
            faults=faults,
        )

    oracle = [one(ORACLE, 0, 0.0), one(ORACLE, 1, 0.0)]
    nothing = [one(NEVER, 0, 10.0), one(NEVER, 1, 10.0)]
    first, last, never = rows([one("a", 0, 10.0, 3), one("a", 1, 0.0, 5), *oracle, *nothing])
    assert (first.net_tokens_per_s, first.gross_tokens_per_s, first.updates, first.faults) == (75.0, 100.0, 0.5, 4.0)
    assert first.regret == pytest.approx(0.25) and last.regret == 0.0 and first.seeds == 2
    assert (first.saved, last.saved, never.saved) == (0.25, 0.5, 0.0) and first.saved_se == pytest.approx(0.25)
    assert (first.missed, last.missed, never.missed) == (0.5, 0.0, 1.0)
    shown = list(lines([first, last]))
    assert len(shown) == 3 and "25.0%" in shown[1] and shown[1].endswith("50%")
    (equal, *_) = rows([one("a", 0, 0.2), one(ORACLE, 0, 0.0), one(NEVER, 0, 0.05)])
    assert equal.missed is None and equal.saved < 0, "where the oracle saves next to nothing, nothing is missed"
