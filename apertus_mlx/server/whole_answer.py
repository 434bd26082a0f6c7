"""Waits for all answers of a request, unless its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.requests import Request

from apertus_mlx.server.engine import Engine
from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.jobs import Ended, Failed, Job, PromptRead
from apertus_mlx.server.outbox import RequestOutbox
from apertus_mlx.server.stream import end

JobAnswers = tuple[list[Ended], PromptRead | None]


async def whole_answers(
    engine: Engine, jobs: Sequence[Job], outbox: RequestOutbox, request: Request
) -> list[JobAnswers]:
    """What each of the jobs, which do not stream, has told when all have ended.

    Raises:
        ApiError: one failed, or the client went away.
    """
    gone = asyncio.create_task(_gone(request))
    reading = asyncio.create_task(_collect(jobs, outbox))
    try:
        await asyncio.wait([gone, reading], return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ApiError(400, "the client went away", code="disconnected")
        return reading.result()
    finally:
        gone.cancel()
        reading.cancel()
        end(engine, jobs)


async def _collect(jobs: Sequence[Job], outbox: RequestOutbox) -> list[JobAnswers]:
    answers: list[list[Ended]] = [[] for _ in jobs]
    prompts: list[PromptRead | None] = [None] * len(jobs)
    left = sum(job.task.choices for job in jobs)
    while left:
        found = await outbox.get()
        if found is None:
            continue
        number, event = found
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Ended):
            answers[number].append(event)
            left -= 1
        elif isinstance(event, PromptRead):
            prompts[number] = event
    for each in answers:
        each.sort(key=lambda ended: ended.choice)
    return list(zip(answers, prompts, strict=True))


async def _gone(request: Request) -> None:
    """Return when the client has gone; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
