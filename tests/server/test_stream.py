"""Streams on the wire: pings, clients that go or do not read, errors after the first byte."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from apertus_mlx.server import outbox as outbox_module
from apertus_mlx.server.engine import EngineLimits
from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.jobs import Failed, Told
from apertus_mlx.server.outbox import RequestOutbox
from apertus_mlx.text.pieces import Piece
from tests.server.running import QUESTION, Server, embedded, serving

LONG = {"max_tokens": 1500, "logit_bias": {"2": -100, "68": -100, "72": -100}, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(limits=EngineLimits(running=2), ping_after_s=0.001) as found:
        yield found
        found.lives()


class Client:
    """A client that a test plays by hand: an ASGI call with what it is sent."""

    def __init__(self, server: Server, body: Any, path: str = "/v1/chat/completions") -> None:
        self.sent: list[Any] = []
        self._leaves = asyncio.Event()
        self._server, self._path = server, path
        self._body = json.dumps(body).encode()
        self._asked = False
        self.something = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()

    async def receive(self) -> Any:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        self.sent.append(message)
        if b"content" in message.get("body", b""):
            self.something.set()

    def leave(self) -> None:
        self._leaves.set()

    async def call(self) -> None:
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "path": self._path,
            "http_version": "1.1", "method": "POST", "scheme": "http", "raw_path": b"",
            "query_string": b"", "root_path": "", "headers": headers,
        }  # fmt: skip
        await self._server.app(scope, self.receive, self.send)

    @property
    def data(self) -> bytes:
        return b"".join(each.get("body", b"") for each in self.sent)


def wait_until_idle(server: Server) -> None:
    while server.engine._running or server.engine._waiting:
        threading.Event().wait(0.005)


def test_a_comment_comes_first_and_while_nothing_happens(server: Server) -> None:
    response = server.post(
        "/v1/chat/completions", {"messages": QUESTION, "stream": True, "temperature": 0}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    first, second, *_ = response.text.split("\n\n")
    assert first.startswith(":") and second.startswith((":", "data: {"))
    assert ": at work\n\n: at work\n\n" in response.text


def test_a_client_that_goes_ends_its_answer(server: Server) -> None:
    async def go_after_the_first_words() -> None:
        client = Client(server, {"messages": QUESTION, "stream": True, **LONG})
        call = asyncio.create_task(client.call())
        await client.something.wait()
        client.leave()
        await call
        assert b"[DONE]" not in client.data

    async def go_while_waiting_for_the_whole() -> None:
        client = Client(server, {"messages": QUESTION, **LONG})
        call = asyncio.create_task(client.call())
        while not server.engine._running:
            await asyncio.sleep(0)
        client.leave()
        await call

    for play in (go_after_the_first_words, go_while_waiting_for_the_whole):
        server.run(play())
        wait_until_idle(server)
    finished = server.engine.metrics.text().decode()
    assert 'apertus_finished_total{finish="cancelled"} 2.0' in finished
    made = server.engine.metrics.generated_tokens._value.get()
    assert made < 1500


def test_a_client_that_does_not_read_loses_its_answer(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "MAX_UNREAD_BYTES", 2000)

    async def play() -> Client:
        client = Client(server, {"messages": QUESTION, "stream": True, **LONG})
        call = asyncio.create_task(client.call())
        await client.something.wait()
        client.reads.clear()
        while server.engine._running:
            await asyncio.sleep(0.001)
        client.reads.set()
        await call
        return client

    client = server.run(play())
    assert b"slow_client" in client.data and b"[DONE]" not in client.data


def test_an_error_after_the_first_byte_is_told(server: Server) -> None:
    async def play() -> Client:
        client = Client(server, {"messages": QUESTION, "stream": True, **LONG})
        call = asyncio.create_task(client.call())
        await client.something.wait()
        server.engine.end_all(ApiError(500, "broken"))
        await call
        return client

    data = server.run(play()).data
    last = json.loads(data.rstrip().rpartition(b"data: ")[2])
    assert last["error"]["message"] == "broken" and b"[DONE]" not in data


def test_an_outbox_is_bounded() -> None:
    async def play() -> None:
        box = RequestOutbox()
        told = Told(0, Piece("x" * 1000))
        count = 0
        while box.put(0, told):
            count += 1
        assert count <= outbox_module.MAX_UNREAD_BYTES / 4000
        for _ in range(count):
            assert await box.get() == (0, told)
        found = await box.get()
        assert found is not None and isinstance(found[1], Failed)
        assert await box.get(0.001) is None

    asyncio.run(play())


def test_a_full_queue_is_told() -> None:
    with serving(limits=EngineLimits(running=1, waiting=0)) as server:

        async def play() -> tuple[Client, Client]:
            first = Client(server, {"messages": QUESTION, "stream": True, **LONG})
            second = Client(server, {"messages": QUESTION})
            call = asyncio.create_task(first.call())
            await first.something.wait()
            await second.call()
            first.leave()
            await call
            return first, second

        _, second = server.run(play())
        start, body, *_ = second.sent
        assert start["status"] == 429 and (b"retry-after", b"2") in start["headers"]
        assert json.loads(body["body"])["error"]["code"] == "queue_full"
        wait_until_idle(server)
        server.lives()


def test_before_the_model_is_there() -> None:
    go = threading.Event()

    def load() -> Any:
        go.wait(60)
        return embedded()

    with serving(load=load, wait=False) as server:
        assert server.get("/health").status_code == 503
        assert server.get("/health").json()["status"] == "loading"
        refused = server.chat()
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert server.post("/tokenize", {"prompt": "a"}).status_code == 200
        go.set()
        while server.engine.state == "loading":
            threading.Event().wait(0.005)
        server.lives()
        server.engine.drain()
        refused = server.chat()
        assert refused.status_code == 503 and "retry-after" in refused.headers
