"""A closed model gives its memory back at once, not when the garbage collector comes by."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest

from apertus_mlx import Apertus, load
from tests.daily import every

USES: dict[str, Callable[[Apertus], object]] = {
    "generate": lambda model: model.generate("Hi", max_tokens=3),
    "stream": lambda model: list(model.stream("Hi", max_tokens=3)),
    "generate_all": lambda model: model.generate_all(["Hi", "Ho"], max_tokens=3),
    "chat": lambda model: model.chat().ask("Hi", max_tokens=3),
    "logprobs": lambda model: model.logprobs("Hi"),
}


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("compute", ["cpu", "mlx"])
@pytest.mark.parametrize("use", every(2, USES))
def test_nothing_holds_a_closed_model(use: str, compute: str, no_collector: None) -> None:
    model = load(compute=compute)  # type: ignore[arg-type]
    assert model._loaded is not None
    weights = weakref.ref(model._loaded.model)
    USES[use](model)
    model.close()
    assert weights() is None


@pytest.mark.parametrize("way", ["stream", "chat"])
def test_a_stream_that_was_read_holds_only_its_answer(way: str, no_collector: None) -> None:
    model = load(compute="mlx")
    assert model._loaded is not None
    weights = weakref.ref(model._loaded.model)
    stream = model.stream("Hi", max_tokens=3) if way == "stream" else model.chat().stream("Hi")
    text = "".join(piece.text for piece in stream)
    model.close()
    assert weights() is None
    assert stream.answer.text == text
