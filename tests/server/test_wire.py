"""HTTP on a real socket: requests that are slow, cut or lie about themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import uvicorn

from apertus_mlx.server import patience
from apertus_mlx.server.listen import bind
from apertus_mlx.server.patience import PatientProtocol
from tests.server.running import Server, serving


class Wire:
    """A server in this process that listens on a port."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._socket = bind("127.0.0.1", 0)
        self._port = self._socket.getsockname()[1]
        config = uvicorn.Config(
            server.app, http=PatientProtocol, ws="none", lifespan="off", log_config=None
        )
        self._uvicorn = uvicorn.Server(config)
        self._serving = asyncio.run_coroutine_threadsafe(
            self._uvicorn.serve(sockets=[self._socket]), server._loop
        )

    def say(self, data: bytes) -> bytes:
        """Send bytes, and read until the server closes or has answered."""
        return self.server.run(self._say(data))

    async def _say(self, data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(data)
        await writer.drain()
        head = await reader.readuntil(b"\r\n")
        writer.close()
        return head

    def close(self) -> None:
        self._uvicorn.should_exit = True
        self._serving.result(30)
        self._socket.close()


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with serving(body_timeout_s=0.1) as server:
        found = Wire(server)
        yield found
        found.server.lives()
        found.close()


def post(*headers: str, body: bytes = b"{}") -> bytes:
    lines = ["POST /tokenize HTTP/1.1", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


HOST, JSON = "Host: localhost", "Content-Type: application/json"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (post(HOST, JSON, "Content-Length: 2"), 400),  # `prompt` is missing
        (post(JSON, "Content-Length: 2"), 400),
        (post("Host: evil.example", JSON, "Content-Length: 2"), 403),
        (post(HOST, "Host: localhost", JSON, "Content-Length: 2"), 400),
        (post(HOST, JSON, "Content-Length: -1"), 400),
        (post(HOST, JSON, "Content-Length: 2", "Content-Length: 3"), 400),
        (post(HOST, JSON, "Content-Length: 99999999999999999999"), 413),
        (post(HOST, JSON, "Content-Length: 20"), 408),
        (post(HOST, JSON, "Transfer-Encoding: chunked", body=b"zz\r\n"), 400),
        (post(HOST, JSON, "Transfer-Encoding: chunked", body=b"5\r\n{"), 408),
        (post(HOST, JSON), 400),  # no length: no body
        (b"\x16\x03\x01 not HTTP\r\n\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\nX: " + b"x" * 100_000, 400),
    ],
)
def test_a_request(wire: Wire, data: bytes, status: int) -> None:
    assert wire.say(data).split()[1] == str(status).encode()
    wire.server.lives()


def test_headers_that_do_not_come(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "HEADERS_TIMEOUT_S", 0.05)
    for data in (b"", b"POST /tokenize HTTP/1.1\r\nHost:"):
        assert wire.say(data).split()[1] == b"408"
    wire.server.lives()
