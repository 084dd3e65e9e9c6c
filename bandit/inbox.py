"""Events from the stream into the state: claimed, read, decoded, learned once, acknowledged when told to."""

from __future__ import annotations

from specblock.bandit.config import PolicyConfig
from specblock.bandit.errors import StreamError
from specblock.bandit.events import EventError, decode
from specblock.bandit.state import BanditState
from specblock.bandit.status import LoopCounters
from specblock.bandit.stream_types import Stream, StreamEntry

CLAIM_EVERY_S = 5.0
"""How often entries that were delivered and lost (a broken connection, another consumer) are looked for."""


class Inbox:
    """The reader of the stream.

    ``unsaved`` says that events were learned since whoever saves the state last cleared it.

    Args:
        stream: of acceptance events.
        state: learns them.
        policy: how they are learned.
        counters: counts them.
        read_count: most entries of one read.
    """

    def __init__(
        self, stream: Stream, state: BanditState, policy: PolicyConfig, counters: LoopCounters, read_count: int
    ) -> None:
        self._stream, self._state, self._policy, self._counters = stream, state, policy, counters
        self._read_count = read_count
        self._unacked: list[str] = []
        self.unsaved = False
        self._claim_s = float("-inf")

    @property
    def waiting(self) -> bool:
        """Whether entries wait for their acknowledgement."""
        return bool(self._unacked)

    def take(self, now_s: float) -> None:
        """Learn whatever is there; never waits."""
        if now_s - self._claim_s >= CLAIM_EVERY_S:
            while batch := self._stream.claim(self._read_count):
                self._learn(batch)
            self._claim_s = now_s
        self._learn(self._stream.read(self._read_count, 0.0))

    def ack(self) -> None:
        """Acknowledge what was learned; only after the state that holds it is on disk."""
        acked, self._unacked = self._unacked, []
        try:
            self._stream.ack(acked)
        except StreamError:
            self._unacked = acked + self._unacked
            raise
        self._counters.acked += len(acked)

    def _learn(self, entries: list[StreamEntry]) -> None:
        for entry in entries:
            self._counters.read += 1
            if not entry.fields:
                self._unacked.append(entry.entry_id)
                continue
            try:
                event = decode(entry.fields)
            except EventError as error:
                self._stream.park(entry, str(error))
                self._counters.parked += 1
                continue
            fresh = self._state.learn(event, self._policy)
            self.unsaved = self.unsaved or fresh
            self._counters.learned += fresh
            self._counters.duplicates += not fresh
            self._unacked.append(entry.entry_id)
