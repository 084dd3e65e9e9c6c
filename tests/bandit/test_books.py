"""The books are honest: losses are booked, spending is remembered, decisions can be taken again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from specblock.bandit.actions import CompareReport, PairedReplay, SwapReport
from specblock.bandit.backoff import cooldown_left_s
from specblock.bandit.config import Arm, CostConfig
from specblock.bandit.decision import Charge
from specblock.bandit.forecast import probed_gain
from specblock.bandit.gate import gate_rows, pooled_saving
from specblock.bandit.ledger import Ledger, LedgerRecord
from specblock.bandit.memory_stream import MemoryLog, MemoryStream
from specblock.bandit.outside import Journal
from specblock.bandit.policy import decide, inputs_digest
from specblock.bandit.recovery import Recovery
from specblock.bandit.replay import replay_decisions
from specblock.bandit.service import BanditService
from specblock.bandit.state import BanditState
from tests.bandit.test_policy import CONFIG, CONTEXT, HEAD, checked, probed
from tests.bandit.test_service import drive, make, records, shifted
from tests.bandit.world import World, service_config, small_policy


def until_stage(world: World, service: BanditService, stage: str) -> int:
    """Good traffic, a shift, and on until the update is at ``stage``."""
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    while service.status().stage != stage:
        now_s = drive(world, service, now_s, 1)
        assert now_s < 1300
    return now_s


def test_what_a_bad_update_cost_while_it_served_is_booked(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    now_s = until_stage(world, service, "verifying")
    world.rates[world.serving]["python"] = 0.05
    while service.status().stage in ("verifying", "settling"):
        now_s = drive(world, service, now_s, 1)
        assert now_s < 1500
    back = next(r for r in records(tmp_path) if r.stage == "rolled_back")
    assert "more per token" in back.reason and world.serving == "v1"
    assert service.status().balance.realised_s < 0


def test_a_roll_back_that_happened_but_did_not_answer_is_called_one(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    now_s = until_stage(world, service, "verifying")
    rollback = world.rollback

    def mute(decision_id: str, to_version: str) -> SwapReport:
        rollback(decision_id, to_version)
        raise TimeoutError

    world.rollback = mute  # type: ignore[method-assign]
    world.broken = True
    for step_s in range(now_s, now_s + 40):
        world.serve("python", float(step_s))
        world.serve("python", step_s + 0.5)
        service.step(step_s + 0.9)
    assert service.status().balance.rolled_back == 1
    assert world.calls.count("rollback") == 1


def test_a_roll_back_that_fails_is_not_tried_at_every_step(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    now_s = until_stage(world, service, "verifying")
    tried = []

    def fails(decision_id: str, to_version: str) -> SwapReport:
        tried.append(to_version)
        raise TimeoutError

    world.rollback = fails  # type: ignore[method-assign]
    world.broken = True
    first = 0
    for step_s in range(now_s, now_s + 60):
        world.serve("python", float(step_s))
        world.serve("python", step_s + 0.5)
        service.step(step_s + 0.9)
        first = first or (step_s if tried else 0)
    assert 2 <= len(tried) <= 2 + (now_s + 60 - first) // 10


def test_interrupted_updates_back_off_too(tmp_path: Path) -> None:
    state, ledger = BanditState(), Ledger(tmp_path / "ledger.jsonl")
    world = World(MemoryStream(MemoryLog(clock=lambda: 0.0)))
    recovery = Recovery(Journal(state, ledger, world, CONFIG))
    for number in range(2):
        record = LedgerRecord(decision_id=f"d{number:06d}", stage="probing", time_s=1.0, action="probe", arm="head")
        ledger.append(record)
        recovery.end(record, 10_000.0, "interrupted")
    assert state.policy.training.in_row == 2
    assert cooldown_left_s(HEAD, 10_000.0, state.policy, CONFIG, (), 0.8) == 240.0


def test_the_hourly_budget_survives_a_lost_snapshot(tmp_path: Path) -> None:
    world, service = shifted(tmp_path, steps=60)
    spent = service.state.policy.charges
    assert spent and sum(c.device_s for c in spent) == pytest.approx(service.status().balance.charged_s)
    service.close(1100.0)
    shutil.rmtree(tmp_path / "snapshots")
    again = BanditService(MemoryStream(world.stream._log), world, small_policy(), service_config(tmp_path))
    assert again.state.policy.charges == spent


def test_the_budget_counts_interference_before_as_it_does_after() -> None:
    config = replace(CONFIG, arms=(Arm(name="skip"), HEAD), cost=CostConfig(interference=20.0, prior_score_s=0.1))
    decision, _ = decide(CONTEXT, checked(), config)
    cost = decision.options[0].value.cost
    tight = replace(config, budget_device_s_per_hour=cost - 1.0)
    decision, _ = decide(CONTEXT, replace(checked(), charges=(Charge(9_999.0, 0.5),)), tight)
    assert "spent this hour" in decision.options[0].blocked


def test_two_conversations_that_agree_are_not_certainty() -> None:
    outcome = probed(0.1, se=0.0, conversations=2).probed
    assert outcome is not None
    gain = probed_gain(HEAD, outcome.targets[0], checked(), outcome, CONFIG)
    assert gain.sd > 0.005


def test_costs_of_nothing_are_no_saving() -> None:
    row = PairedReplay(
        conversation_id="a",
        domain="d",
        time_s=0.0,
        tokens=9,
        cycles_old=5,
        cycles_new=4,
        live_version="v1",
        live_cycles=5,
    )
    report = CompareReport(
        rows=(row, replace(row, conversation_id="b")), cycle_s_old=0.0, cycle_s_new=0.0, device_s=0.1
    )
    saving = pooled_saving(gate_rows(report))
    assert saving.relative == 0.0 and saving.domains[0].saving == 0.0


def test_every_decision_can_be_taken_again_from_the_ledger_alone(tmp_path: Path) -> None:
    shifted(tmp_path, steps=90)
    found = list(replay_decisions(records(tmp_path), small_policy()))
    kinds = {record.stage for record, _ in found}
    assert kinds == {"decided", "probed"}
    assert len(found) == sum(r.stage in kinds for r in records(tmp_path))
    for record, decision in found:
        assert (record.reason, record.options) == (decision.reason, decision.options)
        if record.stage == "decided":
            assert (record.action, record.arm, record.verdict) == (decision.action, decision.arm, decision.verdict)


def test_a_stage_that_decides_nothing_claims_no_inputs(tmp_path: Path) -> None:
    shifted(tmp_path, steps=40)
    for record in records(tmp_path):
        assert bool(record.inputs_sha256) == (record.stage in ("decided", "probed")) == (record.context is not None)


def test_the_logged_inputs_are_the_ones_that_were_hashed(tmp_path: Path) -> None:
    shifted(tmp_path, steps=40)
    first = records(tmp_path)[0]
    assert first.context is not None and first.policy_state is not None
    assert inputs_digest(first.context, first.policy_state, small_policy()) == first.inputs_sha256
