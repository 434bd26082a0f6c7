"""What a client is told when a request fails: a status, and OpenAI's object of an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from apertus_mlx.errors import ApertusError, ResourceError, TooLongError, UsageError
from apertus_mlx.system.foreign_errors import explain

RETRY_AFTER_S = 2
# What a client is told of a status, in docs/server.md and in the description.
STATUSES = {
    400: "anything in the body is wrong, empty, too long for the context "
    "(`context_length_exceeded`) or not supported; `param` says what",
    401: "the key is missing or wrong",
    403: "another Host or Origin",
    404: "no such path or model",
    405: "no such method here",
    408: "headers or body came too slowly, or the answer was read too slowly",
    413: "a body over 16 MiB",
    415: "a body that is not `application/json`",
    429: "too many requests wait; with `Retry-After`",
    503: "loading, shutting down or too little memory; with `Retry-After`, and "
    "`x-should-retry: false` where that is no use",
    500: "our fault; the log says more",
}
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}
# `messages[3].tool_call_id: ...` and `--stop: ...`: where a message of ours says what is wrong.
_PLACE = re.compile(r"^(?:--)?([a-z_][\w.\-\[\]]*)(?: [^:]{1,80})?: ")

# Files and folders of this machine are not for clients.
_OWN_FILE = re.compile(r"^[^:]*(?:/|\.jinja|\.json\b)[^:]*: ")


class ApiError(Exception):
    """A failed request.

    Attributes:
        status: of HTTP.
        message: one line for the client.
        param: what in the body is wrong.
        code: what a program can tell the error by.
        headers: to send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        return {
            "error": {
                "message": self.message,
                "type": ERROR_TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def wrong(param: str, words: str, code: str = "invalid_value") -> ApiError:
    """400: `words` continue the name of what is wrong."""
    return ApiError(400, f"{param}: {words}", param=param, code=code)


def busy(status: int, message: str, code: str, *, final: bool = False) -> ApiError:
    """429 or 503. `final`: trying again will not help."""
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    if final:
        headers["x-should-retry"] = "false"
    return ApiError(status, message, code=code, headers=headers)


def in_request(error: ApertusError, param: str) -> ApiError:
    """What a request has met before anything was computed: the request is wrong.

    `param` is what is to blame unless the message says more.
    """
    message = str(error)
    if isinstance(error, ResourceError):
        return busy(503, message, "no_memory")
    code = "context_length_exceeded" if isinstance(error, TooLongError) else "invalid_value"
    place = _PLACE.match(message)
    message = _OWN_FILE.sub("", message)
    found = place[1] if place and place[1].startswith(param.partition(".")[0]) else param
    return ApiError(400, message, param=found, code=code)


def in_engine(error: Exception) -> ApiError:
    """What a request has met while it was computed."""
    known = explain(error)
    if isinstance(known, ResourceError):
        return busy(503, "there is not enough memory for this request", "no_memory")
    if isinstance(known, UsageError):
        return in_request(known, "messages")
    return ApiError(500, "the server failed on this request; its log says why", code="internal")
