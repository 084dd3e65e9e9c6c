"""One HTTP request's generations while they run: admission, merging, timing, and cancelling whatever is left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol

from specblock.daemon.api_error import ApiError, bad_request
from specblock.daemon.errors import SpecblockError
from specblock.daemon.messages import EngineStatus, GenerationRequest, TokenChunk
from specblock.daemon.metrics import GatewayMetrics
from specblock.daemon.openai_request import Batch

_LOG = logging.getLogger(__name__)
_CANCEL_DEADLINE_S = 5.0


class EngineClient(Protocol):
    """The gateway's only way to the engine."""

    @property
    def queue_depth(self) -> int:
        """Requests submitted and not finished, over all users of the engine; must be cheap."""

    def submit(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Starts a request and yields its chunks; the last one carries ``finish_reason``.

        Raises:
            ValueError: while iterating, if the engine refuses the request; the message is for the caller.
            SpecblockError: while iterating, if the engine is gone.
        """

    async def cancel(self, request_id: str) -> None:
        """Drops a request; unknown ids are fine."""

    async def status(self) -> EngineStatus:
        """A recent snapshot; called for every request and every scrape, so it must not wait for the engine."""


@dataclass(frozen=True, slots=True)
class IndexedChunk:
    """A chunk of the ``index``-th generation of a job."""

    index: int
    chunk: TokenChunk


@dataclass(slots=True)
class AdmissionState:
    """How many generations this gateway has running; ``limit`` is slots plus waiting places."""

    limit: int
    running: int = 0

    def admit(self, count: int, queue_depth: int) -> None:
        """Reserves places.

        Raises:
            ApiError: 400 if the request can never fit, 429 if it does not fit now.
        """
        if count > self.limit:
            raise bad_request(f"prompts times n = {count} exceeds the {self.limit} places of this server", "n")
        if max(self.running, queue_depth) + count > self.limit:
            raise ApiError(429, "the queue is full; try again later", retry_after_s=1)
        self.running += count


@dataclass(slots=True)
class _Progress:
    started_s: float
    last_s: float
    tokens: int = 0
    done: bool = False


@dataclass(slots=True)
class GenerationJob:
    """Runs the generations of one HTTP request; ``close`` must be called once whatever happens.

    Admission is reserved by the constructor, so a job that exists has its places.
    """

    client: EngineClient
    batch: Batch
    admission: AdmissionState
    metrics: GatewayMetrics
    clock: Callable[[], float]
    _queue: asyncio.Queue[IndexedChunk | Exception] = field(default_factory=asyncio.Queue)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _progress: list[_Progress] = field(default_factory=list)
    _closed: bool = False

    def __post_init__(self) -> None:
        self.admission.admit(len(self.batch.requests), self.client.queue_depth)
        now_s = self.clock()
        self._progress = [_Progress(now_s, now_s) for _ in self.batch.requests]

    @property
    def complete(self) -> bool:
        """True once every generation ended."""
        return all(progress.done for progress in self._progress)

    async def chunks(self) -> AsyncIterator[IndexedChunk]:
        """Chunks of all generations as they come, until each has its last.

        Raises:
            ApiError: 400 if the engine refused a request, 500 if one failed, 503 if the engine is gone.
        """
        self._tasks = [asyncio.create_task(self._pump(index)) for index in range(len(self.batch.requests))]
        while not self.complete:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise _as_api_error(item)
            yield self._seen(item)

    async def close(self) -> None:
        """Cancels what still runs and gives the places back."""
        if self._closed:
            return
        self._closed = True
        self.admission.running -= len(self.batch.requests)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        started = zip(self.batch.requests, self._progress, strict=True) if self._tasks else ()
        for request, progress in started:
            if not progress.done:
                await self._cancel(request.request_id)

    async def _cancel(self, request_id: str) -> None:
        try:
            await asyncio.wait_for(self.client.cancel(request_id), _CANCEL_DEADLINE_S)
        except Exception as error:  # an engine that cannot be told is gone, and the request with it
            _LOG.warning("request %s could not be cancelled: %r", request_id, error)

    async def _pump(self, index: int) -> None:
        try:
            async for chunk in self.client.submit(self.batch.requests[index]):
                self._queue.put_nowait(IndexedChunk(index, chunk))
                if chunk.finish_reason is not None:
                    return
            self._queue.put_nowait(RuntimeError("the engine ended a request without a last chunk"))
        except Exception as error:  # handed over to chunks(), which raises it
            self._queue.put_nowait(error)

    def _seen(self, item: IndexedChunk) -> IndexedChunk:
        progress, chunk, now_s = self._progress[item.index], item.chunk, self.clock()
        if chunk.tokens:
            if progress.tokens:
                self.metrics.later_tokens(now_s - progress.last_s, len(chunk.tokens))
            else:
                self.metrics.first_token(now_s - progress.started_s)
            progress.tokens += len(chunk.tokens)
            progress.last_s = now_s
        if chunk.finish_reason is not None:
            progress.done = True
            if chunk.stats is not None and chunk.finish_reason in ("stop", "length"):
                domain = self.batch.requests[item.index].domain
                self.metrics.finished(domain, chunk.stats, now_s - progress.started_s)
        if chunk.finish_reason == "error":
            raise _as_api_error(RuntimeError(chunk.error or "the engine reported an error"))
        return item


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SpecblockError):
        _LOG.error("the engine is unavailable: %s", error)
        return ApiError(503, "the engine is unavailable", retry_after_s=5)
    if isinstance(error, ValueError):
        param = str(error).partition(":")[0]  # the engine starts its messages with the field's name
        return bad_request(str(error), param if param.isidentifier() else None)
    _LOG.error("a generation failed: %s", error, exc_info=error)
    return ApiError(500, "the generation failed; the server's log says why")
