"""A port behind which a script speaks: one answer for each chat, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tests.server.scripted import ScriptedServer, scripted
from tests.server.wire import Wire

Said = Sequence[str | int]


class ScriptedPort:
    """Answers what `answers` has next."""

    def __init__(self, double: ScriptedServer) -> None:
        self._double, self._app = double, double.server.app
        self.answers: list[Said] = []
        double.server.app = self._serve
        self._wire = Wire(double.server)
        self.base = f"http://127.0.0.1:{self._wire.port}/v1"

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"].endswith("/chat/completions"):
            self._double.say(*self.answers.pop(0))
        await self._app(scope, receive, send)

    def close(self) -> None:
        self._wire.close()
        self._double.server.app = self._app


@contextmanager
def scripted_port() -> Iterator[ScriptedPort]:
    with scripted() as double:
        found = ScriptedPort(double)
        try:
            yield found
        finally:
            found.close()
