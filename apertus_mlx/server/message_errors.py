"""Errors in the form that Anthropic's clients read."""

from __future__ import annotations

import secrets
from typing import Any

from starlette.responses import JSONResponse

from apertus_mlx.server.errors import ApiError

PATH = "/v1/messages"
MESSAGE_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


def is_message_path(path: str) -> bool:
    """Whether a path is of Anthropic's API."""
    return path == PATH or path.startswith(f"{PATH}/")


def new_request_id() -> str:
    """What a client may name a request by."""
    return f"req_{secrets.token_hex(12)}"


def message_error(error: ApiError, request_id: str) -> dict[str, Any]:
    """The body of an error, or the event of a stream."""
    kind = MESSAGE_ERROR_TYPES.get(error.status, "api_error")
    told = {"type": kind, "message": error.message}
    return {"type": "error", "error": told, "request_id": request_id}


def message_error_response(error: ApiError) -> JSONResponse:
    """The response that tells of an error."""
    request_id = new_request_id()
    headers = {**error.headers, "request-id": request_id}
    return JSONResponse(message_error(error, request_id), error.status, headers)
