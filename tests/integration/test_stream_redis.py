"""The Redis stream against a real redis-server child on a unix socket."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from specblock.bandit.config import StreamConfig
from specblock.bandit.errors import StreamError
from specblock.bandit.events import EventError, decode
from specblock.bandit.producer import EventProducer
from specblock.bandit.service import BanditService
from specblock.bandit.stream import RedisStream
from tests.bandit.stream_contract import Bounds, Harness, StreamContract
from tests.bandit.test_acceptance import EVENT
from tests.bandit.world import World, service_config, small_policy

pytestmark = pytest.mark.integration


class Server:
    """A redis-server child that can be killed and started again on the same socket."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.socket = directory, directory / "redis.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        binary = shutil.which("redis-server")
        assert binary, "redis-server must be installed (make setup does it)"
        command = [binary, "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.directory)]
        self.process = subprocess.Popen(
            [*command, "--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until(lambda: self.answers() is True)

    def answers(self) -> bool:
        try:
            with redis.Redis(unix_socket_path=str(self.socket)) as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False

    def command(self, *words: object) -> object:
        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            return client.execute_command(*words)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None
            self.socket.unlink(missing_ok=True)


def until(condition: Callable[[], bool], deadline_s: float = 20.0) -> None:
    end, pause = time.monotonic() + deadline_s, threading.Event()
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        pause.wait(0.01)


@pytest.fixture
def server() -> Iterator[Server]:
    # A short path: unix socket addresses are limited to about a hundred bytes.
    with tempfile.TemporaryDirectory(prefix="sbr") as directory:
        found = Server(Path(directory))
        yield found
        found.kill()


@pytest.fixture
def opened() -> Iterator[list[RedisStream]]:
    streams: list[RedisStream] = []
    yield streams
    for stream in streams:
        stream.close()


@pytest.fixture
def open_stream(server: Server, opened: list[RedisStream]) -> Callable[..., RedisStream]:
    def make(consumer: str = "b", **changes: object) -> RedisStream:
        values = {"url": server.url, "consumer": consumer, "attempts": 3, "backoff_s": 0.01, **changes}
        opened.append(RedisStream(StreamConfig(**values), threading.Event().wait))  # type: ignore[arg-type]
        return opened[-1]

    return make


class TestRedisStream(StreamContract):
    @pytest.fixture
    def harness(self, server: Server, open_stream: Callable[..., RedisStream]) -> Harness:
        def make(consumer: str, bounds: Bounds) -> RedisStream:
            return open_stream(
                consumer,
                max_entries=bounds.max_entries,
                max_parked=bounds.max_parked,
                claim_idle_s=bounds.claim_idle_s,
            )

        return Harness(make, lambda: server.command("FLUSHALL"))


def test_a_vanished_group_is_recreated_and_counted(server: Server, open_stream: Callable[..., RedisStream]) -> None:
    stream = open_stream()
    stream.read(1, 0.0)
    server.command("FLUSHALL")
    stream.append({"n": "1"})
    assert [entry.fields["n"] for entry in stream.read(1, 0.0)] == ["1"]
    assert stream.info().groups_recreated == 1
    server.command("FLUSHALL")
    assert stream.claim(1) == [] and stream.info().groups_recreated == 2


def test_a_restarted_server_that_kept_nothing_is_read_on_from(
    server: Server, open_stream: Callable[..., RedisStream]
) -> None:
    stream = open_stream(attempts=20)
    stream.read(1, 0.0)
    server.kill()
    server.start()
    assert stream.read(1, 0.0) == []
    stream.append({"n": "1"})
    assert [entry.fields["n"] for entry in stream.read(1, 0.0)] == ["1"]
    assert stream.info().groups_recreated == 1


def test_a_read_whose_connection_breaks_is_repeated_and_its_entries_are_offered_again(
    server: Server, open_stream: Callable[..., RedisStream]
) -> None:
    stream, writer = open_stream(), open_stream("w")
    assert stream.read(1, 0.0) == [] and stream.claim(5) == []
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(e.fields["n"] for e in stream.read(1, 2.0)))
    thread.start()
    until(lambda: "blocked_clients': 1" in str(server.command("INFO", "clients")))
    server.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    until(lambda: stream._reconnects == 1)
    writer.append({"n": "0"})
    thread.join(20)
    assert found == ["0"]
    # Delivered twice is harmless (the watermark knows it), never delivered is not.
    assert [entry.fields["n"] for entry in stream.claim(5)] == ["0"]
    assert stream.info().reconnects == 1


def test_a_server_that_stays_away_is_an_error_after_a_bounded_number_of_tries(
    server: Server, opened: list[RedisStream]
) -> None:
    waits: list[float] = []
    config = StreamConfig(url=server.url, attempts=4, backoff_s=0.5, backoff_max_s=1.5)
    opened.append(RedisStream(config, waits.append))
    server.kill()
    with pytest.raises(StreamError, match="4 tries"):
        opened[0].read(1, 0.0)
    assert waits == [0.5, 1.0, 1.5, 1.5]


def test_an_append_to_a_server_that_was_never_reached_surely_did_nothing(
    server: Server, open_stream: Callable[..., RedisStream]
) -> None:
    stream = open_stream()
    server.kill()
    with pytest.raises(StreamError) as error:
        stream.append({"n": "0"})
    assert error.value.not_applied


def test_an_append_on_a_connection_that_breaks_has_an_unknown_outcome(
    server: Server, open_stream: Callable[..., RedisStream]
) -> None:
    stream = open_stream()
    stream.append({"n": "0"})
    server.kill()
    with pytest.raises(StreamError) as error:
        stream.append({"n": "1"})
    assert not error.value.not_applied


def test_a_replica_refuses_and_the_write_may_be_repeated(
    server: Server, open_stream: Callable[..., RedisStream]
) -> None:
    stream = open_stream()
    stream.read(1, 0.0)
    server.command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(StreamError) as error:
        stream.append({"n": "0"})
    assert error.value.not_applied
    with pytest.raises(StreamError):
        stream.read(1, 0.0)
    server.command("REPLICAOF", "NO", "ONE")
    stream.append({"n": "1"})
    assert [entry.fields["n"] for entry in stream.read(5, 0.0)] == ["1"]


def test_foreign_bytes_are_parked_not_fatal(server: Server, open_stream: Callable[..., RedisStream]) -> None:
    stream = open_stream()
    stream.read(1, 0.0)
    server.command("XADD", "{specblock}:events", "*", b"\xff\xfe", b"\x80")
    (entry,) = stream.read(1, 0.0)
    with pytest.raises(EventError):
        decode(entry.fields)
    stream.park(entry, "cannot read this")
    assert stream.info().parked == 1 and stream.info().pending == 0


def test_a_wrong_type_of_key_is_reported_not_retried(server: Server, open_stream: Callable[..., RedisStream]) -> None:
    server.command("SET", "{specblock}:events", "not a stream")
    with pytest.raises(StreamError, match="WRONGTYPE"):
        open_stream().read(1, 0.0)


def test_from_the_producer_through_redis_to_the_bandit_across_outages(
    server: Server, open_stream: Callable[..., RedisStream], tmp_path: Path
) -> None:
    producer = EventProducer(open_stream("engine"), "e0-life1", retry_s=0.01, max_retry_s=0.05)
    producer.start()
    stream = open_stream("bandit-0", attempts=50)
    world = World(stream)
    service = BanditService(stream, world, small_policy(), service_config(tmp_path))
    service.pause()
    for i in range(100):
        producer.offer(replace(EVENT, time_s=1000.0 + i))
    until(lambda: producer.stats().sent == 100)
    service.step(2000.0)
    service._ledger.close()
    again = BanditService(open_stream("bandit-0", attempts=50), world, small_policy(), service_config(tmp_path))
    server.kill()
    for i in range(50):
        producer.offer(replace(EVENT, time_s=1200.0 + i))
    server.start()
    stats = producer.close(20.0)
    assert stats.sent + stats.lost == 150 and stats.dropped == 0
    until(lambda: again.step(2010.0).learned >= 0 and again.state.learned == stats.sent)
    assert again.state.watermarks.missing + again.state.watermarks.lost == stats.lost
    assert again.counters.duplicates == 0
    again.close(2020.0)
    assert open_stream("bandit-0").info().pending == 0
