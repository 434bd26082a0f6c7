"""From the engine's thread to asyncio: what a request's jobs tell, in order and bounded."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.jobs import Event, Failed, Told

# A client that leaves more than this unread is too slow, and its jobs end.
MAX_UNREAD_BYTES = 2**20
# What an event takes beside its text.
_EVENT_BYTES = 100


class RequestOutbox:
    """Events of all jobs of one request, put by the engine's thread and read by one task."""

    def __init__(self) -> None:
        """Make one; for the thread of the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        # Each counter is written by one side only.
        self._put_bytes = self._taken_bytes = 0

    def put(self, number: int, event: Event) -> bool:
        """Take an event of a job; returns whether anybody reads fast enough."""
        if isinstance(event, Told):
            self._put_bytes += _size(event)
            if self._put_bytes - self._taken_bytes > MAX_UNREAD_BYTES:
                slow = ApiError(408, "the client reads too slowly", code="slow_client")
                self._send(number, Failed(slow))
                return False
        return self._send(number, event)

    def _send(self, number: int, event: Event) -> bool:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))
        except RuntimeError:  # the loop is closed
            return False
        return True

    async def get(self, timeout_s: float | None = None) -> tuple[int, Event] | None:
        """The next event and its job's number, or None after `timeout_s` seconds without one."""
        try:
            async with asyncio.timeout(timeout_s):
                number, event = await self._events.get()
        except TimeoutError:
            return None
        if isinstance(event, Told):
            self._taken_bytes += _size(event)
        return number, event


@dataclass(frozen=True, slots=True)
class JobOutbox:
    """What one job of a request puts its events into."""

    request: RequestOutbox
    number: int

    def put(self, event: Event) -> bool:
        """Take an event; returns whether anybody reads fast enough."""
        return self.request.put(self.number, event)


def _size(event: Told) -> int:
    call = event.piece.call
    length = len(event.piece.text) + (len(call.arguments) if call else 0)
    return _EVENT_BYTES + 4 * length + 500 * len(event.logprobs)
