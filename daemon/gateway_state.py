"""What the routes of the endpoint share: readiness, limits, the model's name, running a checked request."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import anyio
from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from specblock.daemon.api_error import ApiError
from specblock.daemon.config import DaemonConfig
from specblock.daemon.errors import SpecblockError
from specblock.daemon.generation_job import AdmissionState, EngineClient, GenerationJob
from specblock.daemon.messages import EngineStatus
from specblock.daemon.metrics import GatewayMetrics
from specblock.daemon.openai_request import Batch, Limits, TextCodec
from specblock.daemon.openai_response import AnswerFormat, event_stream, whole_answer
from specblock.daemon.openai_schema import GenerationBody

_LOG = logging.getLogger(__name__)
RETRY_AFTER_S = 5
_MAX_LOGGED_FIELDS = 100
_REJECTIONS = {429: "queue_full", 500: "failed", 503: "unavailable"}


def served_name(config: DaemonConfig) -> str:
    """The model id clients see: a hub id as it is, a directory by its last component."""
    directory = config.target.directory
    return directory.absolute().name if directory is not None else config.target.model


class Gateway:
    """State and helpers behind the routes; one per app.

    Args:
        client: the engine.
        config: the daemon's configuration.
        codec: the target's tokenizer.
        rng: draws seeds and ids; use ``random.SystemRandom()`` outside tests.
        clock: monotonic seconds, for latencies.
        wall_clock: seconds since the epoch, for ``created``.
        version: of this package.
        bandit_status: the bandit's latest numbers, by name; published on /metrics and /specblock/status.
    """

    def __init__(
        self,
        client: EngineClient,
        config: DaemonConfig,
        codec: TextCodec,
        *,
        rng: random.Random,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        version: str,
        bandit_status: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.client = client
        self.config = config
        self.codec = codec
        self.rng = rng
        self.clock = clock
        self.wall_clock = wall_clock
        self.version = version
        self.bandit_status = bandit_status
        self.model = served_name(config)
        self.created_unix_s = int(wall_clock())
        self.draining = False
        self.admission = AdmissionState(limit=config.engine.slots + config.engine.max_waiting)
        self.metrics = GatewayMetrics(
            self.model,
            vllm_compat=config.metrics.vllm_compat,
            max_domain_labels=config.metrics.max_domain_labels,
        )
        self.limits = Limits(
            max_context_tokens=config.target.max_context_tokens,
            max_output_tokens=config.engine.max_output_tokens,
            vocab_size=codec.vocab_size,
        )
        self._logged_fields: set[str] = set()

    def drain(self) -> None:
        """Refuses new generations with 503 from now on; running ones go on."""
        self.draining = True

    def count_answer(self, status: int) -> None:
        """Counts an answer that is an error under its reason."""
        if reason := _REJECTIONS.get(status, "invalid" if 400 <= status < 499 else None):
            self.metrics.rejected(reason)

    def new_id(self) -> str:
        """128 random bits in hex."""
        return f"{self.rng.getrandbits(128):032x}"

    async def status(self) -> EngineStatus:
        """The engine's snapshot; an engine that cannot be asked counts as failed, a draining gateway as draining."""
        try:
            status = await self.client.status()
        except SpecblockError as error:
            _LOG.warning("the engine's status is unknown: %s", error)
            return EngineStatus(phase="failed", detail="the engine does not answer")
        if self.draining and status.phase == "ready":
            return replace(status, phase="draining")
        return status

    async def require_ready(self) -> None:
        """Lets a request through only while the engine serves.

        Raises:
            ApiError: 503 with the phase.
        """
        status = await self.status()
        if status.phase != "ready":
            text = f"the engine is {status.phase.replace('_', ' ')}" + (f": {status.detail}" if status.detail else "")
            raise ApiError(503, text, retry_after_s=RETRY_AFTER_S, phase=status.phase)

    def require_model(self, name: str | None) -> None:
        """Accepts the served name, the configured one, or none.

        Raises:
            ApiError: 404.
        """
        if name is not None and name not in (self.model, self.config.target.model):
            raise ApiError(404, f"the model {name!r} does not exist; this server has {self.model!r}", param="model")

    def log_unknown_fields(self, body: GenerationBody) -> None:
        """Logs each unknown field name once, and stops after a hundred names."""
        for name in body.unknown_fields:
            if name not in self._logged_fields and len(self._logged_fields) < _MAX_LOGGED_FIELDS:
                self._logged_fields.add(name)
                _LOG.warning("requests carry the unknown field %r; it is ignored", name[:64])

    async def answer(self, request: Request, body: GenerationBody, batch: Batch, *, chat: bool) -> Response:
        """Runs the generations of a checked request and answers whole or as a stream."""
        options = body.stream_options
        form = AnswerFormat(
            response_id=batch.requests[0].request_id.rpartition("-")[0],
            model=self.model,
            created_unix_s=int(self.wall_clock()),
            chat=chat,
            include_usage=options is not None and options.include_usage,
        )
        job = GenerationJob(self.client, batch, self.admission, self.metrics, self.clock)
        if body.stream:
            return JobStream(event_stream(job, form), job, self.metrics)
        try:
            return JSONResponse(await _unless_disconnected(request, whole_answer(job, form), self.metrics))
        finally:
            await _close(job)


class JobStream(StreamingResponse):
    """Server-sent events that end their job however the response ends, even if it never began."""

    def __init__(self, events: AsyncIterator[str], job: GenerationJob, metrics: GatewayMetrics) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._job = job
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        ended = False

        async def watched_send(message: Any) -> None:
            nonlocal ended
            await send(message)
            ended = ended or (message["type"] == "http.response.body" and not message.get("more_body"))

        try:
            await super().__call__(scope, receive, watched_send)
        finally:
            if not ended:
                self._metrics.rejected("client_gone")
            await _close(self._job)


async def _close(job: GenerationJob) -> None:
    with anyio.CancelScope(shield=True):  # the engine must hear of it even while this task is being cancelled
        await job.close()


async def _unless_disconnected(
    request: Request, work: Awaitable[dict[str, Any]], metrics: GatewayMetrics
) -> dict[str, Any]:
    """The result of ``work``, unless the client leaves first.

    Raises:
        ApiError: the client left; nobody reads the answer.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, watcher = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({answer, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            metrics.rejected("client_gone")
            raise ApiError(499, "the client closed the connection")
        return await answer
    finally:
        for task in (answer, watcher):
            task.cancel()
        await asyncio.gather(answer, watcher, return_exceptions=True)
