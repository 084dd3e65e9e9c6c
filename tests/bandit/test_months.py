"""What months of running bring: bad clocks, full disks, new domains, bugs. None may stop the loop or grow for ever."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specblock.bandit.acceptance import OTHER
from specblock.bandit.codec import dumps, loads
from specblock.bandit.config import PolicyConfig, StatisticsConfig, StreamConfig
from specblock.bandit.errors import StreamError
from specblock.bandit.events import decode, encode
from specblock.bandit.state import BanditState
from specblock.bandit.stream import RedisStream
from specblock.bandit.stream_types import StreamEntry
from tests.bandit.test_acceptance import EVENT
from tests.bandit.test_service import drive, make, records


def test_one_event_from_a_clock_that_is_years_ahead_does_not_hide_all_later_traffic(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    drive(world, service, 1000, 10)
    world.serve("python", 9e9)
    drive(world, service, 1010, 20)
    context = records(tmp_path)[-1].context
    assert context is not None and context.busy_devices > 0.1


def test_a_clock_that_jumps_back_does_not_stop_snapshots_and_decisions(tmp_path: Path) -> None:
    world, service = make(tmp_path)
    drive(world, service, 900_000, 10)
    before = len(records(tmp_path))
    for i in range(8):
        world.serve("python", 1000.0 + i)
        assert service.step(1001.0 + i).acked == 1
    assert len(records(tmp_path)) > before


def test_a_domain_that_is_silent_for_long_makes_room_for_a_new_one() -> None:
    config = PolicyConfig(statistics=StatisticsConfig(max_domains=3))
    state = BanditState()

    def learn(domain: str, time_s: float) -> None:
        assert state.learn(replace(EVENT, sequence=state.learned, domain=domain, time_s=time_s), config)

    learn("a", 1000.0)
    learn("b", 2000.0)
    state.domains["a"].changes = 3
    learn("c", 3000.0)
    assert set(state.domains) == {"a", "b", OTHER}, "a burst of names does not push out those in use"
    learn("b", 90_000.0)
    learn("c", 90_001.0)
    assert set(state.domains) == {"b", "c", OTHER}
    assert state.changes == 3, "changes that were seen stay counted"


def test_redelivered_entries_wait_once_for_their_acknowledgement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, service = make(tmp_path)

    def full(text: str) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(service._snapshots, "save", full)
    for i in range(5):
        world.serve("python", 1000.0 + i)
    service.step(1010.0)
    entries = [StreamEntry(f"{n}-0", fields) for n, fields in world.stream._log.entries.items()]
    pages = [entries, [], entries, []]
    monkeypatch.setattr(world.stream, "claim", lambda count: pages.pop(0))
    service.step(1020.0)
    service.step(1030.0)
    monkeypatch.undo()
    assert service.step(1040.0).acked == 5


def test_what_was_learned_before_the_stream_broke_is_saved_before_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, service = make(tmp_path)
    world.serve("python", 1000.0)
    world.stream.append({"nonsense": "1"})

    def refuse(entry: StreamEntry, error: str) -> None:
        raise StreamError("out of memory")

    monkeypatch.setattr(world.stream, "park", refuse)
    with pytest.raises(StreamError):
        service.step(1001.0)
    assert service.step(1002.0).acked == 1
    newest = service._snapshots.load()
    assert newest is not None and json.loads(newest.text)["learned"] == 1


def test_a_state_that_could_not_be_saved_is_saved_without_waiting_for_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, service = make(tmp_path)
    drive(world, service, 1000, 3)
    save, failed = service._snapshots.save, []

    def full(text: str) -> Path:
        failed.append(text)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(service._snapshots, "save", full)
    service.decide_now()
    service.step(1010.0)
    assert failed
    monkeypatch.setattr(service._snapshots, "save", save)
    service.step(1020.0)
    newest = service._snapshots.load()
    assert newest is not None and newest.text == dumps(service.state)


def test_a_bug_in_one_step_does_not_end_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, service = make(tmp_path)
    read, stop, calls = world.stream.read, threading.Event(), []

    def faulty(count: int, block_s: float) -> list[StreamEntry]:
        calls.append(count)
        if len(calls) == 1:
            raise ZeroDivisionError
        stop.set()
        return read(count, block_s)

    monkeypatch.setattr(world.stream, "read", faulty)
    service.run(stop, lambda: 1000.0)
    assert len(calls) == 2 and service.counters.step_errors == 1


def test_a_round_over_idle_entries_ends_even_if_they_are_idle_again_at_once() -> None:
    class Server:
        def xgroup_create(self, *args: Any, **kwargs: Any) -> None:
            return

        def xreadgroup(self, *args: Any, **kwargs: Any) -> list[Any]:
            return []

        def xautoclaim(self, *args: Any, **kwargs: Any) -> list[Any]:
            return ["0-0", [("1-0", {"n": "1"})], []]

    stream = RedisStream(StreamConfig(url="redis://nowhere", claim_idle_s=0.0), lambda seconds: None)
    stream._client = Server()
    assert [len(stream.claim(10)) for _ in range(4)] == [1, 0, 1, 0]


def test_events_without_ranks_are_learned() -> None:
    event = decode(encode(replace(EVENT, rank_histogram=(0, 0, 0, 0))))
    state = BanditState()
    assert state.learn(event, PolicyConfig())
    assert state.domains["default"].versions["v1"].ranks == [0.0] * 4
    assert loads(BanditState, dumps(state)) == state


def test_a_snapshot_from_before_a_field_existed_is_read() -> None:
    state = BanditState()
    state.learn(EVENT, PolicyConfig())
    plain = json.loads(dumps(state))
    for name in ("accrual", "flagged", "paused", "retired_changes"):
        del plain[name]
    assert loads(BanditState, json.dumps(plain)) == state
