"""The embedded redis-server: a real child process on a unix socket."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from specblock.daemon.config import RedisConfig
from specblock.daemon.errors import DependencyError
from specblock.daemon.redis_probe import probe
from specblock.daemon.redis_server import RedisServer, find_server_binary

pytestmark = pytest.mark.integration


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(RedisConfig(), tmp_path)
    yield server
    server.stop()


def until(condition: Callable[[], bool], deadline_s: float = 10.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"


def gone(pid: int) -> bool:
    """True once the process is dead (a zombie that nobody reaped counts as dead)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_folder_that_cannot_be_made(server: RedisServer, tmp_path: Path) -> None:
    (tmp_path / "redis").write_text("")
    with pytest.raises(DependencyError, match=r"no place for redis: .*: File exists"):
        server.start()


def test_start_serves_streams_and_stop_removes_the_socket(server: RedisServer) -> None:
    endpoint = server.start()
    assert server.start() is endpoint, "starting twice is harmless"
    assert server.url == endpoint.url
    path = Path(urlsplit(endpoint.url).path)
    assert path.stat().st_mode & 0o777 == 0o700
    client = redis.Redis(unix_socket_path=str(path))
    client.xadd("s", {"a": 1}, maxlen=10)
    assert client.xlen("s") == 1
    assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    assert client.config_get("maxmemory") == {"maxmemory": str(RedisConfig().maxmemory_bytes)}
    assert client.config_get("save") == {"save": ""}
    client.close()
    pid = server.pid
    assert pid is not None
    server.stop()
    server.stop()
    assert gone(pid)
    assert not path.exists()
    assert "bye bye" in server.log_path.read_text()


def test_a_stale_socket_is_replaced(server: RedisServer, tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "redis" / "redis.sock"))
    left.close()
    assert server.start().info.version


def test_a_restart_after_a_crash(server: RedisServer) -> None:
    server.start()
    first = server.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: server.pid is None)
    server.start()
    assert server.pid not in (None, first)


@pytest.mark.parametrize("folder", ["d", "x" * 120])
def test_a_child_that_died_or_lost_its_socket_comes_back_at_the_same_place(tmp_path: Path, folder: str) -> None:
    server = RedisServer(RedisConfig(), tmp_path / folder)
    assert not server.heal(), "nothing was started yet"
    try:
        url = server.start().url
        first = server.pid
        assert first is not None
        assert not server.heal(), "healthy"
        os.kill(first, signal.SIGKILL)
        until(lambda: server.pid is None)
        assert server.heal() and server.url == url
        second = server.pid
        assert second is not None
        assert redis.Redis.from_url(url).ping()
        Path(urlsplit(url).path).unlink()
        assert server.heal() and server.url == url and gone(second)
        assert redis.Redis.from_url(url).ping()
    finally:
        server.stop()
    assert not server.heal(), "stopped on purpose"


def test_two_daemons_in_one_state_dir_are_refused(server: RedisServer, tmp_path: Path) -> None:
    server.start()
    with pytest.raises(DependencyError, match="another daemon"):
        RedisServer(RedisConfig(), tmp_path).start()
    assert server.pid is not None


def test_a_long_state_dir_gets_a_short_socket(tmp_path: Path) -> None:
    server = RedisServer(RedisConfig(), tmp_path / ("x" * 120))
    try:
        path = Path(urlsplit(server.start().url).path)
        assert len(str(path)) < 108
    finally:
        server.stop()
    assert not path.parent.exists()


def test_attaching_to_a_running_server(server: RedisServer, tmp_path: Path) -> None:
    url = server.start().url
    other = RedisServer(RedisConfig(url=url), tmp_path / "other")
    assert other.start().info.maxmemory_policy == "noeviction"
    other.stop()
    assert server.pid is not None, "a configured server is left alone"


def test_wrong_password_and_login(server: RedisServer) -> None:
    path = urlsplit(server.start().url).path
    client = redis.Redis(unix_socket_path=path)
    client.config_set("requirepass", "open sesame")
    client.close()
    assert probe(f"unix://:open%20sesame@{path}", 2.0).version
    with pytest.raises(DependencyError, match="WRONGPASS") as caught:
        probe(f"unix://:guess@{path}", 2.0)
    assert "guess" not in str(caught.value)
    with pytest.raises(DependencyError, match="NOAUTH"):
        probe(f"unix://{path}", 2.0)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match=r"redis://\*\*\*@127.0.0.1:1/0 does not answer"):
        RedisServer(RedisConfig(url="redis://u:secret@127.0.0.1:1/0"), tmp_path).start()


def test_a_socket_path_that_cannot_be_cleared(tmp_path: Path) -> None:
    (tmp_path / "redis" / "redis.sock").mkdir(parents=True)
    with pytest.raises(DependencyError, match=r"redis\.sock"):
        RedisServer(RedisConfig(), tmp_path).start()


def test_a_child_that_fails_shows_its_log(tmp_path: Path) -> None:
    config = RedisConfig().model_copy(update={"maxmemory_bytes": -1})  # past validation: the server refuses it
    (tmp_path / "redis").mkdir()
    (tmp_path / "redis" / "redis.log").write_text("the reason\n")
    with pytest.raises(DependencyError, match=r"ended with code 1; its log: .*the reason"):
        RedisServer(config, tmp_path).start()


@pytest.mark.parametrize("with_setpriv", [True, False])
def test_the_child_dies_with_a_killed_parent(tmp_path: Path, with_setpriv: bool) -> None:
    if with_setpriv and not shutil.which("setpriv"):
        pytest.skip("no setpriv on this machine")
    tools = tmp_path / "bin"
    tools.mkdir()
    names = ["setpriv"] if with_setpriv else []
    for tool in [find_server_binary(), *(Path(str(shutil.which(name))) for name in names)]:
        (tools / tool.name).symlink_to(tool)
    code = (
        "import sys; from pathlib import Path; from specblock.daemon.config import RedisConfig;"
        "from specblock.daemon.redis_server import RedisServer;"
        f"server = RedisServer(RedisConfig(), Path({str(tmp_path)!r})); server.start();"
        "print(server.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": str(tools)},
    )
    assert parent.stdout is not None and parent.stdin is not None
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.communicate()
    until(lambda: gone(pid))
