"""Ray shells: they build the plain classes from the configuration and pass calls through. They decide nothing."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from specblock.bandit.actions import CompareReport, Focus, Mix, ParityReport, TrainReport
from specblock.bandit.config import Arm, StreamConfig
from specblock.bandit.producer import EventProducer
from specblock.bandit.reach import newest_of_each
from specblock.bandit.stream import RedisStream
from specblock.daemon.config import DaemonConfig
from specblock.daemon.cost_profile import profiled_planner
from specblock.daemon.engine import Engine, EngineSettings
from specblock.daemon.engine_host import EngineHost, SwapResult
from specblock.daemon.feedback import Feedback
from specblock.daemon.messages import EngineStatus, GenerationRequest, TokenChunk
from specblock.daemon.models import draft_settings, format_of, load_target, serving_drafter
from specblock.daemon.registry import DrafterRegistry
from specblock.daemon.threads import use_threads
from specblock.daemon.trainer import Trainer, Weights
from specblock.daemon.windows import DomainCount, WindowLimits, WindowStore, in_mix
from specblock.drafter.interface import AnyDrafter
from specblock.drafter.window import Window
from specblock.verifier.model import TargetModel

_TRAINER_NICENESS = 10  # on shared cores serving goes before learning


def waiter() -> Callable[[float], object]:
    """A pause that needs no sleep loop: an event that is never set."""
    return threading.Event().wait


def newest_within(windows: Sequence[Window], most_positions: int) -> list[Window]:
    """The newest of ``windows`` (oldest first), some of every domain, with so many positions together or always one."""
    sizes = [window.tokens.shape[0] - 1 for window in windows]
    return [windows[i] for i in newest_of_each([window.domain for window in windows], sizes, most_positions)]


def window_limits(config: DaemonConfig) -> WindowLimits:
    """What the window store of an engine may hold."""
    limits = config.windows
    return WindowLimits(
        budget_bytes=limits.budget_bytes,
        per_domain_quota=limits.per_domain_quota,
        heldout_fraction=limits.heldout_fraction,
        max_window_tokens=limits.max_window_tokens,
        ttl_s=limits.ttl_s,
    )


def serving_version(config: DaemonConfig) -> tuple[str, Path | None]:
    """Name and verified weights of the drafter to serve; one without weights has no versions and goes by its kind.

    Raises:
        CorruptVersionError: the weights are missing or damaged.
    """
    if not config.drafter.has_weights:
        return config.drafter.kind, None
    registry = DrafterRegistry(Path(config.state_dir))
    version = registry.serving()
    assert version is not None, "the daemon imports a base drafter before it starts engines"
    return version, registry.path(version)


class EngineActor:
    """Verifier and inference drafter on one device, with the event producer beside them."""

    def __init__(self, config: DaemonConfig, name: str, stream: StreamConfig | None) -> None:
        self._name = name
        version, weights = serving_version(config)
        target = load_target(
            config.target.source,
            format_of(config),
            config.target.device,
            config.target.revision,
            graphs=config.engine.cuda_graphs,
        )
        self._threads = use_threads(config, target, time.perf_counter)
        drafter = self.load_drafter(config, target, weights)
        self._keeps_windows = config.drafter.has_weights
        self._windows = WindowStore(window_limits(config), time.time)
        self._producer: EventProducer | None = None
        if stream is not None:
            incarnation = f"{name}-{os.getpid()}-{time.time_ns()}"
            self._producer = EventProducer(RedisStream(stream, waiter()), incarnation)
            self._producer.start()
        feedback = Feedback(self._producer, self._windows, name, time.time, lambda: len(engine.running))
        settings = EngineSettings(
            slots=config.engine.slots,
            capacity_tokens=config.target.max_context_tokens,
            prefill_chunk_tokens=config.engine.prefill_chunk_tokens,
            top_k=config.windows.top_k,
            segment_cycles=config.engine.segment_cycles,
        )
        chosen = config.drafter.tree == "cost_chosen"
        planner = profiled_planner(target, drafter, config.engine.slots, os.getpid()) if chosen else None
        engine = Engine(target, drafter, settings, time.perf_counter, feedback, version, planner)
        engine.speculation = config.engine.speculation
        engine.use_graphs()
        # Requests pass through the waiting line on their way to a free slot; the gateway's 429 is the real limit.
        places = config.engine.slots + config.engine.max_waiting
        self._host = EngineHost(engine, self._windows, config.engine.stream_interval_s, places)
        # What start-up made, imports above all, lives as long as the engine: a full collection that looks through it
        # would stop decoding for many cycles.
        gc.collect()
        gc.freeze()

    def load_drafter(self, config: DaemonConfig, target: TargetModel, weights: Path | None) -> AnyDrafter:
        """The inference drafter, with its weights if it has any."""
        return serving_drafter(config, target, weights)

    def __repr__(self) -> str:
        # Ray asks for the name of an actor whose constructor failed, too; a second error would hide the first.
        host: EngineHost | None = getattr(self, "_host", None)
        serves = f"drafter {host.engine.drafter_version}" if host else "loading"
        return f"Engine({self._name}, {serves})"

    def submit(self, request: GenerationRequest) -> None:
        """See EngineHost.submit."""
        # Nobody trains on windows of a drafter without weights: they would only fill memory.
        self._host.submit(request if self._keeps_windows else replace(request, collect=False))

    def cancel(self, request_id: str) -> None:
        """See EngineHost.cancel."""
        self._host.cancel(request_id)

    def next_chunks(self, timeout_s: float) -> list[TokenChunk]:
        """See EngineHost.next_chunks."""
        return self._host.next_chunks(timeout_s)

    def status(self) -> EngineStatus:
        """Engine counters with the producer's added."""
        status = self._host.status()
        if self._producer is None:
            return status
        stats = self._producer.stats()
        return replace(status, events_sent=stats.sent, events_dropped=stats.dropped + stats.lost)

    def pid(self) -> int:
        """Process id of the actor's worker."""
        return os.getpid()

    def threads(self) -> str:
        """See ``use_threads``; for the daemon's log, which a worker cannot write to."""
        return self._threads

    def swap(self, version: str, weights: Weights) -> SwapResult:
        """See EngineHost.swap."""
        return self._host.swap(version, weights)

    def window_summary(self) -> tuple[DomainCount, ...]:
        """What is kept per domain."""
        return self._windows.summary()

    def pull_windows(
        self,
        heldout: bool | None,
        after_time_s: float | None,
        version: str | None,
        most: int,
        most_positions: int | None = None,
        mix: Mix | None = None,
    ) -> list[Window]:
        """The newest windows that match, within both limits, oldest first; they travel through the object store."""
        found = self._windows.pull(heldout=heldout, after_time_s=after_time_s, version=version)
        found = in_mix(found, mix)[-most:]
        return found if most_positions is None else newest_within(found, most_positions)

    def close(self, deadline_s: float) -> None:
        """Stops decoding and flushes events."""
        self._host.close()
        if self._producer is not None:
            self._producer.close(deadline_s)


