"""Conversations keep their prefix in any form of cache, and answer as if they had not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from apertus_mlx.cache import CacheConfig, rewind
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.conversation import Conversation
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import SamplingOptions
from apertus_mlx.generation.run import Generation
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.text.template import Message
from tests.daily import every

pytestmark = pytest.mark.gpu

GREEDY = SamplingOptions(temperature=0)


def greedy(max_tokens: int) -> SamplingOptions:
    return replace(GREEDY, max_tokens=max_tokens)


QUESTIONS = ("What is the capital of France?", "And of Italy?", "Who wrote Faust?")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return open_folder(model_dir()).load()


@pytest.mark.parametrize(
    "form",
    every(3, [CacheConfig(8, 8), CacheConfig(4, 3, window=32), CacheConfig(bound=64),
              CacheConfig(4, 4, bound=140, window=32)]),
    ids=str,
)  # fmt: skip
def test_turns_answer_as_from_the_start(loaded: LoadedModel, form: CacheConfig) -> None:
    conversation = Conversation(loaded, form=form)
    history: list[Message] = []
    for index, question in enumerate(QUESTIONS):
        answer = "".join(piece.text for piece in conversation.ask(question, greedy(24)))
        history.append(Message(role="user", content=question))
        assert loaded.folder.template is not None
        prompt = loaded.folder.template.render(history)
        prefix = CachedPrefix(loaded.model, form)
        fresh = Generation(loaded, prompt, greedy(24), prefix=prefix, prefill_step=64)
        assert "".join(piece.text for piece in fresh) == answer
        result = conversation.last_answer
        assert result is not None
        assert (result.reused_prompt_tokens > 0) is (index > 0)
        history.append(Message(role="assistant", content=answer))


def test_a_question_asked_again_gets_the_same_answer(loaded: LoadedModel) -> None:
    for form in (CacheConfig(4, 4), CacheConfig(bound=40), CacheConfig(4, 4, bound=180)):
        conversation = Conversation(loaded, form=form)
        first = [piece.text for piece in conversation.ask(QUESTIONS[0], greedy(60))]
        conversation.undo()
        assert [piece.text for piece in conversation.ask(QUESTIONS[0], greedy(60))] == first


def test_layers_of_different_lengths_are_not_rewound(loaded: LoadedModel) -> None:
    import mlx.core as mx

    caches = loaded.model.make_cache(CacheConfig(4, 4))
    loaded.model(mx.array([[5] * 20]), caches)
    assert rewind(caches, 3)
    caches[1].trim(1)
    assert not rewind(caches, 0)
    assert not rewind(caches, 2)
