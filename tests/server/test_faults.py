"""Faults: one ends its own request alone; where nothing works any more the process ends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import mlx.core as mx
import pytest

from apertus_mlx.errors import ApertusError
from apertus_mlx.generation.batch import Batch, Event
from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.model.language_model import NextTokenLogits
from apertus_mlx.server import listen
from apertus_mlx.server.app import build_app
from apertus_mlx.server.engine import Engine
from apertus_mlx.server.errors import ApiError
from apertus_mlx.server.jobs import Ended, Failed, Job
from apertus_mlx.server.served_model import ServedModel
from tests.server.engines import FOLDER, asked, engine, job, planned
from tests.server.running import embedded

NO_MEMORY = RuntimeError("[metal::malloc] out of memory")


class Faulty:
    """The embedded model, which fails for prompts that have a token.

    Attributes:
        fault: what is raised; None: all works.
        reading: whether it fails with the prompt, rather than behind its first token.
    """

    def __init__(self, token: int) -> None:
        self._inner: Any = embedded().model
        self._token = token
        self.fault: Exception | None = None
        self.reading = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def model(self, ids: mx.array, cache: Any) -> mx.array:
        if self._token in ids.reshape(-1).tolist():
            cache[0].guilty = True
            if self.fault is not None and self.reading:
                raise self.fault
        return self._inner.model(ids, cache)

    def next_token_logits(self, inputs: mx.array, cache: Any) -> NextTokenLogits:
        if self.fault is not None and hasattr(cache[0], "guilty"):
            raise self.fault
        found: NextTokenLogits = self._inner.next_token_logits(inputs, cache)
        return found


BAD = FOLDER.tokenizer.encode(" broken")[0]


@pytest.fixture
def model() -> Faulty:
    return Faulty(BAD)


@pytest.fixture
def made(model: Faulty) -> Iterator[Engine]:
    loaded: LoadedModel = replace(embedded(), model=model)
    found = engine(loaded, idle_prefixes=0)
    yield found
    found.stop()


def bad() -> Job:
    return job("This is broken")


def status_of(event: Any) -> int:
    assert isinstance(event, Failed)
    return event.error.status


@pytest.mark.parametrize(
    ("fault", "status", "reading"), [(ValueError("x"), 500, True), (NO_MEMORY, 503, False)]
)
def test_a_fault_belongs_to_one_job(
    made: Engine, model: Faulty, fault: Exception, status: int, reading: bool
) -> None:
    model.fault, model.reading = fault, reading
    guilty, *others = asked(made, bad(), job("Zurich is"), job("It is"))
    assert status_of(guilty) == status
    assert all(isinstance(each, Ended) for each in others) and made.healthy
    assert isinstance(asked(made, job())[0], Ended)


def test_three_in_a_row_end_the_engine(made: Engine, model: Faulty) -> None:
    model.fault = ValueError("x")
    ended = threading.Event()
    made.on_failure = ended.set
    for _ in range(2):
        for _ in range(2):
            assert status_of(asked(made, bad())[0]) == 500 and made.healthy
        # What works in between says that the engine does.
        assert isinstance(asked(made, job())[0], Ended)
    for _ in range(3):
        assert status_of(asked(made, bad())[0]) == 500
    assert ended.wait(60) and made.state == "failed" and not made.healthy
    assert isinstance(made.failure, ApertusError) and made.failure.exit_code == 1
    assert "ValueError: x" in str(made.failure)
    with pytest.raises(ApiError) as refused:
        made.submit([job()])
    assert refused.value.status == 503


def test_too_little_memory_ends_no_engine(made: Engine, model: Faulty) -> None:
    model.fault = NO_MEMORY
    assert [status_of(asked(made, bad())[0]) for _ in range(5)] == [503] * 5 and made.healthy


def test_a_fault_of_nobody_ends_all_and_the_engine_goes_on(
    made: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(_: Batch) -> list[Event]:
        raise RuntimeError("a bug")

    with monkeypatch.context() as broken:
        broken.setattr(Batch, "step", step)
        assert [status_of(each) for each in asked(made, job(), job())] == [500, 500]
    assert isinstance(asked(made, job())[0], Ended) and made.healthy


def test_the_process_ends_with_one_line(model: Faulty) -> None:
    """Clients get 500 before that."""
    model.fault = ValueError("x")
    loaded: LoadedModel = replace(embedded(), model=model)
    made = Engine(FOLDER, lambda: loaded, planned())
    app = build_app(made, ServedModel(FOLDER, ["tiny"]))
    listening = listen.bind("127.0.0.1", 0)
    base = f"http://127.0.0.1:{listening.getsockname()[1]}"
    codes: list[int] = []

    def ask() -> None:
        with httpx.Client(base_url=base, trust_env=False) as client:
            while client.get("/health").status_code != 200:
                threading.Event().wait(0.01)
            body = {"prompt": "This is broken", "max_tokens": 2}
            codes.extend(client.post("/v1/completions", json=body).status_code for _ in range(3))
        made.on_failure()

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(ApertusError, match="3 computations in a row") as ended:
        listen.serve(app, made, listening, 5)
    asking.join()
    assert codes == [500, 500, 500] and ended.value.exit_code == 1
    assert "\n" not in str(ended.value)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(base.rpartition(":")[2])))
