"""Asks a Redis server whether it is there and which version it is, with three commands over a plain socket.

The full client lives in ``specblock.bandit.stream``; this needs no client library, so ``specblockd check`` and the
start of the embedded server stay light.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from specblock.daemon.config_types import redact_url
from specblock.daemon.errors import DependencyError

MIN_VERSION = (6, 2)
"""XAUTOCLAIM, which the event consumer needs, appeared in Redis 6.2."""


@dataclass(frozen=True, slots=True)
class RedisServerInfo:
    """What a server says about itself; ``maxmemory_policy`` decides whether it may evict the stream."""

    version: str
    maxmemory_policy: str


def probe(url: str, timeout_s: float) -> RedisServerInfo:
    """Connects, logs in, pings and reads the version.

    Args:
        url: redis://, rediss:// (``ssl_ca_certs`` is read from the query) or unix://.
        timeout_s: limit of the connection and of every reply, in seconds.

    Raises:
        DependencyError: no answer, login refused, or a version below 6.2. The message holds no password.
    """
    shown = redact_url(url)
    try:
        with _connect(urlsplit(url), timeout_s) as connection, connection.makefile("rb") as replies:
            parts = urlsplit(url)
            if parts.password:
                user = (unquote(parts.username),) if parts.username else ()
                _call(connection, replies, "AUTH", *user, unquote(parts.password))
            _call(connection, replies, "PING")
            text = _call(connection, replies, "INFO")
    except (OSError, ValueError) as error:
        raise DependencyError(f"Redis at {shown} does not answer: {error}") from None
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    info = RedisServerInfo(fields.get("redis_version", "0"), fields.get("maxmemory_policy", "unknown"))
    version = tuple(int(part) for part in info.version.split(".")[:2] if part.isdigit())
    if version < MIN_VERSION:
        raise DependencyError(f"Redis at {shown} is version {info.version}; 6.2 or newer is needed")
    return info


def _connect(parts: SplitResult, timeout_s: float) -> socket.socket:
    if parts.scheme == "unix":
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(timeout_s)
        try:
            connection.connect(unquote(parts.path))
        except OSError:
            connection.close()
            raise
        return connection
    host = parts.hostname or "localhost"
    plain = socket.create_connection((host, parts.port or 6379), timeout=timeout_s)
    if parts.scheme != "rediss":
        return plain
    authority = parse_qs(parts.query).get("ssl_ca_certs", [None])[0]
    try:
        return ssl.create_default_context(cafile=authority).wrap_socket(plain, server_hostname=host)
    except OSError:
        plain.close()
        raise


def _call(connection: socket.socket, replies: BinaryIO, *words: str) -> str:
    """Sends one command and returns its simple or bulk reply."""
    encoded = [word.encode() for word in words]
    connection.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded))
    line = replies.readline().rstrip(b"\r\n")
    if not line:
        raise ConnectionError("the connection was closed")
    if line[:1] == b"$":
        return replies.read(int(line[1:]) + 2)[:-2].decode(errors="replace")
    if line[:1] != b"+":
        raise ConnectionError(line[1:].decode(errors="replace"))
    return line[1:].decode()
