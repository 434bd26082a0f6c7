"""Server-sent events: data as it comes, comments while there is none, and an end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import StreamingResponse

from apertus_mlx.server.engine import Engine
from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.jobs import Ended, Event, Failed, Job
from apertus_mlx.server.outbox import RequestOutbox

# Seconds of silence before a comment says that the server is at work.
PING_AFTER_S = 5.0
PING = b": at work\n\n"


@dataclass(frozen=True, slots=True)
class StreamForm:
    """How an API writes its streams; by default as chat completions do.

    Attributes:
        data: the bytes of an event.
        first: the events before all others.
        ping: the bytes that say that the server is at work.
        failed: the event that tells of an error.
        done: the bytes at the end of a sound stream.
    """

    data: Callable[[dict[str, Any]], bytes]
    first: Callable[[], Iterator[dict[str, Any]]] = lambda: iter(())
    ping: Callable[[], bytes] = lambda: PING
    failed: Callable[[ApiError], dict[str, Any]] = ApiError.body
    done: bytes = b""


def event_stream(
    engine: Engine,
    jobs: Sequence[Job],
    outbox: RequestOutbox,
    chunks: Callable[[int, Event], Iterator[dict[str, Any]]],
    last: Callable[[], Iterator[dict[str, Any]]],
    ping_after_s: float = PING_AFTER_S,
    form: StreamForm | None = None,
) -> StreamingResponse:
    """The response that tells what jobs do.

    Args:
        engine: where the jobs are.
        jobs: all of one request, with one outbox. They end if the client goes away.
        outbox: theirs.
        chunks: what an event of the job of a number becomes on the wire.
        last: what follows when all answers are whole.
        ping_after_s: see `PING_AFTER_S`.
        form: None is that of chat completions.
    """
    form = form or CHAT_FORM

    async def body() -> AsyncIterator[bytes]:
        left = sum(job.task.choices for job in jobs)
        yield PING
        for chunk in form.first():
            yield form.data(chunk)
        while left:
            found = await outbox.get(ping_after_s)
            if found is None:
                yield form.ping()
                continue
            number, event = found
            if isinstance(event, Failed):
                yield form.data(form.failed(event.error))
                return
            for chunk in chunks(number, event):
                yield form.data(chunk)
            left -= isinstance(event, Ended)
        for chunk in last():
            yield form.data(chunk)
        if form.done:
            yield form.done

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    response = _JobsStream(body(), media_type="text/event-stream", headers=headers)
    response.leave = lambda: end(engine, jobs)
    return response


class _JobsStream(StreamingResponse):
    """A stream whose jobs end with it, however it ends."""

    leave: Callable[[], None]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()


def end(engine: Engine, jobs: Sequence[Job]) -> None:
    """Have jobs end, if they have not."""
    for job in jobs:
        job.cancel()
    engine.wake()


def data_line(value: dict[str, Any]) -> bytes:
    """An event that has no name."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode("utf-8", "replace")


def named_event(value: dict[str, Any]) -> bytes:
    """An event whose name is the `type` of its data."""
    return f"event: {value['type']}\n".encode() + data_line(value)


CHAT_FORM = StreamForm(data_line, done=b"data: [DONE]\n\n")
