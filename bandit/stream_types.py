"""The seam between the bandit and its event transport: one interface, two implementations, one contract test suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

PARKED_SUFFIX = ":parked"


@dataclass(frozen=True, slots=True)
class StreamEntry:
    """One entry. ``fields`` is empty when the entry was trimmed away while it was pending."""

    entry_id: str
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamInfo:
    """Depth and health of a stream as its reader sees it.

    Attributes:
        length: entries stored.
        backlog: entries not yet delivered to the group.
        pending: entries delivered and not acknowledged.
        parked: unreadable entries kept aside.
        reconnects: connections lost and tried again.
        groups_recreated: times the group had vanished (flush, failover).
        vanished: pending entries that had been trimmed away before they were read.
    """

    length: int
    backlog: int
    pending: int
    parked: int
    reconnects: int = 0
    groups_recreated: int = 0
    vanished: int = 0


class Stream(Protocol):
    """At-least-once stream with one consumer group, created from the first entry on.

    Every method raises :class:`~specblock.bandit.errors.StreamError` when the transport does not answer.
    """

    def append(self, fields: Mapping[str, str]) -> str:
        """Add an entry, trimming old ones; returns its id. Never repeated here: the outcome may be unknown."""

    def read(self, count: int, block_s: float) -> list[StreamEntry]:
        """Up to ``count`` new entries, waiting at most ``block_s`` (0: not at all). They stay pending until acked."""

    def claim(self, count: int) -> list[StreamEntry]:
        """Up to ``count`` entries delivered earlier and never acknowledged.

        First this consumer's own (after opening and after each lost connection), then those idle at other consumers.
        Empty once both have been gone through; the next call starts a new round over other consumers.
        """

    def ack(self, entry_ids: Sequence[str]) -> int:
        """Mark entries as done; returns how many were pending."""

    def park(self, entry: StreamEntry, error: str) -> None:
        """Move an unreadable entry to the bounded parking stream and acknowledge it, in one transaction."""

    def info(self) -> StreamInfo:
        """Depth and health."""

    def close(self) -> None:
        """Release connections."""
