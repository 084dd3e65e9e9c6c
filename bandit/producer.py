"""The engine's side of the stream: a bounded queue and one background thread. The decode loop never waits on it."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace

from specblock.bandit.errors import StreamError
from specblock.bandit.events import AcceptanceEvent, encode
from specblock.bandit.stream_types import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class ProducerStats:
    """Counts since start; ``offered == sent + dropped + lost + queued + in_flight``.

    Attributes:
        offered: events handed over.
        sent: confirmed by the stream.
        dropped: oldest events thrown away because the queue was full, and those left at close.
        lost: appends whose outcome is unknown, and events that cannot be encoded; never repeated, a gap to the reader.
        queued: waiting now.
        in_flight: being appended now (0 or 1).
    """

    offered: int
    sent: int
    dropped: int
    lost: int
    queued: int
    in_flight: int


class EventProducer:
    """Stamps events with (incarnation, sequence) and appends them from a background thread.

    Args:
        stream: destination; used by the background thread only.
        incarnation: unique per start of the producing process.
        capacity: events kept while the stream is away.
        retry_s: pause after a failed append; doubles up to ``max_retry_s``.
        max_retry_s: longest pause.
    """

    def __init__(
        self, stream: Stream, incarnation: str, *, capacity: int = 4096, retry_s: float = 0.05, max_retry_s: float = 2.0
    ) -> None:
        if capacity < 1:
            raise ValueError("capacity: must be >= 1")
        self._stream = stream
        self._incarnation = incarnation
        self._capacity = capacity
        self._retry_s, self._max_retry_s = retry_s, max_retry_s
        self._queue: deque[AcceptanceEvent] = deque()
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._sequence = 0
        self._sent = self._dropped = self._lost = self._in_flight = 0
        self._thread = threading.Thread(target=self._run, name="bandit-producer", daemon=True)

    def start(self) -> None:
        """Start the background thread."""
        self._thread.start()

    def offer(self, event: AcceptanceEvent) -> None:
        """Queue ``event`` under the next sequence number; what it carried in their place is replaced. Never waits."""
        with self._changed:
            self._queue.append(replace(event, incarnation=self._incarnation, sequence=self._sequence))
            self._sequence += 1
            self._trim()
            self._changed.notify()

    def close(self, deadline_s: float) -> ProducerStats:
        """Send what is queued for at most ``deadline_s``, then stop; what is left counts as dropped."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and not self._in_flight, timeout=deadline_s)
            self._stop.set()
            self._dropped += len(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=deadline_s)
        return self.stats()

    def stats(self) -> ProducerStats:
        """Counts since start."""
        with self._changed:
            return ProducerStats(
                offered=self._sequence,
                sent=self._sent,
                dropped=self._dropped,
                lost=self._lost,
                queued=len(self._queue),
                in_flight=self._in_flight,
            )

    def _trim(self) -> None:
        while len(self._queue) > self._capacity:
            self._queue.popleft()
            self._dropped += 1

    def _run(self) -> None:
        pause_s = self._retry_s
        while (event := self._take()) is not None:
            try:
                self._stream.append(encode(event))
            except (ValueError, TypeError):
                # Not a number, a foreign type, or text that is not Unicode: never writable, so never repeated.
                self._done(lost=1)
            except StreamError as error:
                self._failed(event, error)
                self._stop.wait(pause_s)
                pause_s = min(2 * pause_s, self._max_retry_s)
            else:
                pause_s = self._retry_s
                self._done(sent=1)

    def _take(self) -> AcceptanceEvent | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._stop.is_set())
            if self._stop.is_set():
                return None
            self._in_flight = 1
            return self._queue.popleft()

    def _failed(self, event: AcceptanceEvent, error: StreamError) -> None:
        """Put an event back only when the server said that it was not written."""
        if not error.not_applied:
            self._done(lost=1)
            return
        with self._changed:
            self._in_flight = 0
            if self._stop.is_set():
                self._dropped += 1
            else:
                self._queue.appendleft(event)
                self._trim()
            self._changed.notify_all()

    def _done(self, *, sent: int = 0, lost: int = 0) -> None:
        with self._changed:
            self._in_flight = 0
            self._sent += sent
            self._lost += lost
            self._changed.notify_all()
