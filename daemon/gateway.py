"""The OpenAI-compatible endpoint (FastAPI): routes and the order of their checks.

``create_app`` needs only an ``EngineClient`` and a tokenizer, so tests run it against a scripted engine.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from specblock.daemon.api_error import ApiError, bad_request
from specblock.daemon.config import DaemonConfig
from specblock.daemon.errors import SpecblockError
from specblock.daemon.gateway_middleware import RequestGuard, error_response
from specblock.daemon.generation_job import AdmissionState, EngineClient, GenerationJob
from specblock.daemon.messages import EngineStatus
from specblock.daemon.metrics import CONTENT_TYPE, GatewayMetrics
from specblock.daemon.openai_request import Batch, Limits, TextCodec, chat_batch, completion_batch, fresh_seed
from specblock.daemon.openai_response import AnswerFormat, event_stream, whole_answer
from specblock.daemon.openai_schema import ChatBody, CompletionBody, GenerationBody

_LOG = logging.getLogger(__name__)
_RETRY_AFTER_S = 5
_MAX_LOGGED_FIELDS = 100
_REJECTIONS = {429: "queue_full", 500: "failed", 503: "unavailable"}


def served_name(config: DaemonConfig) -> str:
    """The model id clients see: a hub id as it is, a directory by its last component."""
    model = config.target.model
    return Path(model).name if Path(model).is_dir() or model.startswith((".", "/", "~")) else model


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
            values = {name: getattr(status, name) for name in EngineStatus.__dataclass_fields__}
            return EngineStatus(**{**values, "phase": "draining"})
        return status

    async def require_ready(self) -> None:
        """Lets a request through only while the engine serves.

        Raises:
            ApiError: 503 with the phase.
        """
        status = await self.status()
        if status.phase != "ready":
            text = f"the engine is {status.phase.replace('_', ' ')}" + (f": {status.detail}" if status.detail else "")
            raise ApiError(503, text, retry_after_s=_RETRY_AFTER_S, phase=status.phase)

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


def create_app(
    client: EngineClient,
    config: DaemonConfig,
    codec: TextCodec,
    *,
    rng: random.Random,
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
    version: str,
    bandit_status: Callable[[], Mapping[str, Any]] = dict,
) -> FastAPI:
    """The ASGI application; see ``Gateway`` for the arguments. ``app.state.gateway`` is the Gateway."""
    gateway = Gateway(
        client,
        config,
        codec,
        rng=rng,
        clock=clock,
        wall_clock=wall_clock,
        version=version,
        bandit_status=bandit_status,
    )
    app = FastAPI(title="specblockd", version=version)
    app.state.gateway = gateway
    _add_error_handlers(app)
    _add_generation_routes(app, gateway)
    _add_information_routes(app, gateway)
    app.add_middleware(
        RequestGuard,
        api_key=config.http.api_key,
        # Generous: 64 bytes per token of context, and room for a batch of prompts.
        max_body_bytes=max(1 << 20, 64 * config.target.max_context_tokens) * 4,
        new_id=gateway.new_id,
        count=gateway.count_answer,
    )
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_response(bad_request(f"the body is not valid JSON: {first['ctx']['error']}"))
        path = [str(part) for part in first["loc"] if part != "body"]
        if not path:
            return error_response(bad_request("the body must be a JSON object (Content-Type: application/json)"))
        message = f"{path[0]}: {first['msg']}" if first["type"] != "missing" else f"{path[0]} is required"
        return error_response(bad_request(message, path[0]))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return error_response(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "internal error; the server's log says why"))


def _add_generation_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continues one or several prompts."""
        gateway.require_model(body.model)
        gateway.log_unknown_fields(body)
        await gateway.require_ready()
        batch = completion_batch(
            body,
            request.headers,
            f"cmpl-{gateway.new_id()}",
            gateway.codec,
            gateway.limits,
            fresh_seed(gateway.rng),
        )
        return await gateway.answer(request, body, batch, chat=False)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answers a conversation, if the model's tokenizer has a chat template."""
        gateway.require_model(body.model)
        gateway.log_unknown_fields(body)
        await gateway.require_ready()
        batch = chat_batch(
            body,
            request.headers,
            f"chatcmpl-{gateway.new_id()}",
            gateway.codec,
            gateway.limits,
            fresh_seed(gateway.rng),
        )
        return await gateway.answer(request, body, batch, chat=True)


def _add_information_routes(app: FastAPI, gateway: Gateway) -> None:
    def model_card() -> dict[str, Any]:
        return {
            "id": gateway.model,
            "object": "model",
            "created": gateway.created_unix_s,
            "owned_by": "specblock",
            "max_model_len": gateway.limits.max_context_tokens,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one served model."""
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The card of a model."""
        gateway.require_model(name)
        return model_card()

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """200 while requests are served; 503 with the phase while loading, draining or failed."""
        status = await gateway.status()
        ready = status.phase == "ready"
        return JSONResponse(
            {"status": "ok" if ready else "unavailable", "phase": status.phase, "detail": status.detail},
            status_code=200 if ready else 503,
            headers={} if ready else {"retry-after": str(_RETRY_AFTER_S)},
        )

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """200 as long as the process answers."""
        return {"status": "ok"}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Prometheus text."""
        text = gateway.metrics.render(await gateway.status(), gateway.bandit_status())
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    @app.get("/specblock/status", response_model=None)
    async def status() -> Response:
        """Engine snapshot and bandit status, for ``specblockd status``."""
        engine = asdict(await gateway.status())
        return JSONResponse(
            {
                "model": gateway.model,
                "version": gateway.version,
                "engine": engine,
                "bandit": {**gateway.bandit_status()},
            }
        )

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The package's version."""
        return {"version": gateway.version}
