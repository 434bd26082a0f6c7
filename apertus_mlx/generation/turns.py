"""Turns: one piece of work at a time has the model, and others wait in line.

Work is a generator. It has the model from its first step until it ends, and a step is computed when
somebody reads it. So a stream that is read halfway still has the model; it loses it

- when it is closed or let go of,
- when the thread that read it last makes another call, or ends,
- when the model closes, or Python exits.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import inspect
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from queue import SimpleQueue
from typing import Any, Generic, Self, TypeVar

from apertus_mlx.errors import UsageError

T = TypeVar("T")
# Work is begun with a function that tells whether it shall end.
Work = Callable[[Callable[[], bool]], Generator[T, None, None]]

_every: weakref.WeakSet[Turns] = weakref.WeakSet()
_at_exit: list[Turn[None]] = []
_here = threading.local()


class _Life:
    """Exists as long as its thread, which holds the only reference that lasts."""


def _this_life() -> _Life:
    if not hasattr(_here, "life"):
        _here.life = _Life()
    life: _Life = _here.life
    return life


class _Place:
    """A place in the line. It does not hold its turn, which ends when nobody else holds it.

    Attributes:
        urgent: whether it goes before all that wait, and ends what has the model.
        cancelled: is set when the work shall end, or not begin.
        news: what wakes it. It may be put to at any point of any function, as locks may not.
    """

    def __init__(self, turn: Turn[Any], urgent: bool) -> None:
        self.turn = weakref.ref(turn)
        self.urgent = urgent
        self.cancelled = threading.Event()
        self.news: SimpleQueue[None] = SimpleQueue()


class Turns:
    """The line for one model. The first in it has the model.

    The line needs no lock: each change of it is one operation of a list, and what is first stays
    first until it has ended. An interrupt at any point leaves nothing that must be given back.
    """

    def __init__(self) -> None:
        self._line: list[_Place] = []
        self._process = os.getpid()
        _every.add(self)

    def stop(self) -> None:
        """Ask the work that has the model to end; harmless if there is none."""
        for place in self._line[:1]:
            place.cancelled.set()

    def close(self, free: Callable[[], None]) -> None:
        """End what has the model, wait for that, and call `free` before all who wait.

        Raises:
            UsageError: this thread is computing; what it computes is asked to end.
        """

        def work(_: Callable[[], bool]) -> Generator[None, None, None]:
            free()
            yield

        self.stop()
        deque(Turn(self, work, urgent=True), maxlen=0)

    def _wait(self, place: _Place) -> bool:
        """Wait in line until `place` is the first; returns False if it is cancelled before."""
        # Who is interrupted by a call of its own thread cannot go on before that call returns.
        if any(turn.computes_here() for turn in self._turns(1 if place.urgent else None)):
            raise UsageError("this thread is computing with this model already")
        self._line.insert(1 if place.urgent else len(self._line), place)
        if any(turn.idle for turn in self._turns(1)):
            gc.collect()  # only the collector knows if all that refers to the first is garbage
        # No name here may refer to the first: else waiting for it would keep it.
        while not self._is_first(place):
            if place.cancelled.is_set():
                return False
            place.news.get()
        return True

    def _is_first(self, place: _Place) -> bool:
        if self._line[0] is place:
            return True
        for turn in self._turns(1):
            turn.make_way(place.urgent)
        return False

    def _leave(self, place: _Place) -> None:
        """Leave the line, if `place` is in it; for work that has ended."""
        with contextlib.suppress(ValueError):
            self._line.remove(place)
        self._wake()

    def _wake(self) -> None:
        """Let the first know that it is first, and the next look whether the first is abandoned."""
        for place in self._line[:2]:
            place.news.put(None)

    def _turns(self, most: int | None) -> list[Turn[Any]]:
        return [turn for place in self._line[:most] if (turn := place.turn()) is not None]


class Turn(Iterator[T], Generic[T]):
    """The steps of one piece of work. Several threads may read them, one at a time."""

    def __init__(self, turns: Turns, work: Work[T], *, urgent: bool = False) -> None:
        """Make a turn, which waits in line when it is first read."""
        self._turns = turns
        self._place = _Place(self, urgent)
        self._reader: Callable[[], _Life | None] = lambda: None
        self._reading = threading.RLock()
        self._closed = self._overtaken = False
        # The steps must not hold this object: letting go of it has to end them.
        self._steps = _in_turn(turns, self._place, work)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        with self._reading:
            if self.computes_here():
                raise UsageError("this thread is reading this stream already")
            if self._overtaken:
                raise UsageError("a later call has ended this stream; read it before the next one")
            if self._reader() is not _this_life():
                turns = self._turns
                self._reader = weakref.ref(_this_life(), lambda _: turns._wake())
            try:
                return next(self._steps)
            finally:
                if self._closed or self._state == inspect.GEN_CLOSED:
                    self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._end()

    def close(self) -> None:
        """End the work where it is, by whichever thread; a second time does nothing."""
        self._closed = True
        self._place.cancelled.set()
        self._place.news.put(None)
        self._end()

    @property
    def idle(self) -> bool:
        """Whether it has the model, and no step is being computed."""
        return self._state == inspect.GEN_SUSPENDED

    def computes_here(self) -> bool:
        """Whether this thread computes a step, or waits in line to do so."""
        return self._state == inspect.GEN_RUNNING and self._reader() is _this_life()

    def make_way(self, urgent: bool) -> None:
        """End if nobody will read on, or if it is urgent; a step that is computed comes first."""
        if urgent:
            self.close()
        elif self._reader() in (None, _this_life()):
            idle = self.idle
            self._end()
            self._overtaken = idle and self._state == inspect.GEN_CLOSED

    @property
    def _state(self) -> str:
        return inspect.getgeneratorstate(self._steps)

    def _end(self) -> None:
        try:
            self._steps.close()
        except ValueError:
            pass  # a step is being computed; its reader looks at `_closed` after it
        finally:
            # The steps have left the line themselves, unless an interrupt came just then.
            if self._state == inspect.GEN_CLOSED:
                self._turns._leave(self._place)


def _in_turn(turns: Turns, place: _Place, work: Work[T]) -> Generator[T, None, None]:
    try:
        if turns._wait(place):
            yield from work(place.cancelled.is_set)
    finally:
        turns._leave(place)


@atexit.register
def _take_all() -> None:
    """Take all models for good: daemon threads must not be inside MLX when Python ends."""

    def keep(_: Callable[[], bool]) -> Generator[None, None, None]:
        yield

    for turns in list(_every):
        if turns._process == os.getpid():  # the threads of another process are not here
            _at_exit.append(Turn(turns, keep, urgent=True))
            next(_at_exit[-1])
