"""The Redis Streams transport. The only file that imports redis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    BusyLoadingError,
    ConnectionError,  # noqa: A004 - redis's own class, not the built-in
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004
)
from redis.retry import Retry

from specblock.bandit.config import StreamConfig
from specblock.bandit.errors import StreamError
from specblock.bandit.stream_types import PARKED_SUFFIX, StreamEntry, StreamInfo

T = TypeVar("T")


class RedisStream:
    """Consumer-group stream on a Redis (or Valkey) server, 6.2 command set.

    Reads, acknowledgements and claims are repeated after a lost connection, with a bounded, doubling back-off.
    ``append`` is never repeated: after a lost connection nobody knows whether the entry was written.

    Args:
        config: address, names, bounds.
        wait: called with the seconds to wait between two tries; injected so that a stop can cut it short.
    """

    def __init__(self, config: StreamConfig, wait: Callable[[float], object]) -> None:
        self._config = config
        self._wait = wait
        self._client: Any = redis.Redis.from_url(
            config.url,
            decode_responses=True,
            # Foreign bytes must reach the decoder and be parked, not stop every read; they survive a round trip.
            encoding_errors="surrogateescape",
            socket_timeout=config.socket_timeout_s,
            socket_connect_timeout=config.socket_timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        self._group_ready = False
        self._writable = False
        self._own_after: str | None = "0-0"
        self._idle_after = "0-0"
        self._round_ended = False
        self._reconnects = 0
        self._groups_recreated = 0
        self._vanished = 0

    def append(self, fields: Mapping[str, str]) -> str:
        """XADD with MAXLEN; see :class:`~specblock.bandit.stream_types.Stream`."""
        self._greet()
        try:
            entry_id = self._client.xadd(
                self._config.name, dict(fields), maxlen=self._config.max_entries, approximate=True
            )
        except ReadOnlyError as error:
            self._drop_connections()
            raise StreamError(f"the server is a read-only replica: {error}", not_applied=True) from error
        except (BusyLoadingError, ResponseError) as error:
            raise StreamError(f"the server refused the entry: {error}", not_applied=True) from error
        except RedisError as error:
            self._reconnects += 1
            self._writable = False
            raise StreamError(f"the outcome of an append is unknown: {error}") from error
        return str(entry_id)

    def _greet(self) -> None:
        """PING before the first append on a new connection: an unreachable server then surely wrote nothing."""
        if self._writable:
            return
        try:
            self._client.ping()
        except RedisError as error:
            raise StreamError(f"redis is unreachable: {error}", not_applied=True) from error
        self._writable = True

    def read(self, count: int, block_s: float) -> list[StreamEntry]:
        """XREADGROUP of new entries."""
        block_ms = max(1, round(min(block_s, self._config.block_max_s) * 1000)) if block_s > 0 else None
        return self._call(lambda: self._read_group(">", count, block_ms))

    def claim(self, count: int) -> list[StreamEntry]:
        """Own pending entries (XREADGROUP from an id), then XAUTOCLAIM with its cursor kept between calls."""
        return self._call(lambda: self._claim_own(count) or self._claim_idle(count))

    def ack(self, entry_ids: Sequence[str]) -> int:
        """XACK."""
        if not entry_ids:
            return 0
        return int(self._call(lambda: self._client.xack(self._config.name, self._config.group, *entry_ids)))

    def park(self, entry: StreamEntry, error: str) -> None:
        """XADD to the parking stream and XACK, in one transaction."""
        self._call(lambda: self._park(entry, error))

    def info(self) -> StreamInfo:
        """Depth and health. The backlog is at most the length: after a trim Redis's own lag counts removed entries."""
        return self._call(self._info)

    def close(self) -> None:
        """Close every connection."""
        self._client.close()

    def _read_group(self, after: str, count: int, block_ms: int | None) -> list[StreamEntry]:
        reply = self._client.xreadgroup(
            self._config.group, self._config.consumer, {self._config.name: after}, count=count, block=block_ms
        )
        return [self._entry(entry_id, fields) for _, entries in reply or [] for entry_id, fields in entries]

    def _claim_own(self, count: int) -> list[StreamEntry]:
        if self._own_after is None:
            return []
        entries = self._read_group(self._own_after, count, None)
        self._own_after = entries[-1].entry_id if entries else None
        return entries

    def _claim_idle(self, count: int) -> list[StreamEntry]:
        if self._round_ended:
            self._round_ended = False
            return []
        while True:
            reply = self._client.xautoclaim(
                self._config.name,
                self._config.group,
                self._config.consumer,
                min_idle_time=round(self._config.claim_idle_s * 1000),
                start_id=self._idle_after,
                count=count,
            )
            # Redis 7 adds the ids that had been trimmed away (and forgets them itself).
            self._idle_after, found = str(reply[0]), reply[1]
            self._vanished += len(reply[2]) if len(reply) > 2 else 0
            if found or self._idle_after == "0-0":
                # Entries that are idle again at once must not make the round endless.
                self._round_ended = bool(found) and self._idle_after == "0-0"
                return [self._entry(entry_id, fields) for entry_id, fields in found]

    def _entry(self, entry_id: str, fields: Mapping[str, str] | None) -> StreamEntry:
        self._vanished += not fields
        return StreamEntry(str(entry_id), dict(fields or {}))

    def _park(self, entry: StreamEntry, error: str) -> None:
        with self._client.pipeline(transaction=True) as pipe:
            pipe.xadd(
                self._config.name + PARKED_SUFFIX,
                {**entry.fields, "parked_id": entry.entry_id, "parked_error": error[:1000]},
                maxlen=self._config.max_parked,
                approximate=False,
            )
            pipe.xack(self._config.name, self._config.group, entry.entry_id)
            pipe.execute()

    def _info(self) -> StreamInfo:
        groups = {group["name"]: group for group in self._client.xinfo_groups(self._config.name)}
        if self._config.group not in groups:
            raise ResponseError("NOGROUP the consumer group is gone")
        group, length = groups[self._config.group], int(self._client.xlen(self._config.name))
        lag = group.get("lag")
        return StreamInfo(
            length=length,
            backlog=length if lag is None else min(int(lag), length),
            pending=int(group["pending"]),
            parked=int(self._client.xlen(self._config.name + PARKED_SUFFIX)),
            reconnects=self._reconnects,
            groups_recreated=self._groups_recreated,
            vanished=self._vanished,
        )

    def _ensure_group(self) -> None:
        if self._group_ready:
            return
        try:
            self._client.xgroup_create(self._config.name, self._config.group, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        self._group_ready = True

    def _call(self, command: Callable[[], T]) -> T:
        """Run a repeatable command; reconnect, or recreate the group, as often as the configuration allows."""
        failure: Exception | None = None
        for attempt in range(self._config.attempts):
            try:
                self._ensure_group()
                return command()
            except (ConnectionError, TimeoutError, ReadOnlyError) as error:
                failure = error
                self._drop_connections()
                self._wait(min(self._config.backoff_s * 2**attempt, self._config.backoff_max_s))
            except ResponseError as error:
                # XINFO of a flushed stream says "no such key", every group command says NOGROUP.
                if not (str(error).startswith("NOGROUP") or "no such key" in str(error)):
                    raise StreamError(f"redis refused a command: {error}", not_applied=True) from error
                failure = error
                self._group_ready = False
                self._groups_recreated += 1
        raise StreamError(f"redis did not answer in {self._config.attempts} tries: {failure}") from failure

    def _drop_connections(self) -> None:
        """Forget pooled connections; entries delivered on a lost one wait under our name, so look there again."""
        self._reconnects += 1
        self._own_after = "0-0"
        self._client.connection_pool.disconnect()
