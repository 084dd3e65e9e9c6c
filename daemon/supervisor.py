"""``specblockd serve``: start order, health, signals, drain, stop.

Order: state directory, checks, drafter and tokenizer, Redis, Ray, HTTP (503 while loading), trainer and engine,
bandit. Stop is the reverse.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import ray
import uvicorn
from transformers import AutoTokenizer

from specblock.bandit.config import StreamConfig
from specblock.daemon.actors import EngineActor, TrainerActor, remote_options
from specblock.daemon.bandit_actor import BanditActor, BanditView
from specblock.daemon.check import refuse_if_broken
from specblock.daemon.config import DaemonConfig
from specblock.daemon.engine_client import RayEngineClient
from specblock.daemon.errors import ConfigError, DependencyError, DeviceError, IncompatibleError, SpecblockError
from specblock.daemon.gateway import create_app
from specblock.daemon.models import settle_dtype
from specblock.daemon.redis_server import RedisServer
from specblock.daemon.registry import DrafterRegistry
from specblock.daemon.runfile import DaemonInfo, remove_run_file, write_run_file
from specblock.daemon.state_lock import own_state_dir

log = logging.getLogger(__name__)
_REDIS_WATCH_S = 1.0


def serve(config: DaemonConfig, engine_type: type[EngineActor] = EngineActor) -> int:
    """Runs the daemon until a signal; returns the exit code.

    Args:
        config: the policy.
        engine_type: class of the engine actor.

    Raises:
        SpecblockError: something is missing; nothing stays half-started.
    """
    asked, config = config.target.dtype, settle_dtype(config)
    state_dir = Path(config.state_dir).resolve()
    stop_asked = threading.Event()
    with own_state_dir(state_dir), _signals(stop_asked):
        refuse_if_broken(config)
        serving = _import_drafter(config, state_dir)
        log.info(
            "drafter version %s, %s on %s (target.dtype: %s)", serving, config.target.dtype, config.target.device, asked
        )
        if config.adaptation_off:
            log.info("adaptation is off: %s", config.adaptation_off)
        tokenizer = _tokenizer(config)
        redis = RedisServer(config.redis, state_dir)
        redis.start()
        # In the main thread Ray would take SIGTERM and exit in the middle of its own start. The thread stays until the
        # end, because Ray's processes die with the thread that forked them.
        starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray-start")
        try:
            starter.submit(_start_ray, config).result()
            if stop_asked.is_set():
                return 0
            return asyncio.run(_Daemon(config, state_dir, redis, tokenizer, engine_type).run())
        finally:
            ray.shutdown()
            starter.shutdown()
            redis.stop()
            remove_run_file(state_dir)
            log.info("stopped")


def _import_drafter(config: DaemonConfig, state_dir: Path) -> str:
    """What will serve: the registry's version, or the kind of a drafter without weights, which has no versions."""
    if config.drafter.path is None:
        return config.drafter.kind
    try:
        return DrafterRegistry(state_dir).import_base(config.drafter.path)
    except OSError as error:  # a full disk, for example
        raise ConfigError(
            f"state_dir: {error.filename2 or error.filename or state_dir}: {error.strerror or error}"
        ) from None


