"""HTTP on a real socket: requests that are slow, cut or lie about themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from apertus_mlx.server import patience
from tests.server.running import serving
from tests.server.wire import Wire


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
