"""Reads the body of a request: its type, its size, the time it takes, and strict JSON."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request

from apertus_mlx.errors import RejectedError
from apertus_mlx.server.errors import ApiError
from apertus_mlx.system.strict_json import parse_json

MAX_BODY_BYTES = 16 * 2**20
BODY_TIMEOUT_S = 30.0


async def read_body(
    request: Request, most: int = MAX_BODY_BYTES, timeout_s: float = BODY_TIMEOUT_S
) -> dict[str, Any]:
    """The JSON object that a request brings.

    Raises:
        ApiError: 415 another type than JSON, 413 too large, 408 too slow, 400 no JSON object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must have the type application/json", code="media_type")
    too_large = ApiError(413, f"the body is larger than {most:,} bytes", code="body_too_large")
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated[:30]) > most:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, "the body did not come in time", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away", code="disconnected") from None
    try:
        value = await asyncio.to_thread(parse_json, bytes(data), "the body")
    except RejectedError as error:
        raise ApiError(400, str(error), code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body: expected a JSON object", code="invalid_json")
    return value