@contextmanager
def _signals(stop_asked: threading.Event) -> Iterator[None]:
    """Until the event loop takes them: a signal ends the start at its next step instead of in the middle of one."""

    def remember(number: int, _: object) -> None:
        stop_asked.set()
        log.info("signal %d while starting; stopping", number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tokenizer(config: DaemonConfig) -> Any:
    try:
        return AutoTokenizer.from_pretrained(config.target.source, revision=config.target.revision or "main")
    except Exception as error:  # whatever the tokenizer's own code raises about its files
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise IncompatibleError(
            f"target.model: the tokenizer of {config.target.source} cannot be read: {reason}"
        ) from None


def _start_ray(config: DaemonConfig) -> None:
    settings = config.ray
    # That Ray does not take SIGTERM is what we want.
    logging.getLogger("ray._private.worker").addFilter(lambda record: "SIGTERM handler" not in record.getMessage())
    log.info("starting Ray (%s)", settings.address)
    if settings.address != "local":
        ray.init(address=settings.address, namespace="specblock", log_to_driver=False)
        return
    # Logical CPUs for the three actors, whatever the machine has: on two cores they share.
    ray.init(
        address="local",
        namespace="specblock",
        num_cpus=max(4, os.cpu_count() or 1),
        include_dashboard=settings.dashboard,
        dashboard_host=settings.dashboard_host,
        dashboard_port=settings.dashboard_port,
        object_store_memory=settings.object_store_memory_bytes,
        log_to_driver=False,
        logging_level="warning",
    )
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        token.chmod(0o600)
    if settings.dashboard:
        log.info(
            "Ray dashboard on http://%s:%d (it asks for a token: `ray get-auth-token`)",
            settings.dashboard_host,
            settings.dashboard_port,
        )


def _start_error(actor: str, text: str) -> SpecblockError:
    """One line, and the exit code of the error in the actor's constructor, out of what Ray says of its death."""
    last = (text.strip().splitlines() or ["no reason given"])[-1]
    kind, _, message = last.partition(": ")
    known = {each.__name__: each for each in (ConfigError, DeviceError, IncompatibleError)}
    error = known.get(kind.rpartition(".")[2])
    if error is None:
        return DependencyError(f"the {actor} did not start: {last}")
    return error(f"the {actor} did not start: {message}")


class _Daemon:
    """The running daemon: everything between Ray's start and its shutdown."""

    def __init__(
        self,
        config: DaemonConfig,
        state_dir: Path,
        redis: RedisServer,
        tokenizer: Any,
        engine_type: type[EngineActor],
    ) -> None:
        self._engine_type, self._tokenizer = engine_type, tokenizer
        self._config, self._state_dir, self._redis = config, state_dir, redis
        self._stream = StreamConfig(
            url=redis.url,
            max_entries=config.redis.stream_max_entries,
            socket_timeout_s=config.redis.socket_timeout_s,
            block_max_s=config.redis.block_s,
        )
        self._client = RayEngineClient()
        self._bandit = BanditView()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        """A second signal: running requests get no more time."""

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._take_signal)
        server = self._http_server()
        serving = asyncio.create_task(server.serve())
        actors: dict[str, Any] = {}
        code = 0
        # A thread of its own: the gateway does not wait for Redis, and the child dies with the thread that forked it.
        watcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="redis-watch")
        watching = asyncio.create_task(self._watch_redis(watcher))
        try:
            starting = asyncio.create_task(self._start_actors(actors))
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                gone = asyncio.create_task(self._client.gone())
                await asyncio.wait({stopping, gone}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise DependencyError(f"Ray has given up on restarting: {gone.result()}")
                gone.cancel()
            else:
                starting.cancel()
        except SpecblockError as error:
            log.error("%s", error)
            code = int(error.exit_code)
        await self._shut_down(server, serving, actors)
        watching.cancel()
        watcher.shutdown()
        return code

    def _take_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _watch_redis(self, watcher: ThreadPoolExecutor) -> None:
        """Without Redis the daemon serves on but learns nothing, which nobody would notice for months."""
        while True:
            await asyncio.sleep(_REDIS_WATCH_S)
            try:
                if await asyncio.get_running_loop().run_in_executor(watcher, self._redis.heal):
                    log.error("redis-server was gone and has been started again; events of that time may be lost")
            except DependencyError as error:
                log.error("redis-server is gone and does not start: %s", error)

    def _http_server(self) -> uvicorn.Server:
        app = create_app(
            self._client,
            self._config,
            self._tokenizer,
            rng=random.SystemRandom(),
            clock=time.monotonic,
            wall_clock=time.time,
            version=installed_version("specblock"),
            bandit_status=self._bandit.status,
        )
        http = self._config.http
        server = uvicorn.Server(
            uvicorn.Config(app, host=http.host, port=http.port, log_level="warning", access_log=False, lifespan="off")
        )
        server.capture_signals = _no_signals  # type: ignore[method-assign]
        return server

    async def _start_actors(self, actors: dict[str, Any]) -> None:
        config = self._config
        begin = time.monotonic()
        self._client.report("loading", "loading target and drafter")
        engine = actors["engine"] = (
            ray.remote(self._engine_type)
            .options(**remote_options("engine-0", 1, config.ray.engine_gpus, concurrency=16, restarts=3))
            .remote(config, "engine-0", self._stream)
        )
        if config.drafter.has_weights:
            actors["trainer"] = (
                ray.remote(TrainerActor)
                .options(**remote_options("trainer", 1, config.ray.trainer_gpus, concurrency=1, restarts=3))
                .remote(config)
            )
        for name, actor in actors.items():
            await self._ready(actor, name)
        log.info("engine runs on %s", await engine.threads.remote())
        bandit = actors["bandit"] = (
            ray.remote(BanditActor)
            .options(**remote_options("bandit", 0.5, 0, concurrency=4, restarts=-1))
            .remote(config, str(self._state_dir / "bandit"), self._stream)
        )
        await self._ready(bandit, "bandit")
        self._client.attach(engine)
        self._bandit.attach(bandit)
        self._client.report("", "")
        url = f"http://{config.http.host}:{config.http.port}"
        write_run_file(
            self._state_dir,
            DaemonInfo(pid=os.getpid(), url=url, version=installed_version("specblock"), started_at_unix_s=time.time()),
        )
        log.info("ready on %s after %.1f s", url, time.monotonic() - begin)

    async def _ready(self, actor: Any, name: str) -> None:
        try:
            await actor.pid.remote()
        except ray.exceptions.RayError as error:
            raise _start_error(name, str(error)) from None

    async def _shut_down(self, server: uvicorn.Server, serving: asyncio.Task[None], actors: dict[str, Any]) -> None:
        self._client.report("draining", "no new requests")
        deadline = time.monotonic() + self._config.http.drain_deadline_s
        while self._client.queue_depth and time.monotonic() < deadline and not self._hurry.is_set():
            await asyncio.sleep(0.05)
        if left := self._client.queue_depth:
            log.warning("%d requests are cut off", left)
        self._client.abandon("the daemon is stopping")
        server.should_exit = True
        await asyncio.wait({serving}, timeout=5)
        self._bandit.detach()
        await self._client.close()
        if "bandit" in actors:  # the last to start: all are there
            await asyncio.wait(
                [
                    asyncio.ensure_future(actors["engine"].close.remote(2.0)),
                    asyncio.ensure_future(actors["bandit"].close.remote(5.0)),
                ],
                timeout=8,
            )
        for actor in actors.values():
            ray.kill(actor)


@contextmanager
def _no_signals() -> Iterator[None]:
    """uvicorn would otherwise take the signals that drain the daemon."""
    yield
