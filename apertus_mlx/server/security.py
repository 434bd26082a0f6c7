"""Who may ask: the Host that a request names, the web page that sends it, and the key."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response

from apertus_mlx.server.chat_page import FILES
from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.message_errors import is_message_path, message_error_response

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
# What tells nothing about the model or its users.
_OPEN_PATHS = ("/health",)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask.

    Attributes:
        hosts: names beside those of the loopback that a request may give as its Host.
        any_address: whether a Host may be any address in numbers: the server listens on all.
        origins: web pages beside those of this machine, such as `https://chat.example`.
        key: what a request must bring; None: nothing.
    """

    hosts: Sequence[str] = ()
    any_address: bool = False
    origins: Sequence[str] = ()
    key: str | None = None

    def check(self, headers: Headers, path: str, query: bytes = b"", method: str = "GET") -> None:
        """Refuse a request.

        Raises:
            ApiError: 403 its Host or Origin, 401 its key.
        """
        if not self._knows(headers.get("host", "")):
            raise ApiError(403, "this Host is not served here; see --allow-host", code="host")
        origin = headers.get("origin")
        if origin is not None and not self.allows_origin(origin, headers.get("host", "")):
            raise ApiError(403, "this Origin may not ask; see --allow-origin", code="origin")
        if path in FILES or (path in _OPEN_PATHS and not query):
            return
        if self.key is not None and method != "OPTIONS" and not self._has_key(headers):
            raise ApiError(
                401,
                "the key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def allows_origin(self, origin: str, host: str = "") -> bool:
        """Whether a web page may ask; that of `host` itself, which is known, may always."""
        if origin in self.origins:
            return True
        try:
            found = urlsplit(origin)
            own = found.netloc == host or is_loopback(found.hostname or "")
            return found.scheme in ("http", "https") and own
        except ValueError:
            return False

    def _knows(self, host: str) -> bool:
        name = _without_port(host.lower())
        if name in LOOPBACK or name in self.hosts:
            return True
        if not self.any_address:
            return False
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, value = headers.get("authorization", "").partition(" ")
        brought = [headers.get("x-api-key", "")]
        if scheme.lower() == "bearer":
            brought.append(value.strip())
        wanted = (self.key or "").encode()
        return any(hmac.compare_digest(each.encode(), wanted) for each in brought)


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    if colon and port.isascii() and port.isdecimal() and (":" not in name or name.endswith("]")):
        return name
    return host


class Guard:
    """Lets through what `access` allows, and answers what browsers ask first."""

    def __init__(self, app: Application, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._access.check(
                headers, scope["path"], scope.get("query_string", b""), scope["method"]
            )
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        origin = headers.get("origin")
        if scope["method"] == "OPTIONS" and origin is not None:
            allowed = Response(status_code=204, headers=_cors(origin))
            await allowed(scope, receive, send)
            return

        async def with_origin(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and origin is not None:
                pairs: Iterable[tuple[str, str]] = _cors(origin).items()
                added = [(k.lower().encode(), v.encode()) for k, v in pairs]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        await self._app(scope, receive, with_origin)


def _cors(origin: str) -> dict[str, str]:
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": "GET, POST, DELETE",
        "Access-Control-Allow-Headers": "authorization, content-type, x-api-key, "
        "anthropic-version, anthropic-beta, anthropic-dangerous-direct-browser-access",
        "Vary": "Origin",
    }


def error_response(error: ApiError, path: str) -> JSONResponse:
    """The response that tells of an error, in the form of the API that a path is of."""
    if is_message_path(path):
        return message_error_response(error)
    return JSONResponse(error.body(), error.status, error.headers)
