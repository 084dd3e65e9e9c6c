"""What every stream must do: run on the in-memory twin by unit tests, on a real Redis by integration tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from specblock.bandit.stream_types import Stream


@dataclass(frozen=True)
class Bounds:
    max_entries: int = 10_000
    max_parked: int = 100
    claim_idle_s: float = 1000.0


@dataclass(frozen=True)
class Harness:
    """``open(consumer, bounds)`` is a new client of the same server; ``flush()`` empties the server."""

    open: Callable[[str, Bounds], Stream]
    flush: Callable[[], None]


def numbers(entries: list) -> list[int]:  # type: ignore[type-arg]
    return [int(entry.fields["n"]) for entry in entries]


class StreamContract:
    """Subclasses provide the ``harness`` fixture."""

    def test_entries_come_back_in_order_and_once(self, harness: Harness) -> None:
        writer, reader = harness.open("w", Bounds()), harness.open("b", Bounds())
        for n in range(7):
            writer.append({"n": str(n), "text": "häé\n{}"})
        first, second = reader.read(5, 0.0), reader.read(5, 0.0)
        assert numbers([*first, *second]) == list(range(7)) and len(first) == 5
        assert first[0].fields["text"] == "häé\n{}"
        assert reader.read(5, 0.0) == []
        assert len({entry.entry_id for entry in [*first, *second]}) == 7

    def test_an_idle_read_returns_after_its_wait(self, harness: Harness) -> None:
        assert harness.open("b", Bounds()).read(5, 0.05) == []

    def test_a_waiting_read_is_woken(self, harness: Harness) -> None:
        writer, reader = harness.open("w", Bounds()), harness.open("b", Bounds())
        assert reader.read(1, 0.0) == []
        thread = threading.Thread(target=writer.append, args=({"n": "1"},))
        thread.start()
        found: list[int] = []
        for _ in range(20):
            if found := numbers(reader.read(1, 1.0)):
                break
        thread.join()
        assert found == [1]

    def test_unacknowledged_entries_are_delivered_again_after_a_restart(self, harness: Harness) -> None:
        writer, reader = harness.open("w", Bounds()), harness.open("b", Bounds())
        for n in range(6):
            writer.append({"n": str(n)})
        entries = reader.read(6, 0.0)
        assert reader.ack([entries[0].entry_id, entries[3].entry_id]) == 2
        again = harness.open("b", Bounds())
        pages = [numbers(again.claim(3)), numbers(again.claim(3)), numbers(again.claim(3))]
        assert pages == [[1, 2, 4], [5], []]
        assert again.read(6, 0.0) == []

    def test_acknowledging_twice_is_harmless(self, harness: Harness) -> None:
        writer, reader = harness.open("w", Bounds()), harness.open("b", Bounds())
        writer.append({"n": "0"})
        (entry,) = reader.read(1, 0.0)
        assert (reader.ack([entry.entry_id]), reader.ack([entry.entry_id]), reader.ack([])) == (1, 0, 0)
        assert harness.open("b", Bounds()).claim(10) == []

    def test_entries_stranded_at_another_consumer_are_taken_over_once_idle(self, harness: Harness) -> None:
        writer, dead = harness.open("w", Bounds()), harness.open("dead", Bounds())
        for n in range(5):
            writer.append({"n": str(n)})
        dead.read(5, 0.0)
        assert harness.open("b", Bounds(claim_idle_s=1000.0)).claim(10) == []
        heir = harness.open("b", Bounds(claim_idle_s=0.0))
        found: list[int] = []
        for _ in range(4):
            found += numbers(heir.claim(2))
        assert sorted(set(found)) == [0, 1, 2, 3, 4]

    def test_unreadable_entries_are_parked_in_a_bounded_place(self, harness: Harness) -> None:
        bounds = Bounds(max_parked=3)
        writer, reader = harness.open("w", bounds), harness.open("b", bounds)
        for n in range(5):
            writer.append({"n": str(n)})
        for entry in reader.read(5, 0.0):
            reader.park(entry, "cannot read this")
        info = reader.info()
        assert (info.parked, info.pending) == (3, 0)
        assert harness.open("b", bounds).claim(10) == []

    def test_the_stream_is_bounded_and_trimmed_pending_entries_do_not_hurt(self, harness: Harness) -> None:
        bounds = Bounds(max_entries=100)
        writer, reader = harness.open("w", bounds), harness.open("b", bounds)
        writer.append({"n": "-1"})
        held = reader.read(1, 0.0)
        for n in range(1000):
            writer.append({"n": str(n)})
        assert 100 <= reader.info().length <= 200
        again = harness.open("b", bounds)
        for entry in again.claim(10):
            assert entry.entry_id == held[0].entry_id and entry.fields == {}
            again.ack([entry.entry_id])
        assert numbers(again.read(2000, 0.0))[-1] == 999

    def test_info_counts_what_is_there(self, harness: Harness) -> None:
        writer, reader = harness.open("w", Bounds()), harness.open("b", Bounds())
        reader.read(1, 0.0)
        for n in range(4):
            writer.append({"n": str(n)})
        entries = reader.read(3, 0.0)
        reader.ack([entries[0].entry_id])
        info = reader.info()
        assert (info.length, info.backlog, info.pending, info.parked) == (4, 1, 2, 0)

    def test_a_flushed_server_loses_entries_but_not_the_reader(self, harness: Harness) -> None:
        writer, reader = harness.open("w", Bounds()), harness.open("b", Bounds())
        writer.append({"n": "0"})
        reader.read(1, 0.0)
        harness.flush()
        assert reader.info().length == 0
        writer.append({"n": "1"})
        assert numbers(reader.read(5, 0.0)) == [1]
        assert reader.claim(5) == [] or reader.claim(5) == []
