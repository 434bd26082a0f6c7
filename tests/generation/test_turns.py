"""Turns without a model: the order of callers, and what ends a turn. Nobody waits for ever.

Each wait here has a limit, so that a turn that is never given up fails a test and hangs none.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Generator
from functools import partial
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from apertus_mlx.errors import UsageError
from apertus_mlx.generation import turns as module
from apertus_mlx.generation.turns import Turn, Turns, Work

LIMIT_S = 120.0


class Call:
    """A call on a thread of its own, which may never return."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._found: Any = None
        self._raised: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = self._call()
        except BaseException as error:
            self._raised = error

    def result(self, limit_s: float = LIMIT_S) -> Any:
        self._thread.join(limit_s)
        if self._thread.is_alive():
            raise TimeoutError("the call still waits")
        if self._raised is not None:
            raise self._raised
        return self._found


def counting(most: int = 3) -> Work[int]:
    def work(cancelled: Callable[[], bool]) -> Generator[int, None, None]:
        for number in range(most):
            if cancelled():
                return
            yield number

    return work


def take(turns: Turns) -> list[int]:
    return list(Turn(turns, counting()))


class Line(Turns):
    """Turns that tell how many wait."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived = threading.Semaphore(0)

    def _is_first(self, place: Any) -> bool:
        first = super()._is_first(place)
        if not first:
            self.arrived.release()
        return first

    def queue(self, call: Callable[[], Any]) -> Call:
        """A call that waits in line when this returns."""
        made = Call(call)
        assert self.arrived.acquire(timeout=LIMIT_S)
        return made


def test_a_caller_waits_as_long_as_a_stream_is_open() -> None:
    line = Line()
    stream = Turn(line, counting())
    next(stream)
    waiting = line.queue(lambda: take(line))
    with pytest.raises(TimeoutError):
        waiting.result(limit_s=0.1)
    assert list(stream) == [1, 2]
    assert waiting.result() == [0, 1, 2]


def test_callers_come_in_the_order_in_which_they_came() -> None:
    line = Line()
    stream = Turn(line, counting())
    next(stream)
    order: list[int] = []

    def work(number: int) -> Work[None]:
        def steps(_: Callable[[], bool]) -> Generator[None, None, None]:
            order.append(number)
            yield

        return steps

    calls = []
    for number in range(4):
        turn = Turn(line, work(number))
        calls.append(line.queue(lambda turn=turn: list(turn)))  # type: ignore[misc]
    stream.close()
    for call in calls:
        call.result()
    assert order == list(range(4))


def test_one_at_a_time() -> None:
    """Many threads, whose turns end in all ways, never meet inside."""
    line, inside, met = Turns(), threading.Semaphore(1), []

    def work(_: Callable[[], bool]) -> Generator[int, None, None]:
        if not inside.acquire(blocking=False):
            met.append("met")
        try:
            for number in range(5):
                yield number
                if number == 3:
                    raise KeyError
        finally:
            inside.release()

    def many(seed: int) -> None:
        for number in range(8):
            turn = Turn(line, work)
            kind = (seed + number) % 4
            if kind == 0:
                with pytest.raises(KeyError):
                    list(turn)
            elif kind == 1:
                next(turn)
                turn.close()
            elif kind == 2:
                next(turn)  # and let go of
            else:
                next(turn)
                circle: list[Any] = [turn]
                circle.append(circle)
            del turn

    for call in [Call(lambda seed=seed: many(seed)) for seed in range(4)]:  # type: ignore[misc]
        call.result()
    assert not met


def test_who_waits_for_a_stream_whose_thread_ends_comes_next() -> None:
    """Whoever waits is there before the thread ends."""
    line, go = Line(), threading.Event()
    stream = Turn(line, counting())

    def begin() -> None:
        next(stream)
        begun.set()
        go.wait(LIMIT_S)

    begun = threading.Event()
    reader = Call(begin)
    assert begun.wait(LIMIT_S)
    waiting = [line.queue(lambda: take(line)) for _ in range(3)]
    go.set()
    reader.result()
    for call in waiting:
        assert call.result() == [0, 1, 2]
    with pytest.raises(UsageError, match="a later call has ended this stream"):
        next(stream)


@pytest.mark.parametrize("circle", [False, True])
def test_a_stream_that_nothing_refers_to_any_more(circle: bool) -> None:
    line = Line()
    held: list[Any] = [Turn(line, counting())]
    next(held[0])
    if not circle:
        waiting = line.queue(lambda: take(line))
        del held
    else:
        held.append(held)
        del held
        waiting = Call(lambda: take(line))
    assert waiting.result() == [0, 1, 2]


def test_a_stream_that_is_closed_while_it_is_read_ends_though_nobody_reads_on() -> None:
    line, inside, go = Line(), threading.Event(), threading.Event()
    ended: list[str] = []

    def work(_: Callable[[], bool]) -> Generator[int, None, None]:
        try:
            inside.set()
            go.wait(LIMIT_S)
            yield 1
        finally:
            ended.append("ended")

    stream, done = Turn(line, work), threading.Event()
    reader = Call(lambda: (next(stream), done.wait(LIMIT_S)))
    assert inside.wait(LIMIT_S)
    waiting = line.queue(lambda: take(line))
    stream.close()
    assert not ended  # a step is computed to its end
    go.set()
    assert waiting.result() == [0, 1, 2]
    done.set()
    assert reader.result()[0] == 1 and ended == ["ended"]
    assert list(stream) == []


def test_a_turn_that_is_closed_while_it_waits_leaves_the_line() -> None:
    line = Line()
    stream = Turn(line, counting())
    next(stream)
    begun: list[str] = []

    def work(_: Callable[[], bool]) -> Generator[None, None, None]:
        begun.append("begun")
        yield

    line.queue(lambda: take(line))
    closed = Turn(line, work)
    call = line.queue(lambda: list(closed))
    last = line.queue(lambda: take(line))
    closed.close()
    assert call.result() == [] and not begun
    stream.close()
    assert last.result() == [0, 1, 2]


def test_closing_goes_before_all_who_wait_and_ends_what_is_open() -> None:
    line = Line()
    stream = Turn(line, counting())
    next(stream)
    order: list[str] = []

    def work(_: Callable[[], bool]) -> Generator[None, None, None]:
        order.append("waited")
        yield

    turn = Turn(line, work)
    waiting = line.queue(lambda: list(turn))
    Call(lambda: line.close(lambda: order.append("closed"))).result()
    waiting.result()
    assert order == ["closed", "waited"]
    assert list(stream) == []


@pytest.mark.parametrize("waits", [False, True])
def test_a_call_inside_a_call_of_its_own_thread_is_refused(waits: bool) -> None:
    """As by a signal's handler, while its thread computes or waits in line."""
    line, found = Line(), []

    def inner() -> None:
        for call in (lambda: take(line), lambda: next(outer)):
            with pytest.raises(UsageError, match="already"):
                call()
            found.append("refused")

    def work(_: Callable[[], bool]) -> Generator[int, None, None]:
        if not waits:
            inner()
        yield 1

    outer, stream = Turn(line, work), Turn(line, counting())
    if waits:
        next(stream)
        news, place = outer._place.news, outer._place
        place.news = SimpleNamespace(put=news.put, get=lambda: (inner(), news.get()))  # type: ignore[assignment]
    call = Call(lambda: list(outer))
    if waits:
        assert line.arrived.acquire(timeout=LIMIT_S)
        stream.close()
    assert call.result() == [1]
    assert set(found) == {"refused"}


