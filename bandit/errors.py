"""Every error this package raises on purpose (besides ``events.EventError``: an entry to park).

BanditError
├── StreamError       the stream did not answer; ``not_applied`` says whether a write is known to have had no effect
├── SnapshotError     no snapshot on disk is whole
└── LedgerError       a stage was recorded twice, or the ledger file is damaged in its middle
"""

from __future__ import annotations


class BanditError(Exception):
    """Base of this package's errors."""


class StreamError(BanditError):
    """The stream could not be reached or refused a command.

    Attributes:
        not_applied: True when the server answered that it did nothing, so that repeating a write is safe.
    """

    def __init__(self, message: str, *, not_applied: bool = False) -> None:
        super().__init__(message)
        self.not_applied = not_applied


class SnapshotError(BanditError):
    """A snapshot is torn, altered or of another format."""


class LedgerError(BanditError):
    """A ledger record is refused or unreadable."""
