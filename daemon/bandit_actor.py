"""The bandit as a Ray actor, and the daemon's cached view of it."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import ray
from ray.exceptions import RayActorError

from specblock.bandit.config import ServiceConfig, StreamConfig
from specblock.bandit.service import BanditService
from specblock.bandit.stream import RedisStream
from specblock.daemon.actors import waiter
from specblock.daemon.config import DaemonConfig
from specblock.daemon.engine_client import one_line
from specblock.daemon.ray_actions import RayActions

log = logging.getLogger(__name__)

_REFRESH_S = 0.5
_TELL_EVERY_S = 60.0
_ERRORS = {
    "snapshot_errors": "its state cannot be written, is the disk of state_dir full?",
    "step_errors": "a step failed",
    "action_errors": "an update failed",
    "stream_errors": "Redis did not answer",
}


class BanditActor:
    """Runs the service loop in a thread; a restarted actor continues from the snapshot on disk."""

    def __init__(self, config: DaemonConfig, directory: str, stream: StreamConfig) -> None:
        # By name: a restarted actor's constructor arguments must not depend on the object store.
        engine = ray.get_actor("engine-0")
        # Without weights there is no trainer, and adaptation is off: nothing below ever asks for one.
        trainer = ray.get_actor("trainer") if config.drafter.has_weights else None
        adaptation = config.adaptation
        # Conversations per step times a typical length: only the first guess of a cost that is measured from then on.
        policy = adaptation.policy_config(positions_per_step=64 * config.trainer.batch_windows)
        service = ServiceConfig(
            directory=directory,
            decide_every_s=adaptation.decide_every_s,
            decide_every_events=adaptation.decide_every_events,
            block_s=min(0.5, stream.block_max_s),
        )
        self._service = BanditService(
            RedisStream(stream, waiter()), RayActions(engine, trainer, config.trainer.max_positions), policy, service
        )
        # The snapshot remembers a pause, which may be that of an earlier policy over the same state directory.
        if adaptation.enabled:
            self._service.resume()
        else:
            self._service.pause()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._service.run, args=(self._stop, time.time), name="bandit", daemon=True
        )
        self._thread.start()

    def __repr__(self) -> str:
        service: BanditService | None = getattr(self, "_service", None)
        return f"Bandit({service.status().stage})" if service else "Bandit(loading)"

    def status(self) -> Mapping[str, Any]:
        """The service at a glance, as plain values."""
        return asdict(self._service.status())

    def pause(self) -> None:
        """No decisions until resumed; events are still learned."""
        self._service.pause()

    def resume(self) -> None:
        """Decides again."""
        self._service.resume()

    def pid(self) -> int:
        """Process id of the actor's worker."""
        return os.getpid()

    def close(self, deadline_s: float) -> None:
        """Stops after the current step; the loop writes its last snapshot on the way out."""
        self._stop.set()
        self._thread.join(timeout=deadline_s)


class ErrorWatch:
    """Turns the bandit's error counters into lines for the daemon's log; its own log is with Ray's."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: dict[str, tuple[int, float]] = {}

    def new_errors(self, counters: Mapping[str, int]) -> list[str]:
        """One line per counter that grew, at most once a minute."""
        lines = []
        for name, what in _ERRORS.items():
            count, told_s = counters.get(name, 0), self._clock()
            seen, last_s = self._seen.get(name, (0, -math.inf))
            if count > seen and told_s - last_s >= _TELL_EVERY_S:
                lines.append(f"adaptation: {what} ({count} times so far); the bandit's log in Ray's directory says why")
                self._seen[name] = count, told_s
        return lines


class BanditView:
    """The latest status of the bandit actor, refreshed in the background so that no request waits for it."""

    def __init__(self) -> None:
        self._latest: Mapping[str, Any] = {}
        self._task: asyncio.Task[None] | None = None

    def status(self) -> Mapping[str, Any]:
        """At most a second old; empty until the bandit runs."""
        return self._latest

    def attach(self, bandit: Any) -> None:
        """Starts following."""
        self._task = asyncio.create_task(self._follow(bandit))

    def detach(self) -> None:
        """Stops following."""
        if self._task is not None:
            self._task.cancel()

    async def _follow(self, bandit: Any) -> None:
        told = False
        watch = ErrorWatch(time.monotonic)
        while True:
            try:
                self._latest, told = await bandit.status.remote(), False
                for line in watch.new_errors(self._latest.get("counters", {})):
                    log.error("%s", line)
            except RayActorError as error:
                if not told:
                    log.warning("the bandit is restarting: %s", one_line(error))
                told = True
            await asyncio.sleep(_REFRESH_S)