class TrainerActor:
    """Online updates, replay and the registry of versions."""

    def __init__(self, config: DaemonConfig) -> None:
        os.nice(_TRAINER_NICENESS)
        torch.set_num_threads(config.trainer.threads)
        # The target is loaded on the CPU, because only its embedding is kept.
        target = load_target(config.target.source, format_of(config), "cpu", config.target.revision)
        self._registry = DrafterRegistry(Path(config.state_dir))
        self._trainer = Trainer(
            target.embedding.to(config.trainer.device, copy=True),
            self._registry,
            draft_settings(config),
            format_of(config),
            config.trainer,
        )

    def __repr__(self) -> str:
        registry: DrafterRegistry | None = getattr(self, "_registry", None)
        return f"Trainer(serving {registry.serving()})" if registry else "Trainer(loading)"

    def train(
        self,
        decision_id: str,
        arm: Arm,
        base_version: str,
        fraction: float,
        resume: bool,
        windows: list[Window],
        focus: dict[str, Focus],
    ) -> TrainReport:
        """See Trainer.train."""
        return self._trainer.train(decision_id, arm, base_version, fraction, resume, windows, focus)

    def parity(self, version: str, windows: list[Window]) -> ParityReport:
        """See Trainer.parity."""
        return self._trainer.parity(version, windows)

    def compare(self, old: str, new: str, windows: list[Window], cycle_s: float) -> CompareReport:
        """See Trainer.compare."""
        return self._trainer.compare(old, new, windows, cycle_s)

    def store(self, candidate: str, decision_id: str) -> str:
        """Writes a candidate to the registry."""
        return self._trainer.store(candidate, decision_id)

    def weights(self, version: str) -> Weights:
        """State of a version, for a swap."""
        return self._trainer.weights(version)

    def versions(self) -> tuple[str, ...]:
        """Stored versions; see Trainer.versions."""
        return self._trainer.versions()

    def promote(self, version: str) -> None:
        """Makes ``version`` the one that a restart comes back with."""
        self._registry.promote(version)

    def discard(self, candidate: str) -> None:
        """Forgets a candidate."""
        self._trainer.discard(candidate)

    def pid(self) -> int:
        """Process id of the actor's worker."""
        return os.getpid()


def remote_options(name: str, num_cpus: float, num_gpus: float, concurrency: int, restarts: int) -> dict[str, Any]:
    """Options every actor shares: owned by the daemon, a bounded number of restarts, no silent retries of calls."""
    return {
        "name": name,
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "max_concurrency": concurrency,
        "max_restarts": restarts,
        "max_task_retries": 0,
    }
