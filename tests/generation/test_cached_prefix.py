"""Token ids and caches agree, whoever stops a run and wherever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.choose import Compute
from apertus_mlx.backend.metal.compiled_step import CompiledStep
from apertus_mlx.cache import Cache, CacheConfig, FullCache
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.conversation import Conversation
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.generation.run import Generation
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.model.language_model import LanguageModel
from apertus_mlx.text.template import Message
from tests.builders import config_4x, write_checkpoint
from tests.cache_sequences import interrupt_after, layers_of
from tests.daily import every
from tests.decode_step import JoinedPlain

GREEDY = SamplingOptions(temperature=0, seed=0)


def greedy(max_tokens: int) -> SamplingOptions:
    return replace(GREEDY, max_tokens=max_tokens)


QUESTION = "What is the capital of France?"
# Reached by MLX's form through `FullCache`, by the host's own through its attention.
COMPUTES: tuple[Compute, ...] = ("mlx", "cpu")


@pytest.fixture(scope="module", params=COMPUTES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    if request.param == "cpu":
        pytest.importorskip("onnxruntime")
    return open_folder(model_dir()).load(RunOptions(dtype="float32", compute=request.param))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), config_4x(head_dim=64))
    return open_folder(folder).load(RunOptions(compute="mlx")).model


def log_probabilities(logits: mx.array) -> np.ndarray:
    return np.array(logits - mx.logsumexp(logits))


def require_next_turn_as_from_the_start(talk: Conversation, loaded: LoadedModel) -> None:
    assert loaded.folder.template is not None
    question = Message(role="user", content="And of Germany?")
    prompt = loaded.folder.template.render([*talk.messages, question])
    kept = talk._prefix.begin(prompt).read()
    fresh = loaded.model(mx.array([prompt]))[0, -1]
    difference = np.abs(log_probabilities(kept) - log_probabilities(fresh)).max()
    assert difference < 1e-4


class Interrupting:
    """A model whose user interrupts the n-th step of decoding, before or behind it."""

    def __init__(self, inner: Any, step: int, behind: bool) -> None:
        self._inner, self._step, self._behind = inner, step, behind
        self._calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def next_token_logits(self, ids: mx.array, caches: list[Cache]) -> Any:
        self._calls += 1
        if self._calls == self._step and not self._behind:
            raise KeyboardInterrupt
        logits = self._inner.next_token_logits(ids, caches)
        if self._calls == self._step:
            raise KeyboardInterrupt
        return logits


@pytest.mark.parametrize("place", every(3, product([1, 3, 7], [True, False])), ids=str)
def test_an_interrupted_step_leaves_no_row(loaded: LoadedModel, place: tuple[int, bool]) -> None:
    step, behind = place
    interrupting: Any = Interrupting(loaded.model, step, behind)
    talk = Conversation(replace(loaded, model=interrupting))
    with pytest.raises(KeyboardInterrupt):
        list(talk.ask(QUESTION, GREEDY))
    require_next_turn_as_from_the_start(talk, loaded)


@pytest.mark.parametrize("append", [1, 3, 4])
def test_an_interrupt_between_layers_leaves_no_row(
    loaded: LoadedModel, append: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def interrupt(original: Callable[..., Any]) -> Callable[..., Any]:
        def interrupted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == append:
                raise KeyboardInterrupt
            return original(*arguments)

        return interrupted

    talk = Conversation(loaded)
    with monkeypatch.context() as patch:
        patch.setattr(FullCache, "update_and_fetch", interrupt(FullCache.update_and_fetch))
        if hasattr(loaded.model, "_attention"):
            patch.setattr(loaded.model, "_attention", interrupt(loaded.model._attention))
        with pytest.raises(KeyboardInterrupt):
            list(talk.ask(QUESTION, GREEDY))
    assert calls == append
    require_next_turn_as_from_the_start(talk, loaded)


@pytest.mark.parametrize(
    "form",
    every(5, [CacheConfig(4, 4, bound=200), CacheConfig(), CacheConfig(4, 4), CacheConfig(8, 8),
              CacheConfig(bound=64)]),
    ids=str,
)  # fmt: skip
def test_nothing_speaks_on_after_undo(loaded: LoadedModel, form: CacheConfig) -> None:
    talk = Conversation(loaded, form=form)
    list(talk.ask(f"{QUESTION} " * 20, greedy(20)))
    assert talk.undo()
    assert talk._prefix.tokens == []
    answer = "".join(p.text for p in talk.ask("What is the chemical symbol for gold?", greedy(30)))
    result = talk.last_answer
    assert result is not None
    prefix = CachedPrefix(loaded.model, form)
    fresh = Generation(loaded, result.prompt_token_ids, greedy(30), prefix=prefix)
    assert answer == "".join(piece.text for piece in fresh)


@pytest.mark.parametrize(
    "form",
    every(
        3,
        [
            CacheConfig(bound=90),
            CacheConfig(4, 4, window=8),
            CacheConfig(8, 8, bound=120, window=8),
        ],
    ),
    ids=str,
)
def test_an_interrupt_before_any_bytecode(form: CacheConfig, model: LanguageModel) -> None:
    """Where a chunk is read, or a step taken, that makes codes or goes around in a ring."""
    held, following = [i * 7 % 380 for i in range(107)], [5, 6, 7, 8, 9] * 9
    probe = [*held, 3, 3]
    fresh = CachedPrefix(model, form)
    fresh.begin(held).read()
    expected = np.array(fresh.begin(probe).read())
    for bytecode in range(1, 3000, 409):
        prefix = CachedPrefix(model, form)
        prefix.begin(held).read()
        run = prefix.begin([*held, *following])
        try:
            with interrupt_after(bytecode):
                run.read(step=40)
        except KeyboardInterrupt:
            pass
        else:
            break
        found = np.array(prefix.begin(probe).read())
        error = np.abs(found - expected).max() / np.abs(expected).max()
        # Codes may be rounded otherwise where the chunks are others.
        assert error < (1e-3 if form.quantized else 1e-5), bytecode
    assert bytecode > 1000


def test_undo_keeps_what_is_older(loaded: LoadedModel) -> None:
    talk = Conversation(loaded)
    list(talk.ask(QUESTION, greedy(20)))
    before = talk._prefix.tokens
    list(talk.ask("And of Italy?", greedy(20)))
    talk.undo()
    assert talk._prefix.tokens == before


class InterruptedList(list[Message]):
    """Whose user interrupts just before a turn is put in."""

    def __setitem__(self, *_: Any) -> None:
        raise KeyboardInterrupt


def test_a_question_that_was_never_put_says_nothing_of_the_next(loaded: LoadedModel) -> None:
    talk = Conversation(loaded)
    list(talk.ask(QUESTION, greedy(20)))
    before = talk._prefix.tokens
    # Another start of the prompt, so that little of what is older is shared.
    messages, talk.messages = talk.messages, InterruptedList(talk.messages)
    talk.messages.insert(0, Message(role="system", content="Speak Romansh."))
    talk.messages.pop(1)
    with pytest.raises(KeyboardInterrupt):
        list(talk.ask("And of Italy?", greedy(20)))
    talk.messages = messages
    list(talk.ask("And of Italy?", greedy(20)))
    talk.undo()
    assert talk._prefix.tokens == before


def test_retry_reads_no_token_again(loaded: LoadedModel) -> None:
    talk = Conversation(loaded)
    first = "".join(piece.text for piece in talk.ask(QUESTION, greedy(20)))
    assert "".join(piece.text for piece in talk.retry(greedy(20))) == first
    result = talk.last_answer
    assert result is not None
    assert result.reused_prompt_tokens == len(result.prompt_token_ids) - 1
    assert len(talk.messages) == 2
    talk.undo()
    assert talk._prefix.tokens == []


@pytest.mark.parametrize("count", [1, 2, 6])
def test_every_stop_is_accounted_for(loaded: LoadedModel, count: int) -> None:
    """Whether length or the caller ends a run, ids and rows are those of prompt and answer."""
    for close in (False, True):
        prefix = CachedPrefix(loaded.model)
        assert loaded.folder.template is not None
        prompt = loaded.folder.template.render([Message(role="user", content=QUESTION)])
        run = Generation(loaded, prompt, greedy(40 if close else count), prefix=prefix)
        pieces = iter(run)
        for _ in range(count if close else 100):
            next(pieces, None)
        pieces.close()  # type: ignore[attr-defined]
        said = [*prompt, *run.token_ids]
        assert prefix.tokens == said[: len(prefix.tokens)]
        assert len(prefix.tokens) >= len(said) - 1
        assert {layer.offset for layer in layers_of(prefix)} == {len(prefix.tokens)}


def test_a_generation_runs_once(loaded: LoadedModel) -> None:
    run = Generation(loaded, [1, 100], greedy(3))
    list(run)
    result = run.answer
    with pytest.raises(RuntimeError, match="runs once"):
        list(run)
    assert run.answer.token_ids == result.token_ids


def test_an_older_run_goes_no_further(loaded: LoadedModel) -> None:
    talk = Conversation(loaded)
    older = talk.ask(QUESTION, greedy(20))
    next(older)
    newer = talk.ask("And of Italy?", greedy(20))
    next(newer)
    with pytest.raises(RuntimeError, match="this run is over"):
        list(older)
    # It takes nothing from the newer one with it.
    list(newer)
    require_next_turn_as_from_the_start(talk, loaded)


def test_a_run_refuses_layers_that_hold_something_else(model: LanguageModel) -> None:
    for change in (
        lambda layers: layers[1].trim(1),
        lambda layers: model(mx.array([[7]]), layers),
    ):
        prefix = CachedPrefix(model)
        prefix.begin([1, 2, 3, 4]).read()
        change(layers_of(prefix))
        with pytest.raises(RuntimeError, match="but 4 tokens are known"):
            prefix.begin([1, 2, 3, 4, 5])


def test_after_an_error_nothing_is_held(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise MemoryError

    for form in (CacheConfig(), CacheConfig(4, 4)):
        prefix = CachedPrefix(model, form)
        prefix.begin([1, 2, 3]).read()
        run = prefix.begin([1, 2, 3, 4])
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "next_token_logits", fail)
            with pytest.raises(MemoryError):
                run.step(mx.array(5))
        assert prefix.tokens == []
        logits = prefix.begin([1, 2, 3, 4]).read()
        fresh = model(mx.array([[1, 2, 3, 4]]), model.make_cache(form))[0, -1]
        np.testing.assert_allclose(np.array(logits), np.array(fresh), atol=1e-5)


def test_a_step_replayed_from_a_trace_is_accounted_for(model: LanguageModel) -> None:
    prompt = [1, 2, 3, 4]
    model.use(CompiledStep(JoinedPlain()))  # type: ignore[attr-defined]
    prefix = CachedPrefix(model)
    run = prefix.begin(prompt)
    run.read()
    for token in (7, 8, 9):
        run.step(mx.array(token))
    assert prefix.tokens == [*prompt, 7, 8, 9]
    kept = prefix.begin([*prompt, 7, 8, 5]).read()
    fresh = model(mx.array([[*prompt, 7, 8, 5]]))[0, -1]
    np.testing.assert_allclose(np.array(kept), np.array(fresh), atol=1e-5)
