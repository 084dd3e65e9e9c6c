"""The modelled world keeps its own promises: unbiased cycles, exact replay, every cost charged, time passing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specblock.bandit.cost import charge_s
from specblock.bandit.gate import gate_rows, pooled_saving
from specblock.bandit.ledger import read_ledger
from specblock.bandit.parity import judge
from specblock.bandit.replay import reproductions
from specblock.bandit.simulation.curves import Curves
from specblock.bandit.simulation.rule import RealRule
from specblock.bandit.simulation.run import drive
from specblock.bandit.simulation.scenario import START_S, make_traffic, scenario_named
from specblock.bandit.simulation.versions import histogram
from specblock.bandit.simulation.world import BASE, World
from tests.bandit.simulation.small import CURVES, POLICY, cheap

FULL = POLICY.arm("full")


def world(scenario: str, duration_s: float = 2400.0, curves: Curves = CURVES) -> World:
    traffic = make_traffic(scenario_named(scenario), curves, 0, duration_s, 1.0)
    return World(traffic, curves, POLICY.cost, 0)


def test_cycles_are_unbiased_and_scatter_as_fitted() -> None:
    served = world("stationary", 20_000.0)
    served.serve_until(served.traffic.end_s)
    assert served.tokens / served.live_cycles.sum() == pytest.approx(CURVES.kinds["python"].base, rel=0.005)
    assert served.live_cycles.std() / served.live_cycles.mean() == pytest.approx(CURVES.cycles_sd, rel=0.1)
    assert served.serving_s == pytest.approx(served.live_cycles.sum() * CURVES.cycle_s)


def test_a_complete_update_differs_as_much_per_conversation_as_was_measured() -> None:
    served = world("abrupt", 20_000.0)
    served.serve_until(served.traffic.end_s)
    name = served.train("d000000", FULL, BASE, 1.0, resume=False).candidate_version
    saving = pooled_saving(gate_rows(served.compare(BASE, name, None)))
    # The scatter is of cycles; relative to the old ones it is smaller by what is saved.
    assert saving.se * saving.conversations**0.5 == pytest.approx((1 - saving.relative) * CURVES.paired_sd, rel=0.25)
    assert 0.1 < saving.relative < 0.2 and saving.domains[0].domain == "cpp"


def test_replay_of_the_serving_version_is_exact_until_something_breaks() -> None:
    served = world("fault")
    served.serve_until(served.traffic.fault_s)
    assert judge(served.parity(BASE).rows, POLICY.parity).difference == 0.0
    served.serve_until(served.traffic.end_s)
    evidence = judge(served.parity(BASE).rows, POLICY.parity)
    assert evidence.verdict == "broken" and evidence.difference == pytest.approx(-CURVES.fault_loss, abs=0.01)


def test_actions_are_charged_and_take_time_while_the_old_version_serves() -> None:
    served = world("abrupt")
    served.serve_until(START_S + 1000.0)
    report = served.train("d000000", FULL, BASE, 0.15, resume=False)
    whole_s = CURVES.arms["full"].train_s * FULL.steps / CURVES.arms["full"].steps
    assert report.device_s == pytest.approx(0.15 * whole_s) and served.free_s == START_S + 1000.0 + report.device_s
    spent_s = 0.15 * whole_s
    assert served.charged_s == pytest.approx(charge_s(POLICY.cost, device_s=spent_s, train_s=spent_s))
    rest = served.train("d000000", FULL, BASE, 1.0, resume=True)
    assert rest.device_s == pytest.approx(0.85 * whole_s) and served.trainings == 1
    assert report.positions + rest.positions == 24 * 512
    rows = served.compare(BASE, rest.candidate_version, START_S + 500.0).rows
    assert all(row.time_s > START_S + 500.0 for row in rows) and len(rows) <= CURVES.heldout_windows
    assert served.serving_version() == BASE
    swap = served.promote("d000000", rest.candidate_version)
    served.serve_until(START_S + 1500.0)
    assert served.live_version[-1] == served.serving_version() == swap.version == "v1"
    assert served.rollback("d000000", BASE).version == served.serving_version() == BASE
    with pytest.raises(ValueError, match="arm 'none' has no learning curve"):
        served.train("d000001", replace(FULL, name="none"), BASE, 1.0, resume=False)


def test_an_arm_of_fewer_steps_costs_and_gives_less() -> None:
    served = world("abrupt")
    served.serve_until(START_S + 2000.0)
    half = served.train("d000000", replace(FULL, steps=12), BASE, 1.0, resume=False)
    whole = served.train("d000001", FULL, BASE, 1.0, resume=False)
    assert half.device_s == pytest.approx(whole.device_s / 2)
    levels = [served.drafters[report.candidate_version].levels[1] for report in (half, whole)]
    assert CURVES.kinds["cpp"].base < levels[0] < levels[1]


def test_the_same_seed_is_the_same_world() -> None:
    first, second = world("abrupt"), world("abrupt")
    for one in (first, second):
        one.serve_until(START_S + 1200.0)
        one.promote("d", one.train("d000000", FULL, BASE, 1.0, resume=False).candidate_version)
        one.serve_until(START_S + 2400.0)
    assert (first.live_cycles == second.live_cycles).all() and first.charged_s == second.charged_s


def test_the_real_service_runs_in_it_its_books_agree_and_its_decisions_replay(tmp_path: Path) -> None:
    served = world("abrupt", curves=cheap(train=0.05, replay=0.02))
    rule = RealRule(served, POLICY, tmp_path, decide_every_s=20.0, decide_every_events=16)
    drive(served, rule, 10.0)
    assert served.updates >= 1 and rule.faults() == 0
    assert rule.service.status().balance.charged_s == pytest.approx(served.charged_s)
    taken = list(reproductions(read_ledger(rule.ledger_path), POLICY))
    assert len(taken) > 50 and all(one.reproduced for one in taken)
    assert served.serving.levels[1] > CURVES.kinds["cpp"].base


@pytest.mark.parametrize("cycles", [8, 29, 31, 32, 33, 64])
def test_histograms_hold_all_cycles_and_tokens(cycles: int) -> None:
    found = histogram(cycles, 64)
    assert sum(found) == cycles and sum((a + 1) * n for a, n in enumerate(found)) == 64
    assert min(found) >= 0 and np.flatnonzero(found).size <= 2
