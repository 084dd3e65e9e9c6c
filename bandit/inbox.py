"""Events from the stream into the state: claimed, read, decoded, learned once, acknowledged when told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from specblock.bandit.clock import is_due
from specblock.bandit.config import PolicyConfig
from specblock.bandit.events import AcceptanceEvent, EventError, decode
from specblock.bandit.state import BanditState
from specblock.bandit.status import LoopCounters
from specblock.bandit.stream_types import Stream, StreamEntry

CLAIM_EVERY_S = 5.0
"""How often entries that were delivered and lost (a broken connection, another consumer) are looked for."""

MAX_UNACKED = 100_000
"""Entries that may wait for a disk that refuses snapshots; beyond, the (bounded) stream keeps them."""


def read_entry(entry: StreamEntry) -> AcceptanceEvent:
    """The event of a stream entry.

    Raises:
        EventError: naming what is wrong.
    """
    return decode(entry.fields)


class Inbox:
    """The reader of the stream.

    ``unsaved`` says that events were learned since whoever saves the state last cleared it.

    Args:
        stream: of acceptance events.
        state: learns them.
        policy: how they are learned.
        counters: counts them.
        read_count: most entries of one read.
        understand: the event of an entry.
    """

    def __init__(
        self,
        stream: Stream,
        state: BanditState,
        policy: PolicyConfig,
        counters: LoopCounters,
        read_count: int,
        understand: Callable[[StreamEntry], AcceptanceEvent],
    ) -> None:
        self._stream, self._state, self._policy, self._counters = stream, state, policy, counters
        self._read_count, self._understand = read_count, understand
        self._unacked: dict[str, None] = {}
        self.unsaved = False
        self._claim_s = float("-inf")

    @property
    def waiting(self) -> bool:
        """Whether entries wait for their acknowledgement."""
        return bool(self._unacked)

    def take(self, now_s: float) -> None:
        """Learn whatever is there; never waits."""
        if len(self._unacked) >= MAX_UNACKED:
            return
        if is_due(now_s, self._claim_s, CLAIM_EVERY_S):
            while batch := self._stream.claim(self._read_count):
                self._learn(batch, now_s)
            self._claim_s = now_s
        self._learn(self._stream.read(self._read_count, 0.0), now_s)

    def ack(self) -> None:
        """Acknowledge what was learned; only after the state that holds it is on disk."""
        self._stream.ack(list(self._unacked))
        self._counters.acked += len(self._unacked)
        self._unacked = {}

    def _learn(self, entries: list[StreamEntry], now_s: float) -> None:
        for entry in entries:
            self._counters.read += 1
            if not entry.fields:
                self._unacked[entry.entry_id] = None
                continue
            try:
                event = self._understand(entry)
            except EventError as error:
                self._stream.park(entry, str(error))
                self._counters.parked += 1
                continue
            # A producer's clock that is ahead would make everything after it look old, for ever.
            if event.time_s > now_s:
                event = replace(event, time_s=now_s)
            fresh = self._state.learn(event, self._policy)
            self.unsaved = self.unsaved or fresh
            self._counters.learned += fresh
            self._counters.duplicates += not fresh
            self._unacked[entry.entry_id] = None
