"""The gateway's way to the engine actor: one call per request, one stream of chunks for all of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError

from specblock.daemon.errors import DependencyError
from specblock.daemon.messages import EngineStatus, GenerationRequest, TokenChunk

log = logging.getLogger(__name__)

_POLL_S = 1.0


class RayEngineClient:
    """Implements the gateway's EngineClient over an engine actor handle."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._queues: dict[str, asyncio.Queue[TokenChunk]] = {}
        self._status = EngineStatus(phase="loading", detail="starting")
        self._tasks: list[asyncio.Task[None]] = []
        self._phase_override = ""

    @property
    def queue_depth(self) -> int:
        """Requests submitted and not finished."""
        return len(self._queues)

    def attach(self, engine: Any) -> None:
        """Starts following an engine that has loaded."""
        self._engine = engine
        self._tasks = [asyncio.create_task(self._pump()), asyncio.create_task(self._watch())]

    def report(self, phase: str, detail: str) -> None:
        """Shows a phase while the engine cannot speak for itself (loading, draining, failed)."""
        self._phase_override = phase
        self._status = replace(self._status, phase=phase, detail=detail)

    async def submit(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Starts a request and yields its chunks until the last one."""
        queue: asyncio.Queue[TokenChunk] = asyncio.Queue()
        self._queues[request.request_id] = queue
        try:
            await self._engine.submit.remote(request)
            while True:
                chunk = await queue.get()
                if chunk.finish_reason == "error":
                    raise DependencyError(chunk.error or "the engine failed")
                yield chunk
                if chunk.finish_reason is not None:
                    return
        except RayActorError as error:
            raise DependencyError(f"the engine is gone: {error}") from None
        finally:
            self._queues.pop(request.request_id, None)

    async def cancel(self, request_id: str) -> None:
        """Drops a request; unknown ids are fine."""
        if self._engine is not None:
            await self._engine.cancel.remote(request_id)

    async def status(self) -> EngineStatus:
        """The latest snapshot, at most a second old."""
        return self._status

    async def close(self) -> None:
        """Stops following the engine."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pump(self) -> None:
        while True:
            try:
                chunks = await self._engine.next_chunks.remote(_POLL_S)
            except RayActorError as error:
                await self._engine_lost(error)
                continue
            for chunk in chunks:
                queue = self._queues.get(chunk.request_id)
                if queue is not None:
                    queue.put_nowait(chunk)

    async def _watch(self) -> None:
        while True:
            try:
                status = await self._engine.status.remote()
            except RayActorError:
                await asyncio.sleep(_POLL_S)
                continue
            if self._phase_override:
                status = replace(status, phase=self._phase_override)
            self._status = status
            await asyncio.sleep(_POLL_S / 4)

    async def _engine_lost(self, error: RayActorError) -> None:
        """Ray restarts the actor; what it was answering is answered with an error instead of silence."""
        log.error("the engine died, %d requests lost: %s", len(self._queues), error)
        self._status = replace(self._status, phase="loading", detail="the engine is restarting")
        for name, queue in list(self._queues.items()):
            queue.put_nowait(
                TokenChunk(request_id=name, tokens=(), text="", finish_reason="error", error="the engine restarted")
            )
        await asyncio.sleep(_POLL_S)
