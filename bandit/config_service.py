"""Configuration of the event stream and of the service loop."""

from __future__ import annotations

from dataclasses import dataclass

from specblock.bandit.config_checks import at_least, not_negative, positive, require


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """The Redis stream of acceptance events."""

    url: str
    """redis://, rediss:// or unix:// address."""
    name: str = "{specblock}:events"
    """Braces keep the stream and its parked twin in one cluster slot."""
    group: str = "bandit"
    consumer: str = "bandit-0"
    """Stable over restarts, so a restarted service finds its own unacknowledged entries."""
    max_entries: int = 100_000
    max_parked: int = 1_000
    claim_idle_s: float = 60.0
    """Entries another consumer left unacknowledged for this long are taken over at start."""
    socket_timeout_s: float = 5.0
    block_max_s: float = 2.0
    attempts: int = 4
    """Tries of one read or acknowledgement before it is reported as unavailable."""
    backoff_s: float = 0.05
    backoff_max_s: float = 1.0

    def __post_init__(self) -> None:
        path = "stream"
        schemes = ("redis://", "rediss://", "unix://")
        require(self.url.startswith(schemes), f"{path}.url", "an address starting with " + " or ".join(schemes), "***")
        for name in ("name", "group", "consumer"):
            require(bool(getattr(self, name)), f"{path}.{name}", "a non-empty name", getattr(self, name))
        at_least(path, 1, max_entries=self.max_entries, max_parked=self.max_parked, attempts=self.attempts)
        positive(path, socket_timeout_s=self.socket_timeout_s, block_max_s=self.block_max_s)
        not_negative(path, claim_idle_s=self.claim_idle_s, backoff_s=self.backoff_s, backoff_max_s=self.backoff_max_s)
        # A blocking read that outlives the socket's timeout is repeated silently by redis-py instead of returning.
        require(
            self.socket_timeout_s > self.block_max_s + 2,
            f"{path}.socket_timeout_s",
            "more than block_max_s + 2 s",
            self.socket_timeout_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConfig:
    """Pace and places of the service loop."""

    directory: str
    """Holds the snapshots and the ledger."""
    decide_every_s: float = 10.0
    decide_every_events: int = 16
    """New events without which nothing new is decided."""
    read_count: int = 512
    block_s: float = 0.5
    snapshot_every_s: float = 1.0
    """Acknowledgements wait for a snapshot; this bounds how often one is written for events alone."""
    keep_snapshots: int = 2
    """Newest ones kept on disk; 0: none is written, for runs that nobody resumes."""
    ledger_sync_every_s: float = 60.0
    """Repeated identical skips reach the disk at least this often; everything else at once."""

    def __post_init__(self) -> None:
        path = "bandit"
        require(bool(self.directory), f"{path}.directory", "a folder", self.directory)
        not_negative(path, decide_every_s=self.decide_every_s, block_s=self.block_s)
        not_negative(path, snapshot_every_s=self.snapshot_every_s, ledger_sync_every_s=self.ledger_sync_every_s)
        at_least(path, 1, decide_every_events=self.decide_every_events)
        at_least(path, 1, read_count=self.read_count)
        keep = self.keep_snapshots
        require(keep == 0 or keep >= 2, f"{path}.keep_snapshots", "0 or at least 2", keep)
