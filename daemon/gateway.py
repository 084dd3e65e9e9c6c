"""The OpenAI-compatible endpoint (FastAPI): routes and the order of their checks.

``create_app`` needs only an ``EngineClient`` and a tokenizer, so tests run it against a scripted engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from specblock.daemon.api_error import ApiError, bad_request
from specblock.daemon.config import DaemonConfig
from specblock.daemon.gateway_middleware import RequestGuard, error_response
from specblock.daemon.gateway_state import RETRY_AFTER_S, Gateway
from specblock.daemon.generation_job import EngineClient
from specblock.daemon.metrics import CONTENT_TYPE
from specblock.daemon.openai_request import TextCodec, TransformersCodec, chat_batch, completion_batch, fresh_seed
from specblock.daemon.openai_schema import ChatBody, CompletionBody


def create_app(
    client: EngineClient,
    config: DaemonConfig,
    tokenizer: Any,
    *,
    rng: random.Random,
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
    version: str,
    bandit_status: Callable[[], Mapping[str, Any]] = dict,
) -> FastAPI:
    """The ASGI application; ``app.state.gateway`` is its ``Gateway``, which describes the other arguments.

    Args:
        tokenizer: a transformers tokenizer, or anything with the methods of ``TextCodec``.
    """
    codec = tokenizer if isinstance(tokenizer, TextCodec) else TransformersCodec(tokenizer)
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
        if path[0] == "prompt" and first["type"] != "missing":  # its four forms each complain in their own way
            return error_response(bad_request("prompt must be text, token ids, or a list of one of them", "prompt"))
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

    @app.api_route("/health", methods=["GET", "HEAD"], response_model=None)
    async def health() -> Response:
        """200 while requests are served; 503 with the phase while loading, draining or failed."""
        status = await gateway.status()
        ready = status.phase == "ready"
        return JSONResponse(
            {"status": "ok" if ready else "unavailable", "phase": status.phase, "detail": status.detail},
            status_code=200 if ready else 503,
            headers={} if ready else {"retry-after": str(RETRY_AFTER_S)},
        )

    @app.api_route("/health/live", methods=["GET", "HEAD"])
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
        engine, off = asdict(await gateway.status()), gateway.config.adaptation_off
        return JSONResponse(
            {
                "model": gateway.model,
                "version": gateway.version,
                "dtype": gateway.config.target.dtype,
                "engine": engine,
                "adaptation": {"enabled": not off, "reason": off},
                "bandit": {**gateway.bandit_status()},
            }
        )

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The package's version and the number format the models run in."""
        return {"version": gateway.version, "dtype": gateway.config.target.dtype}
