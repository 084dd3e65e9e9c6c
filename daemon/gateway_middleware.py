"""Around every HTTP request: id, size limit, API key, answer counter. Plain ASGI, so that disconnects get through."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specblock.daemon.api_error import ApiError

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
REQUEST_ID_HEADER = "x-request-id"


def error_response(error: ApiError) -> JSONResponse:
    """The JSON answer of an error."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


class RequestGuard:
    """Outermost layer.

    Args:
        app: what it guards.
        api_key: Bearer token asked for on everything but /health*; None asks for none.
        max_body_bytes: longer bodies are answered with 413.
        new_id: makes a request id when the client sent none.
        count: called with the status code of every answer but those of /health*, which are no requests for work.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        max_body_bytes: int,
        new_id: Callable[[], str],
        count: Callable[[int], None],
    ) -> None:
        self._app = app
        self._key_digest = None if api_key is None else hashlib.sha256(api_key.encode()).digest()
        self._max_body_bytes = max_body_bytes
        self._new_id = new_id
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection event."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else self._new_id()
        scope.setdefault("state", {})["request_id"] = request_id

        open_path = scope["path"] == "/health" or scope["path"].startswith("/health/")
        body = _LimitedBody(receive, self._max_body_bytes)

        async def tagged_send(message: Message) -> None:
            if body.too_large:
                return  # FastAPI turns the failed read into a 400; the caller gets the 413 below
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
                if not open_path:
                    self._count(message["status"])
            await send(message)

        refusal = self._refusal(open_path, headers)
        if refusal is None:
            await self._app(scope, body.receive, tagged_send)
            refusal = body.refusal()
        if refusal is not None:
            await error_response(refusal)(scope, receive, tagged_send)

    def _refusal(self, open_path: bool, headers: Headers) -> ApiError | None:
        if self._key_digest is not None and not open_path and not self._key_matches(headers):
            return ApiError(401, "a valid API key is needed: Authorization: Bearer <key>")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return _too_large(self._max_body_bytes)
        return None

    def _key_matches(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Hashes have one length, so the comparison's time says nothing about the key.
        digest = hashlib.sha256(key.strip().encode()).digest()
        assert self._key_digest is not None
        return hmac.compare_digest(digest, self._key_digest) and scheme.lower() == "bearer"


def _too_large(limit_bytes: int) -> ApiError:
    return ApiError(413, f"the request body is larger than {limit_bytes} bytes")


class _LimitedBody:
    """Counts body bytes of requests that did not announce their length."""

    def __init__(self, receive: Receive, limit_bytes: int) -> None:
        self._receive = receive
        self._limit_bytes = limit_bytes
        self._received_bytes = 0
        self.too_large = False

    async def receive(self) -> Message:
        """The next message; a body beyond the limit ends like a lost connection."""
        message = await self._receive()
        self._received_bytes += len(message.get("body", b""))
        if self._received_bytes > self._limit_bytes:
            self.too_large = True
            return {"type": "http.disconnect"}
        return message

    def refusal(self) -> ApiError | None:
        """The 413, if the body was too large; nothing was sent then."""
        self.too_large, found = False, self.too_large
        return _too_large(self._limit_bytes) if found else None
