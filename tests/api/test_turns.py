"""Who may ask when: threads, open streams, stops, interrupts and closed models."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import mlx.core as mx
import pytest

from apertus_mlx import Apertus, Piece, Stream, UsageError, load
from apertus_mlx.generation.cached_prefix import CachedPrefix
from tests.daily import every

QUESTION = "What is the capital of France?"
OTHER = "What is the chemical symbol for gold?"
COMPUTES = ["mlx", "cpu"]
# With a cache in codes and one that forgets, both at once, and neither.
KEPT: list[dict[str, Any]] = [
    {"kv_bits": 8, "max_kv": 200, "prefill_step": 32},
    {"kv_bits": 4},
    {"max_kv": 64},
    {},
]
T = TypeVar("T")


def elsewhere(call: Callable[[], T]) -> T:
    """What `call` returns, or raises, on a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def need(compute: str) -> None:
    if compute == "cpu":
        pytest.importorskip("onnxruntime")


def fail_after_one(stream: Stream) -> None:
    for _ in stream:
        raise KeyError


@pytest.fixture(params=COMPUTES)
def model(request: pytest.FixtureRequest) -> Iterator[Apertus]:
    need(request.param)
    with load(compute=request.param) as loaded:
        yield loaded


def ids(model: Apertus, question: str, **how: Any) -> list[int]:
    return model.generate(question, temperature=0, **how).token_ids


@pytest.mark.parametrize("kept", every(4, KEPT), ids=str)
@pytest.mark.parametrize("compute", COMPUTES)
def test_after_an_early_end_the_next_question_is_as_fresh(
    compute: Any, kept: dict[str, Any]
) -> None:
    need(compute)
    # Every two of the three choices meet.
    think = KEPT.index(kept) % 2 == COMPUTES.index(compute)
    with load(compute=compute, **kept) as model:
        fresh = model.chat(think=think, temperature=0)
        fresh.ask(QUESTION)
        fresh.undo()
        expected = model.chat(think=think, temperature=0).ask(OTHER).token_ids
        assert fresh.ask(OTHER).token_ids == expected

        closed = model.chat(think=think, temperature=0)
        stream = closed.stream(QUESTION * 3)
        next(stream)
        stream.close()
        assert stream.answer.finish_reason == "cancelled"
        closed.undo()
        assert closed.ask(OTHER).token_ids == expected

        broken = model.chat(think=think, temperature=0)
        with pytest.raises(KeyError):
            fail_after_one(broken.stream(QUESTION * 3))
        gc.collect()  # the exception's frames held the stream
        broken.undo()
        assert broken.ask(OTHER).token_ids == expected
        # The next turn goes on from what was said before the end.
        going_on = model.chat(think=think, temperature=0)
        stream = going_on.stream(QUESTION)
        next(stream)
        stream.close()
        told = going_on.ask(OTHER)
        assert told.prompt_token_ids == model.render(going_on.messages[:-1], think=think)


