"""A server of this process on a real port."""

from __future__ import annotations

import asyncio

import uvicorn

from apertus_mlx.server.listen import bind
from apertus_mlx.server.patience import PatientProtocol
from tests.server.running import Server


class Wire:
    """Listens; `say` speaks to it byte by byte."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._socket = bind("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        config = uvicorn.Config(
            server.app,
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            interface="asgi3",
        )
        self._uvicorn = uvicorn.Server(config)
        self._serving = asyncio.run_coroutine_threadsafe(
            self._uvicorn.serve(sockets=[self._socket]), server._loop
        )

    def say(self, data: bytes) -> bytes:
        """Send bytes, and read until the server closes or has answered."""
        return self.server.run(self._say(data))

    async def _say(self, data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        await writer.drain()
        head = await reader.readuntil(b"\r\n")
        writer.close()
        return head

    def close(self) -> None:
        self._uvicorn.should_exit = True
        self._serving.result(30)
        self._socket.close()
