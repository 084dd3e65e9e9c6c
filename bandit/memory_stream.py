"""The in-process twin of the Redis stream, for tests and for a daemon without Redis. Same semantics, one lock."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from specblock.bandit.stream_types import StreamEntry, StreamInfo


@dataclass(slots=True)
class _Pending:
    consumer: str
    delivered_s: float


@dataclass(slots=True)
class MemoryLog:
    """What a Redis server would hold: it outlives the readers. Ids are ``<n>-0`` with n = 1, 2, ...

    Attributes:
        clock: monotonic seconds; decides when a pending entry is stale.
    """

    clock: Callable[[], float]
    entries: OrderedDict[int, Mapping[str, str]] = field(default_factory=OrderedDict)
    parked: list[tuple[str, str]] = field(default_factory=list)
    pending: dict[int, _Pending] = field(default_factory=dict)
    appended: int = 0
    delivered: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)


class MemoryStream:
    """A reader and writer of a :class:`MemoryLog` under a consumer name.

    Args:
        log: shared storage.
        consumer: name of this reader.
        max_entries: oldest entries beyond this are dropped.
        max_parked: oldest parked entries beyond this are dropped.
        claim_idle_s: entries pending elsewhere for this long are taken over.
    """

    def __init__(
        self,
        log: MemoryLog,
        consumer: str = "bandit-0",
        *,
        max_entries: int = 100_000,
        max_parked: int = 1_000,
        claim_idle_s: float = 60.0,
    ) -> None:
        self._log = log
        self._consumer = consumer
        self._max_entries = max_entries
        self._max_parked = max_parked
        self._claim_idle_s = claim_idle_s
        self._own_after: int | None = 0
        self._idle_after = 0
        self._vanished = 0

    def append(self, fields: Mapping[str, str]) -> str:
        """Add an entry; see :class:`~specblock.bandit.stream_types.Stream`."""
        with self._log.changed:
            self._log.appended += 1
            self._log.entries[self._log.appended] = dict(fields)
            while len(self._log.entries) > self._max_entries:
                self._log.entries.popitem(last=False)
            self._log.changed.notify_all()
            return f"{self._log.appended}-0"

    def read(self, count: int, block_s: float) -> list[StreamEntry]:
        """New entries for this consumer."""
        with self._log.changed:
            if block_s > 0:
                self._log.changed.wait_for(lambda: self._log.delivered < self._log.appended, timeout=block_s)
            fresh = [number for number in self._log.entries if number > self._log.delivered][:count]
            for number in fresh:
                self._log.pending[number] = _Pending(self._consumer, self._log.clock())
                self._log.delivered = number
            return [StreamEntry(f"{number}-0", self._log.entries[number]) for number in fresh]

    def claim(self, count: int) -> list[StreamEntry]:
        """Own pending entries first, then entries idle at other consumers."""
        with self._log.changed:
            if self._own_after is not None:
                own = [n for n in self._sorted_pending(self._own_after) if self._owner(n) == self._consumer][:count]
                self._own_after = own[-1] if own else None
                if own:
                    return self._deliver(own)
            oldest_s = self._log.clock() - self._claim_idle_s
            idle = [n for n in self._sorted_pending(self._idle_after) if self._log.pending[n].delivered_s <= oldest_s]
            self._idle_after = idle[count - 1] if len(idle) > count else 0
            return self._deliver([n for n in idle if self._owner(n) != self._consumer][:count])

    def ack(self, entry_ids: Sequence[str]) -> int:
        """Forget pending entries."""
        with self._log.changed:
            return sum(self._log.pending.pop(_number(entry_id), None) is not None for entry_id in entry_ids)

    def park(self, entry: StreamEntry, error: str) -> None:
        """Keep an unreadable entry aside."""
        with self._log.changed:
            self._log.parked.append((entry.entry_id, error))
            del self._log.parked[: -self._max_parked]
            self._log.pending.pop(_number(entry.entry_id), None)

    def info(self) -> StreamInfo:
        """Depth of the log."""
        with self._log.changed:
            return StreamInfo(
                length=len(self._log.entries),
                backlog=sum(number > self._log.delivered for number in self._log.entries),
                pending=len(self._log.pending),
                parked=len(self._log.parked),
                vanished=self._vanished,
            )

    def close(self) -> None:
        """Nothing is held."""

    def _owner(self, number: int) -> str:
        return self._log.pending[number].consumer

    def _sorted_pending(self, after: int) -> list[int]:
        return sorted(number for number in self._log.pending if number > after)

    def _deliver(self, numbers: list[int]) -> list[StreamEntry]:
        found = []
        for number in numbers:
            self._log.pending[number] = _Pending(self._consumer, self._log.clock())
            self._vanished += number not in self._log.entries
            found.append(StreamEntry(f"{number}-0", self._log.entries.get(number, {})))
        return found


def _number(entry_id: str) -> int:
    return int(entry_id.split("-")[0])
