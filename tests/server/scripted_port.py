"""A port behind which a script speaks: one answer for each chat, in order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.security import error_response
from tests.server.scripted import ScriptedServer, scripted
from tests.server.wire import Wire

Said = Sequence[str | int]


class ScriptedPort:
    """Answers what `answers` has next."""

    def __init__(self, double: ScriptedServer) -> None:
        self._double, self._app = double, double.server.app
        self.answers: list[Said] = []
        # After so many parts of a stream no other comes until the client goes away.
        self.hold_after: int | None = None
        # The status and message that chats are refused with.
        self.refusal: tuple[int, str] | None = None
        double.server.app = self._serve
        self._wire = Wire(double.server)
        self.base = f"http://127.0.0.1:{self._wire.port}/v1"

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"].endswith("/chat/completions"):
            if self.refusal is not None:
                status, words = self.refusal
                error = ApiError(status, words, headers={"Retry-After": "7"})
                await error_response(error, scope["path"])(scope, receive, send)
                return
            self._double.say(*self.answers.pop(0))
            if self.hold_after is not None:
                send = _holding(send, self.hold_after)
        await self._app(scope, receive, send)

    def close(self) -> None:
        self._wire.close()
        self._double.server.app = self._app


def _holding(send: Any, parts: int) -> Any:
    """A `send` that stops after so many parts."""
    left = parts

    async def sending(message: Any) -> None:
        nonlocal left
        if message["type"] == "http.response.body":
            left -= 1
            if left < 0:
                await asyncio.Event().wait()
        await send(message)

    return sending


@contextmanager
def scripted_port() -> Iterator[ScriptedPort]:
    with scripted() as double:
        found = ScriptedPort(double)
        try:
            yield found
        finally:
            found.close()