def end_with(line: Turns) -> None:
    with Turn(line, counting()) as turn:
        next(turn)


def let_go(line: Turns) -> None:
    next(Turn(line, counting()))


def overtake(line: Turns) -> None:
    left = Turn(line, counting())
    next(left)
    take(line)


def close(line: Turns) -> None:
    line.close(lambda: None)


def interrupt(at: int, call: Callable[[], None]) -> BaseException | None:
    """Interrupt `call` at instruction number `at` of the module; None if it has fewer."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != module.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt as error:
        return error
    finally:
        sys.settrace(before)
    return RuntimeError() if count >= at else None  # the interrupt of a destructor is not raised


@pytest.mark.parametrize("use", [take, end_with, let_go, overtake, close])
@pytest.mark.parametrize("kept", [False, True], ids=["forgotten", "kept"])
@pytest.mark.parametrize("stride", [31, pytest.param(1, marks=pytest.mark.nightly)])
def test_an_interrupt_at_any_instruction(
    use: Callable[[Turns], None], kept: bool, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waited before it comes next, and so does the next call of the interrupted thread.

    Where the exception is kept, as in a notebook, its frames hold what was interrupted; then that
    thread's next call comes first.
    """
    monkeypatch.setattr(gc, "collect", lambda: 0)  # it takes longer than all else
    # Python tells of an interrupt in a destructor and forgets it; pytest keeps it.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    for at in range(1 + kept, 3000, stride):
        line = Line()
        begun = Turn(line, counting(2))
        next(begun)
        waiting = line.queue(partial(take, line))

        def call(line: Line = line, begun: Turn[int] = begun) -> None:
            if use is not close:
                begun.close()
            use(line)

        error = interrupt(at, call)
        if error is None:
            break
        if kept:
            assert take(line) == [0, 1, 2]
        del error, call, begun
        assert waiting.result() == [0, 1, 2], at
        assert Call(partial(take, line)).result() == [0, 1, 2], at
        assert not line._line
    assert 500 < at < 2900