@pytest.mark.parametrize("kept", every(4, KEPT), ids=str)
@pytest.mark.parametrize("compute", COMPUTES)
def test_after_an_interrupt_the_next_question_is_as_fresh(
    compute: Any, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    need(compute)
    step = CachedPrefix._step
    with load(compute=compute, **kept) as model:
        expected = model.chat(temperature=0).ask(OTHER).token_ids
        for number in (1, 2, 5):
            calls = iter(range(1, 1000))

            def interrupted(
                prefix: CachedPrefix, token: mx.array, at: int = number, counted: Any = calls
            ) -> Any:
                after = step(prefix, token)
                if next(counted) == at:
                    raise KeyboardInterrupt
                return after

            chat = model.chat(temperature=0)
            with monkeypatch.context() as patch:
                patch.setattr(CachedPrefix, "_step", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    chat.ask(QUESTION)
            chat.undo()
            assert chat.ask(OTHER).token_ids == expected
            assert ids(model, OTHER) == expected


@pytest.mark.parametrize("kept", every(4, KEPT), ids=str)
@pytest.mark.parametrize("compute", COMPUTES)
def test_load_on_one_thread_ask_on_others(compute: Any, kept: dict[str, Any]) -> None:
    need(compute)
    model = elsewhere(lambda: load(compute=compute, **kept))
    here = ids(model, QUESTION)
    assert elsewhere(lambda: ids(model, QUESTION)) == here
    chat = elsewhere(lambda: model.chat(temperature=0))
    first = chat.ask(QUESTION)
    assert first.token_ids == here
    second = elsewhere(lambda: chat.ask(OTHER))
    assert chat.undo()
    assert elsewhere(lambda: chat.ask(OTHER)).token_ids == second.token_ids
    # A stream that several threads read, and one more ends.
    stream = elsewhere(lambda: model.stream(QUESTION, temperature=0))
    pieces = [next(stream), *elsewhere(lambda: list(stream))]
    assert "".join(piece.text for piece in pieces) == model.decode(here)
    stream = model.stream(QUESTION)
    next(stream)
    elsewhere(stream.close)
    assert len(model.logprobs(QUESTION)) == len(model.encode(QUESTION))
    elsewhere(model.close)


def test_calls_of_other_threads_queue(model: Apertus) -> None:
    expected = {question: ids(model, question) for question in (QUESTION, OTHER)}
    stream = model.stream(QUESTION, temperature=0)
    first = next(stream)
    arrived = threading.Barrier(5)

    def ask(question: str) -> list[int]:
        arrived.wait()
        return ids(model, question)

    with ThreadPoolExecutor(4) as pool:
        asked = [(q, pool.submit(ask, q)) for q in (QUESTION, OTHER) * 2]
        arrived.wait()
        rest = list(stream)
        for question, answer in asked:
            assert answer.result() == expected[question]
    assert first.text + "".join(piece.text for piece in rest) == stream.answer.text
    assert stream.answer.token_ids == expected[QUESTION]


def test_two_models_at_once(model: Apertus) -> None:
    with load(compute="mlx", kv_bits=8) as other:
        mine, its = ids(model, QUESTION), ids(other, OTHER)
        streams = [model.stream(QUESTION, temperature=0), other.stream(OTHER, temperature=0)]
        for _ in zip(*streams, strict=False):
            pass
        for stream in streams:
            list(stream)
        assert [stream.answer.token_ids for stream in streams] == [mine, its]
        start = threading.Barrier(2)

        def ask(one: Apertus, question: str) -> list[list[int]]:
            start.wait()
            return [ids(one, question) for _ in range(2)]

        with ThreadPoolExecutor(2) as pool:
            first, second = pool.submit(ask, model, QUESTION), pool.submit(ask, other, OTHER)
            assert first.result() == [mine] * 2
            assert second.result() == [its] * 2
    assert ids(model, QUESTION) == mine


@pytest.mark.parametrize(
    "call",
    every(
        3,
        [
            lambda model, chat: model.generate(OTHER),
            lambda model, chat: model.generate_all([OTHER]),
            lambda model, chat: next(model.stream(OTHER)),
            lambda model, chat: chat.ask(OTHER),
            lambda model, chat: chat.undo(),
            lambda model, chat: model.logprobs(OTHER),
        ],
    ),
    ids=["generate", "generate_all", "stream", "ask", "undo", "logprobs"],
)
def test_a_call_ends_the_stream_of_its_own_thread(
    model: Apertus, call: Callable[[Apertus, Any], object]
) -> None:
    chat = model.chat(temperature=0)
    stream = model.stream(QUESTION, temperature=0)
    model.generate(QUESTION, max_tokens=1)  # nothing of the stream has been read
    pieces = [next(stream)]
    assert model.encode("a") and model.render([{"role": "user", "content": "a"}])
    # Now that another thread reads it, it is that thread's call which ends it.

    def read_and_ask() -> None:
        pieces.append(next(stream))
        call(model, chat)

    elsewhere(read_and_ask)
    assert stream.answer.finish_reason == "cancelled"
    assert stream.answer.text == "".join(piece.text for piece in pieces)
    with pytest.raises(UsageError, match="a later call has ended this stream"):
        next(stream)
    stream.close()
    assert chat.ask(QUESTION).text


def test_after_an_exception_that_is_kept_the_model_is_ready(model: Apertus) -> None:
    """As in a notebook, which keeps the traceback of the last cell."""
    expected = ids(model, OTHER)
    stream = model.stream(QUESTION)
    with pytest.raises(KeyError) as kept:
        fail_after_one(stream)
    assert ids(model, OTHER) == expected
    assert kept.value.__traceback__ is not None
    assert stream.answer.finish_reason == "cancelled"


def test_a_stream_of_a_thread_that_is_gone_holds_up_nobody(model: Apertus) -> None:
    """Not even where a new thread has the number of the old one."""
    expected = ids(model, OTHER)
    kept: list[Stream] = []

    def begin() -> None:
        kept.append(model.stream(QUESTION))
        next(kept[-1])

    for _ in range(3):
        thread = threading.Thread(target=begin)
        thread.start()
        thread.join()
    assert elsewhere(lambda: ids(model, OTHER)) == expected
    assert [stream.answer.finish_reason for stream in kept] == ["cancelled"] * 3


def test_a_stream_that_is_garbage_holds_up_nobody(model: Apertus) -> None:
    expected = ids(model, OTHER)
    circle: list[Any] = [model.stream(QUESTION)]
    next(circle[0])
    circle.append(circle)
    del circle
    assert elsewhere(lambda: ids(model, OTHER)) == expected


def held_steps(patch: pytest.MonkeyPatch, held: Callable[[], object]) -> threading.Event:
    """Let steps wait until `held` returns; the event says that one waits."""
    inside = threading.Event()
    step = CachedPrefix._step

    def waiting(prefix: CachedPrefix, token: mx.array) -> Any:
        inside.set()
        held()
        return step(prefix, token)

    patch.setattr(CachedPrefix, "_step", waiting)
    return inside


def test_a_stream_is_closed_from_another_thread_while_it_is_read(model: Apertus) -> None:
    go_on = threading.Event()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        inside = held_steps(patch, go_on.wait)
        stream = model.stream(QUESTION, temperature=0)
        pieces = pool.submit(lambda: list(stream))
        inside.wait()
        stream.close()
        go_on.set()
        assert "".join(piece.text for piece in pieces.result()) == stream.answer.text
    assert stream.answer.finish_reason == "cancelled"


def test_two_readers_of_one_stream_wait_for_each_other(model: Apertus) -> None:
    whole = model.generate(QUESTION, temperature=0)
    stream = model.stream(QUESTION, temperature=0)
    arrived = threading.Barrier(2)

    def read() -> list[Piece]:
        arrived.wait()
        return list(stream)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        held_steps(patch, lambda: None)
        readers = [pool.submit(read), pool.submit(read)]
        pieces = [piece for reader in readers for piece in reader.result()]
    assert sum(len(piece.text) for piece in pieces) == len(whole.text)
    assert stream.answer.token_ids == whole.token_ids


def test_a_reader_that_reads_in_between_is_told(model: Apertus) -> None:
    stream = model.stream(QUESTION)
    found: list[str] = []

    def read_again() -> None:
        if found:
            return
        for call in (lambda: next(stream), lambda: model.generate(OTHER)):
            with pytest.raises(UsageError, match="already"):
                call()
            found.append("told")
        stream.close()
        model.close()

    with pytest.MonkeyPatch.context() as patch:
        held_steps(patch, read_again)
        list(stream)
    assert found == ["told"] * 2
    assert stream.answer.finish_reason == "cancelled"
    assert model._loaded is None


@pytest.mark.parametrize("end", ["stop", "close"])
def test_logprobs_and_many_prompts_end_early(end: str) -> None:
    with load(compute="mlx", prefill_step=4) as model, pytest.MonkeyPatch.context() as patch:
        held_steps(patch, getattr(model, end))
        first, left = model.generate_all([QUESTION, OTHER], temperature=0)
        assert first.finish_reason == left.finish_reason == "cancelled"
        assert first.token_ids and not left.token_ids
    with load(compute="mlx", prefill_step=4) as model:
        module = type(model._open().model)
        logits, chunks = module.logits, 0

        def ending(self: Any, hidden: mx.array) -> Any:
            nonlocal chunks
            chunks += 1
            getattr(model, end)()
            return logits(self, hidden)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "logits", ending)
            with pytest.raises(UsageError, match="was stopped"):
                model.logprobs(QUESTION * 5)
        assert chunks == 1


AT_EXIT = """
import sys, threading
from apertus_mlx import load
model, begun = load(compute=sys.argv[1]), threading.Event()
def work():
    while True:
        for _ in model.stream("What is the capital of France?"): begun.set()
        model.generate_all(["Hi"] * 5)
        model.logprobs("Hi " * 200)
threading.Thread(target=work, daemon=True).start()
begun.wait()
"""
CLOSED_AT_EXIT = """
import sys, threading
from apertus_mlx import UsageError, load
model, begun = load(compute=sys.argv[1]), threading.Event()
def work():
    try:
        while True:
            for _ in model.stream("What is the capital of France?"): begun.set()
    except UsageError: pass
threading.Thread(target=work, daemon=True).start()
begun.wait()
model.close()
"""


@pytest.mark.parametrize("script", every(2, [AT_EXIT, CLOSED_AT_EXIT]), ids=["open", "closed"])
@pytest.mark.parametrize("compute", COMPUTES)
def test_python_ends_while_a_daemon_thread_computes(script: str, compute: str) -> None:
    need(compute)
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, compute], capture_output=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_forked_process_is_refused() -> None:
    script = (
        "import os, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "from apertus_mlx import UsageError, load\n"
        "with load() as model:\n"
        "    model.generate('Hi', max_tokens=2)\n"
        "    if not (child := os.fork()):\n"
        "        for call in (load, lambda: model.generate('Hi'), lambda: model.logprobs('Hi')):\n"
        "            try: call()\n"
        "            except UsageError as error: assert 'spawn' in str(error)\n"
        "            else: os._exit(3)\n"
        "        model.close()\n"
        "        os._exit(5)\n"  # as multiprocessing does
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5\n"
        "    model.generate('Hi', max_tokens=2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_ctrl_c_and_on() -> None:
    """A real signal in another process, which asks again afterwards."""
    script = (
        "from apertus_mlx import load\n"
        "with load() as model:\n"
        f"    fresh = model.generate({QUESTION!r}, temperature=0).text\n"
        "    try:\n"
        "        while True:\n"
        "            for piece in model.stream('Hello', temperature=0): print('.', flush=True)\n"
        "    except KeyboardInterrupt: pass\n"
        f"    assert model.generate({QUESTION!r}, temperature=0).text == fresh\n"
        "    print(fresh)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell may have started the tests with interrupts ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b".\n"
    process.send_signal(signal.SIGINT)
    told, notes = process.communicate(timeout=60)
    assert (process.returncode, notes) == (0, b"")
    assert told.endswith(b"The capital of France is Paris.\n")


def test_letting_go_of_a_stream_ends_it(model: Apertus) -> None:
    for _ in model.stream(QUESTION):
        break
    assert elsewhere(lambda: ids(model, QUESTION)) == ids(model, QUESTION)


@pytest.mark.parametrize("way", every(2, ["generate", "stream", "chat", "generate_all"]))
def test_stop_from_another_thread(model: Apertus, way: str) -> None:
    """It comes when some tokens are there, and no later one is computed."""
    some, stopped = threading.Event(), threading.Event()
    step = CachedPrefix._step
    calls = 0

    def counted(prefix: CachedPrefix, token: mx.array) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            some.set()
            stopped.wait()
        return step(prefix, token)

    def stop() -> None:
        some.wait()
        model.stop()
        stopped.set()

    whole = ids(model, QUESTION)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(CachedPrefix, "_step", counted)
        ended = pool.submit(stop)
        if way == "generate":
            answer = model.generate(QUESTION, temperature=0)
        elif way == "stream":
            stream = model.stream(QUESTION, temperature=0)
            pieces: list[Piece] = list(stream)
            answer = stream.answer
            assert "".join(piece.text for piece in pieces) == answer.text
        elif way == "chat":
            chat = model.chat(temperature=0)
            answer = chat.ask(QUESTION)
            assert chat.messages[-1]["content"] == answer.text
        else:
            answer, left = model.generate_all([QUESTION, OTHER], temperature=0)
            assert (left.finish_reason, left.token_ids) == ("cancelled", [])
        ended.result()
    assert answer.finish_reason == "cancelled"
    assert answer.token_ids == whole[: len(answer.token_ids)]
    assert 3 <= len(answer.token_ids) <= 4
    model.stop()  # nothing runs, and the next call is not meant
    assert ids(model, QUESTION) == whole


def test_stop_while_the_prompt_is_read() -> None:
    with load(prefill_step=16, compute="mlx") as model:
        question = f"{QUESTION} " * 8
        whole = ids(model, question)
        chunks = 0
        read = CachedPrefix._read

        def reading(prefix: CachedPrefix, tokens: Any, step: int, on_chunk: Any) -> Any:
            def told(done: int) -> None:
                nonlocal chunks
                chunks += 1
                if chunks == 2:
                    elsewhere(model.stop)
                on_chunk(done)

            return read(prefix, tokens, step, told)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CachedPrefix, "_read", reading)
            answer = model.generate(question, temperature=0)
        assert (answer.finish_reason, answer.token_ids, chunks) == ("cancelled", [], 2)
        assert ids(model, question) == whole


def test_a_closed_model_says_so(model: Apertus) -> None:
    chat = model.chat(temperature=0)
    chat.ask(QUESTION)
    unread = model.stream(QUESTION)
    stream = model.stream(QUESTION)
    next(stream)
    model.close()
    model.close()
    # What runs ends as by `stop`.
    list(stream)
    assert stream.answer.finish_reason == "cancelled"
    for call in (
        lambda: model.generate(QUESTION),
        lambda: model.stream(QUESTION),
        lambda: next(unread),
        lambda: model.generate_all([QUESTION]),
        model.chat,
        lambda: chat.ask(OTHER),
        chat.retry,
        chat.undo,
        lambda: model.render([{"role": "user", "content": "a"}]),
        lambda: model.encode("a"),
        lambda: model.decode([1]),
        lambda: model.logprobs("a"),
        lambda: model.model,
        lambda: model.directory,
    ):
        with pytest.raises(UsageError, match="closed; load it again"):
            call()
    assert "closed" in repr(model)


def test_closing_waits_until_another_thread_has_ended(model: Apertus) -> None:
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        # The step goes on when it is told to end; each turn has an event of its own.
        def until_cancelled() -> None:
            model._turns._line[0].cancelled.wait()

        inside = held_steps(patch, until_cancelled)
        asked = pool.submit(lambda: model.generate(QUESTION, temperature=0))
        inside.wait()
        model.close()
        assert model._loaded is None
        assert asked.result().finish_reason == "cancelled"


@pytest.mark.usefixtures("no_other_models")
def test_limits_of_mlx_are_those_of_the_models_that_are_open() -> None:
    outside = mx.set_cache_limit(123_456_789)
    try:
        first, second = load(compute="mlx"), load(compute="mlx")
        first.close()
        kept = mx.set_cache_limit(0)
        assert kept != 123_456_789
        mx.set_cache_limit(kept)
        second.close()
        assert mx.set_cache_limit(outside) == 123_456_789
    finally:
        mx.set_cache_limit(outside)
