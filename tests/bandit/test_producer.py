"""The producer never makes its caller wait and never repeats a write of unknown outcome."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from specblock.bandit.errors import StreamError
from specblock.bandit.events import decode
from specblock.bandit.memory_stream import MemoryLog, MemoryStream
from specblock.bandit.producer import EventProducer
from tests.bandit.test_acceptance import EVENT


class GatedStream(MemoryStream):
    """Appends only while the gate is open; ``fails`` are raised first, in order."""

    def __init__(self, fails: tuple[StreamError, ...] = ()) -> None:
        super().__init__(MemoryLog(clock=lambda: 0.0))
        self.gate, self.entered, self.fails = threading.Event(), threading.Event(), list(fails)

    def append(self, fields: Mapping[str, str]) -> str:
        self.entered.set()
        assert self.gate.wait(30)
        if self.fails:
            raise self.fails.pop(0)
        return super().append(fields)


def sequences(stream: MemoryStream) -> list[int]:
    return [decode(entry.fields).sequence for entry in stream.read(1000, 0.0)]


def make(stream: GatedStream, **options: float) -> EventProducer:
    producer = EventProducer(stream, "e0-life1", retry_s=0.001, max_retry_s=0.002, **options)  # type: ignore[arg-type]
    producer.start()
    return producer


def test_events_are_stamped_and_sent_in_order() -> None:
    stream = GatedStream()
    producer = make(stream)
    stream.gate.set()
    for _ in range(50):
        producer.offer(EVENT)
    stats = producer.close(30.0)
    events = [decode(entry.fields) for entry in stream.read(1000, 0.0)]
    assert [event.sequence for event in events] == list(range(50))
    assert {event.incarnation for event in events} == {"e0-life1"}
    assert (stats.offered, stats.sent, stats.dropped, stats.lost, stats.queued, stats.in_flight) == (50, 50, 0, 0, 0, 0)


def test_a_stuck_stream_never_blocks_offer_and_the_oldest_are_dropped() -> None:
    stream = GatedStream()
    producer = make(stream, capacity=10)
    producer.offer(EVENT)
    assert stream.entered.wait(30)
    for _ in range(100):
        producer.offer(EVENT)
    stats = producer.stats()
    assert (stats.in_flight, stats.queued, stats.dropped) == (1, 10, 90)
    stream.gate.set()
    producer.close(30.0)
    assert sequences(stream) == [0, *range(91, 101)], "the reader sees the gap"


@pytest.mark.parametrize(
    ("error", "arrived", "lost"),
    [
        (StreamError("connection reset"), [1, 2], 1),
        (StreamError("replica", not_applied=True), [0, 1, 2], 0),
    ],
)
def test_only_a_refused_write_is_repeated(error: StreamError, arrived: list[int], lost: int) -> None:
    stream = GatedStream((error,))
    producer = make(stream)
    for _ in range(3):
        producer.offer(EVENT)
    stream.gate.set()
    stats = producer.close(30.0)
    assert sequences(stream) == arrived
    assert (stats.sent, stats.lost, stats.dropped) == (len(arrived), lost, 0)


def test_close_gives_up_at_its_deadline_and_counts_what_was_left() -> None:
    stream = GatedStream()
    producer = make(stream)
    for _ in range(5):
        producer.offer(EVENT)
    assert stream.entered.wait(30)
    stats = producer.close(0.01)
    assert stats.dropped == 4 and stats.queued == 0 and stats.in_flight == 1
    stream.gate.set()


def test_a_server_that_always_refuses_drops_at_close_and_the_thread_ends() -> None:
    class Refusing(GatedStream):
        def append(self, fields: Mapping[str, str]) -> str:
            self.entered.set()
            raise StreamError("out of memory", not_applied=True)

    stream = Refusing()
    producer = make(stream, capacity=4)
    for _ in range(9):
        producer.offer(EVENT)
    assert stream.entered.wait(30)
    stats = producer.close(0.05)
    until(lambda: producer.stats().in_flight == 0)
    final = producer.stats()
    assert stats.sent == 0 and final.offered == final.sent + final.dropped + final.lost + final.queued == 9


def until(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(3000):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("the condition did not come true")


def test_a_capacity_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity"):
        EventProducer(GatedStream(), "x", capacity=0)


def test_an_event_that_cannot_be_encoded_is_counted_and_the_next_ones_are_sent() -> None:
    stream = GatedStream()
    producer = make(stream)
    stream.gate.set()
    producer.offer(replace(EVENT, cycles=np.int64(10)))  # type: ignore[arg-type]
    producer.offer(replace(EVENT, draft_s=float("nan")))
    producer.offer(EVENT)
    stats = producer.close(5.0)
    assert (stats.sent, stats.lost, stats.in_flight) == (1, 2, 0)
