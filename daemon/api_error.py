"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: HTTP status.
        message: for the caller; never holds internals.
        param: the request field it is about.
        retry_after_s: sent as ``Retry-After``, whole seconds.
        phase: the engine's phase, when that is the reason.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        phase: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.phase = phase

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "Error"),
            "param": self.param,
            "code": self.status,
        }
        return {"error": error} if self.phase is None else {"error": error, "phase": self.phase}

    @property
    def headers(self) -> dict[str, str]:
        """Extra response headers."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def bad_request(message: str, param: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param)
