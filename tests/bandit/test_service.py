"""The loop against a small world: what it learns, decides, does and writes down."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from specblock.bandit.codec import dumps
from specblock.bandit.config import Arm, CostConfig, PolicyConfig
from specblock.bandit.events import encode
from specblock.bandit.explain import explain
from specblock.bandit.ledger import LedgerRecord, read_ledger
from specblock.bandit.memory_stream import MemoryLog, MemoryStream
from specblock.bandit.service import BanditService
from tests.bandit.world import DEAR_S, World, service_config, small_policy


def make(tmp_path: Path, policy: PolicyConfig | None = None) -> tuple[World, BanditService]:
    stream = MemoryStream(MemoryLog(clock=lambda: 0.0))
    world = World(stream)
    return world, BanditService(stream, world, policy or small_policy(), service_config(tmp_path))


def drive(world: World, service: BanditService, start_s: int, steps: int, domain: str = "python") -> int:
    """Two requests a second; returns the time afterwards."""
    for now_s in range(start_s, start_s + steps):
        world.serve(domain, float(now_s))
        world.serve(domain, now_s + 0.5)
        assert service.step(now_s + 0.9).error == ""
    return start_s + steps


def records(tmp_path: Path) -> list[LedgerRecord]:
    return list(read_ledger(tmp_path / "ledger.jsonl"))


def stages(tmp_path: Path, decision_id: str) -> list[str]:
    return [r.stage for r in records(tmp_path) if r.decision_id == decision_id]


def shifted(tmp_path: Path, policy: PolicyConfig | None = None, steps: int = 90) -> tuple[World, BanditService]:
    """Good traffic, then a shift that halves the hit rate."""
    world, service = make(tmp_path, policy)
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    drive(world, service, now_s, steps)
    return world, service


def test_drift_is_probed_trained_gated_promoted_and_its_gain_realised(tmp_path: Path) -> None:
    world, service = shifted(tmp_path)
    probes = [r for r in records(tmp_path) if r.stage == "decided" and r.action == "probe"]
    first = stages(tmp_path, probes[0].decision_id)
    assert probes[0].verdict == "drift"
    gates = [s for s in first if s.startswith("gat")]
    assert gates[-1].startswith("gated-")
    assert [s for s in first if not s.startswith("gat") and s != "closed"] == [
        *("decided", "probing", "scoring", "probed", "training", "trained"),
        *("promoting", "promoted", "verifying", "verified", "settling", "settled"),
    ]
    settled = next(r for r in records(tmp_path) if r.stage == "settled")
    assert settled.numbers["saving"] > 0.1
    assert settled.numbers["realised_s"] > 0
    assert world.serving != "v1"
    balance = service.status().balance
    assert balance.promoted >= 1 and balance.realised_s > balance.charged_s > 0 and balance.predicted_s > 0
    assert service.status().accrued_s > 0, "the settled version goes on saving"


def test_parity_is_checked_before_anything_is_trained(tmp_path: Path) -> None:
    world, _ = shifted(tmp_path)
    assert "parity" in world.calls[: world.calls.index("train head 0.1")]


def test_nothing_is_trained_while_acceptance_is_at_its_reference(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    drive(world, service, 1000, 60)
    assert not [call for call in world.calls if call.startswith("train")]
    skips = [r for r in records(tmp_path) if r.action == "skip"]
    assert skips[-1].verdict == "none" and "at its reference" in skips[-1].reason


def test_absurd_costs_are_skipped_and_the_ledger_says_why(tmp_path: Path) -> None:
    arms = (
        Arm(name="skip"),
        Arm(name="head", patterns=("*",), steps=20, learning_rate=1e-3, prior_s_per_position=50.0),
    )
    world, _ = shifted(tmp_path, small_policy(arms=arms, budget_device_s_per_hour=1e9), steps=30)
    assert not [call for call in world.calls if call.startswith("train")]
    last = next(r for r in reversed(records(tmp_path)) if r.action == "skip" and r.verdict == "drift")
    words = explain(last)
    assert "No update" in words and "below its reference" in words and "net value may be as low as" in words
    assert last.options[0].value.cost > last.options[0].value.benefit


def test_a_spent_budget_blocks_training(tmp_path: Path) -> None:
    world, _ = shifted(tmp_path, small_policy(budget_device_s_per_hour=0.01), steps=30)
    assert not [call for call in world.calls if call.startswith("train")]
    assert any("spent this hour" in r.reason for r in records(tmp_path))


def test_a_fault_trains_nothing_until_parity_holds_again(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    now_s = drive(world, service, 1000, 30)
    world.broken = True
    now_s = drive(world, service, now_s, 40)
    assert not [call for call in world.calls if call.startswith("train")]
    fault = next(r for r in records(tmp_path) if r.verdict == "fault")
    assert fault.action == "skip" and "exact replay" in fault.reason
    assert explain(fault).startswith(f"{fault.decision_id}: Fault, nothing is trained")
    assert service.status().parity is not None and service.status().parity.verdict == "broken"
    world.broken = False
    world.conversations = []
    drive(world, service, now_s, 40)
    assert service.status().parity.verdict == "ok"
    assert records(tmp_path)[-1].verdict != "fault"


def test_a_useless_update_is_abandoned_after_its_trial(tmp_path: Path) -> None:
    plain = small_policy()
    # Only a trial that shows much of what is to come can say that what is left to train does not pay.
    telling = replace(plain.arm("head"), probe_gain_share=0.8, probe_gain_share_sd=0.05, prior_s_per_position=DEAR_S)
    world, service = make(tmp_path, replace(plain, arms=(plain.arm("skip"), telling)))
    world.recovers["head"], world.s_per_position = 0.0, DEAR_S
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    drive(world, service, now_s, 40)
    ended = [r for r in records(tmp_path) if r.stage == "abandoned"]
    assert ended and world.discarded[0] == ended[0].candidate_version
    assert "train head 1" not in world.calls, "the rest was never paid"
    assert world.serving == "v1" and service.state.policy.training.in_row >= 1


def test_a_candidate_that_does_not_hold_up_is_gated_out(tmp_path: Path) -> None:
    world, service = make(tmp_path, small_policy())
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    while service.status().stage != "gating":
        now_s = drive(world, service, now_s, 1)
        assert now_s < 1200
    candidate = service.status().candidate_version
    world.rates[candidate]["python"] = 0.2
    while service.status().stage == "gating":
        now_s = drive(world, service, now_s, 1)
        assert now_s < 1400
    rejected = next(r for r in records(tmp_path) if r.stage == "rejected")
    assert rejected.candidate_version == candidate and world.serving == "v1"
    assert "gated out" in explain(rejected)


def test_a_promotion_that_loses_live_is_rolled_back(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    while service.status().stage != "verifying":
        now_s = drive(world, service, now_s, 1)
        assert now_s < 1300
    world.broken = True
    while service.status().stage in ("verifying", "settling"):
        now_s = drive(world, service, now_s, 1)
        assert now_s < 1500
    assert world.serving == "v1"
    back = next(r for r in records(tmp_path) if r.stage == "rolled_back")
    assert "broken" in back.reason and service.status().balance.rolled_back == 1


def test_a_gate_without_conversations_ends_at_the_deadline(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    while service.status().stage != "gating":
        now_s = drive(world, service, now_s, 1)
    service.step(now_s + 10_000.0)
    assert records(tmp_path)[-1].stage == "rejected" and "deadline" in records(tmp_path)[-1].reason


def test_a_failing_action_is_charged_and_settled_and_serving_goes_on(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    world.recovers.clear()
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    for step_s in range(now_s, now_s + 20):
        world.serve("python", float(step_s))
        world.serve("python", step_s + 0.5)
        service.step(step_s + 0.9)
    ended = next(r for r in records(tmp_path) if r.stage == "abandoned")
    assert "KeyError" in ended.reason and ended.charged_s > 0
    assert service.state.pending is None and service.counters.learned == 100


def test_pause_goes_on_learning_and_survives_a_restart(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    service.pause()
    drive(world, service, 1000, 20)
    assert service.status().stage == "paused" and service.status().learned == 40
    assert records(tmp_path) == []
    service.close(1020.0)
    again = BanditService(MemoryStream(world.stream._log), world, small_policy(), service_config(tmp_path))
    assert again.status().stage == "paused" and again.status().learned == 40
    again.resume()
    drive(world, again, 1021, 4)
    assert records(tmp_path)


def test_decide_now_does_not_wait_for_the_pace(tmp_path: Path) -> None:
    stream = MemoryStream(MemoryLog(clock=lambda: 0.0))
    world = World(stream)
    service = BanditService(stream, world, small_policy(), service_config(tmp_path, decide_every_s=500.0))
    drive(world, service, 1000, 3)
    assert len(records(tmp_path)) == 1, "the first decision needs no wait"
    drive(world, service, 1003, 3)
    assert len(records(tmp_path)) == 1
    service.decide_now()
    service.step(1007.0)
    assert records(tmp_path)[-1].time_s == 1007.0


def test_unreadable_entries_are_parked_and_the_rest_is_learned(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    world.stream.append({"v": "99", "type": "acceptance"})
    world.serve("python", 1000.0)
    world.stream.append({"nonsense": "1"})
    report = service.step(1001.0)
    assert (report.read, report.learned, report.parked) == (3, 1, 2)
    assert world.stream.info().pending == 0 and world.stream.info().parked == 2


def test_events_are_acknowledged_only_after_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, service = make(tmp_path)

    def full(text: str) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(service._snapshots, "save", full)
    world.serve("python", 1000.0)
    assert service.step(1001.0).acked == 0
    assert world.stream.info().pending == 1 and service.counters.snapshot_errors == 1
    monkeypatch.undo()
    assert service.step(1002.0).acked == 1
    assert world.stream.info().pending == 0


def test_duplicates_and_interleaving_of_domains_do_not_matter(tmp_path: Path) -> None:
    source = World(MemoryStream(MemoryLog(clock=lambda: 0.0)))
    events = [source.serve("python" if i % 3 else "manual", 1000.0 + i) for i in range(120)]
    python = [e for e in events if e.domain == "python"]
    manual = [e for e in events if e.domain == "manual"]
    states = []
    for name, order in (
        ("plain", events),
        ("by domain", [*manual, *python]),
        ("doubled", [e for pair in zip(events, events, strict=True) for e in pair]),
    ):
        stream = MemoryStream(MemoryLog(clock=lambda: 0.0))
        service = BanditService(stream, source, small_policy(), service_config(tmp_path / name))
        service.pause()
        for event in order:
            stream.append(encode(event))
        service.step(2000.0)
        states.append(dumps(service.state))
        assert service.counters.duplicates == len(order) - len(events)
    assert states[0] == states[1] == states[2]


def test_the_same_inputs_give_the_same_ledger_bit_for_bit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shifted(tmp_path / name, steps=50)
    a, b = ((tmp_path / name / "ledger.jsonl").read_bytes() for name in ("a", "b"))
    assert a == b and a.count(b"\n") > 10


def test_run_stops_on_request_and_leaves_nothing_unacknowledged(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    for i in range(20):
        world.serve("python", 1000.0 + i)
    stop = threading.Event()
    learned = threading.Event()
    times = iter(range(1020, 10_000_000))

    def clock() -> float:
        if service.counters.learned == 20:
            learned.set()
        return float(next(times))

    thread = threading.Thread(target=service.run, args=(stop, clock))
    thread.start()
    assert learned.wait(30)
    stop.set()
    thread.join(30)
    assert not thread.is_alive() and world.stream.info().pending == 0


def test_an_operator_who_changes_the_version_supersedes_the_update(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    while service.status().stage != "gating":
        now_s = drive(world, service, now_s, 1)
    world.rates["v0"] = dict(world.rates["v1"])
    world.serving = "v0"
    drive(world, service, now_s, 1)
    assert any(r.stage == "abandoned" and "superseded" in r.reason for r in records(tmp_path))
    assert world.serving == "v0", "what the operator chose stays"


def test_a_changed_mix_of_sampling_is_not_called_drift(tmp_path: Path) -> None:
    world, service = make(tmp_path, small_policy(cost=CostConfig(prior_score_s=1.0)))
    now_s = 1000
    for step_s in range(now_s, now_s + 60):
        hot = step_s % 4 == 0 if step_s < now_s + 40 else step_s % 4 != 0
        world.rates["v1"]["python"] = 0.5 if hot else 0.85
        world.serve("python", float(step_s), sampling_class="t1.0" if hot else "greedy")
        world.conversations.clear()
        world.serve("python", step_s + 0.5, sampling_class="t1.0" if hot else "greedy")
        service.step(step_s + 0.9)
    last = records(tmp_path)[-1]
    assert last.verdict == "load_or_sampling" and "mix changed" in last.reason


@pytest.mark.parametrize("stage", ["trained", "promoted", "gated-1"])
def test_a_ledger_that_cannot_be_written_after_an_action_ends_the_update(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, service = make(tmp_path)
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    append, refused = service._ledger.append, []

    def full(record: LedgerRecord, *, durable: bool = True) -> None:
        if record.stage == stage and not refused:
            refused.append(record.decision_id)
            raise OSError(28, "No space left on device")
        append(record, durable=durable)

    monkeypatch.setattr(service._ledger, "append", full)
    failures = 0
    for step_s in range(now_s, now_s + 40):
        world.serve("python", float(step_s))
        world.serve("python", step_s + 0.5)
        try:
            service.step(step_s + 0.9)
        except OSError:
            failures += 1
    assert failures == 1
    ended = [r for r in records(tmp_path) if r.decision_id == refused[0]][-1]
    assert ended.stage == ("rolled_back" if stage == "promoted" else "abandoned") and "interrupted" in ended.reason
    assert service.state.pending is None or service.state.pending.decision_id != refused[0]


def test_an_update_whose_arm_was_removed_from_the_configuration_ends(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    while service.status().stage != "gating":
        now_s = drive(world, service, now_s, 1)
    service.close(float(now_s))
    arms = (Arm(name="skip"), Arm(name="other", patterns=("*",), steps=1, learning_rate=0.1))
    stream = MemoryStream(world.stream._log)
    again = BanditService(stream, world, small_policy(arms=arms), service_config(tmp_path))
    again.step(now_s + 1.0)
    assert "no longer configured" in records(tmp_path)[-1].reason and again.status().stage == "idle"
