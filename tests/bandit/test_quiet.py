"""Few or no events of a domain: drafting may be off where it does not pay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from specblock.bandit.actions import CompareReport, Mix, WindowSummary
from specblock.bandit.context import build_context
from specblock.bandit.state import BanditState
from tests.bandit.test_acceptance import EVENT
from tests.bandit.test_context import CONFIG
from tests.bandit.test_service import drive, make, records
from tests.bandit.world import World


def quiet(world: World, count: int, now_s: float) -> None:
    """Conversations that were served without drafts: windows are kept, no event is sent."""
    for _ in range(count):
        append, sequence = world.stream.append, world.sequence
        world.stream.append = lambda fields: ""  # type: ignore[method-assign]
        world.serve("python", now_s)
        world.stream.append, world.sequence = append, sequence  # type: ignore[method-assign]


def test_the_gate_looks_once_more_at_its_deadline(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    while service.status().stage != "gating":
        now_s = drive(world, service, now_s, 1)
    quiet(world, 120, now_s + 1.0)
    service.step(now_s + 400.0)
    newest = records(tmp_path)[-1]
    assert newest.stage == "gated-1" and newest.numbers["conversations"] >= 12, newest.reason
    assert service.status().stage == "promoting", "a paid and better candidate is not thrown away unseen"


def test_a_look_replays_only_what_no_earlier_look_has_seen(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    while service.status().stage != "gating":
        now_s = drive(world, service, now_s, 1)
    pending = service.state.pending
    assert pending is not None
    looked: list[tuple[float, int]] = []
    compare = world.compare

    def watched(old: str, new: str, after_time_s: float | None, mix: Mix | None = None) -> CompareReport:
        assert after_time_s is not None
        report = compare(old, new, after_time_s, mix)
        # As good as the old version: the gate can neither pass nor fail it, and looks again.
        looked.append((after_time_s, len(report.rows)))
        return replace(report, rows=tuple(replace(row, cycles_new=row.cycles_old) for row in report.rows))

    world.compare = watched  # type: ignore[method-assign]
    while len(looked) < 3 and service.status().stage == "gating":
        now_s = drive(world, service, now_s, 1)
    assert len(looked) == 3
    starts = [start for start, _ in looked]
    assert starts[0] == pending.cutoff_s and starts == sorted(set(starts)), "each look begins where the last one ended"
    after = service.state.pending
    assert after is not None
    assert len({row.conversation_id for row in after.rows}) == len(after.rows) == sum(rows for _, rows in looked)


def test_an_undecided_last_look_ends_the_gate(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    now_s = drive(world, service, 1000, 30)
    world.shift("python", 0.4)
    while service.status().stage != "gating":
        now_s = drive(world, service, now_s, 1)
    quiet(world, 3, now_s + 1.0)
    service.step(now_s + 400.0)
    newest = records(tmp_path)[-1]
    assert newest.stage == "rejected" and "deadline" in newest.reason and service.state.pending is None


def test_no_domain_or_only_one_cycle_breaks_nothing() -> None:
    empty = build_context(BanditState(), WindowSummary(), "v1", 1000.0, CONFIG)
    assert empty.domains == () and empty.busy_devices == 0.0
    state = BanditState()
    one = replace(EVENT, sequence=0, time_s=1000.0, cycles=1, committed_tokens=1, accepted_histogram=(1,), draft_s=0.0)
    assert state.learn(replace(one, verify_s=0.0, other_s=0.0), CONFIG)
    (domain,) = build_context(state, WindowSummary(), "v1", 1000.0, CONFIG).domains
    assert not domain.measurable and domain.device_s_per_token == 0.0 and domain.share == 1.0
