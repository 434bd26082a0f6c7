"""Text in, text out: context limits, stopping, deliberation, and turns over one prefix."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.generation.conversation import Conversation
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.generation.run import Answer, Generation, Piece
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.model.apertus import Model
from apertus_mlx.text.template import Message
from tests.builders import config_4x, random_weights, write_checkpoint

GREEDY = SamplingOptions(temperature=0, seed=0)


def greedy(max_tokens: int) -> SamplingOptions:
    return replace(GREEDY, max_tokens=max_tokens)


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    return open_folder(model_dir()).load()


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model without layers' influence that always says id + 1: its answers are known."""
    config = config_4x(
        hidden_size=512, num_attention_heads=8, num_hidden_layers=1, head_dim=64, vocab_size=400
    )
    weights = random_weights(config)
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = np.zeros_like(weights[name])
    weights["model.norm.weight"] = np.ones(512, np.float32)
    weights["model.embed_tokens.weight"] = np.eye(400, 512, dtype=np.float32)
    weights["lm_head.weight"] = np.roll(np.eye(400, 512, dtype=np.float32), 1, axis=0)
    folder = tmp_path_factory.mktemp("scripted")
    return open_folder(write_checkpoint(folder, config, weights)).load()


def run(loaded: LoadedModel, prompt: list[int], tokens: int, **options: object) -> Answer:
    generation = Generation(loaded, prompt, replace(greedy(tokens), **options))  # type: ignore[arg-type]
    pieces = list(generation)
    result = generation.answer
    assert "".join(p.text for p in pieces if not p.is_thought) == result.text
    assert "".join(p.text for p in pieces if p.is_thought) == result.thought
    return result


def test_counts_until_the_limit(scripted: LoadedModel) -> None:
    result = run(scripted, [1, 100], 5)
    assert result.token_ids == [101, 102, 103, 104, 105]
    assert result.finish_reason == "length"
    assert result.prompt_token_ids == [1, 100]


def test_stop_id_ends_and_is_not_text(scripted: LoadedModel) -> None:
    # 74 is the first byte; 66, 67, 68 are control tokens, and 68 ends the assistant's turn.
    result = run(scripted, [1, 65], 50)
    assert result.token_ids == [66, 67, 68]
    assert (result.text, result.finish_reason) == ("", "stop")


def test_stop_at_the_first_token(scripted: LoadedModel) -> None:
    result = run(scripted, [1, 67], 50)
    assert (result.token_ids, result.text, result.finish_reason) == ([68], "", "stop")


def test_stop_string_across_tokens(scripted: LoadedModel) -> None:
    start = scripted.folder.tokenizer.encode("a")[0]
    text = run(scripted, [1, start - 1], 12).text
    assert text.startswith("abcdef")
    stopped = run(scripted, [1, start - 1], 12, stop=["def", "zzz"])
    assert (stopped.text, stopped.finish_reason) == ("abc", "stop")


def test_deliberation_is_kept_apart(embedded: LoadedModel) -> None:
    assert embedded.folder.template is not None
    question = [Message(role="user", content="What is the capital of France?")]
    prompt = embedded.folder.template.render(question, think=True)
    result = run(embedded, prompt, 60)
    inner = embedded.folder.tokenizer.token_to_id("<|inner_prefix|>")
    assert inner in result.token_ids
    assert result.thought
    assert "Paris" in result.text
    assert result.thought not in result.text


def test_context_is_honest(scripted: LoadedModel) -> None:
    limit = scripted.folder.context_length
    assert len(run(scripted, [100] * (limit - 2), 50).token_ids) == 2
    for length in (limit, limit + 7):
        with pytest.raises(UsageError, match=rf"{length} tokens.*{limit}"):
            Generation(scripted, [100] * length, GREEDY)
    with pytest.raises(UsageError, match="empty"):
        Generation(scripted, [], GREEDY)
    with pytest.raises(UsageError, match="max-tokens"):
        Generation(scripted, [1], greedy(0))


def test_cancelling_keeps_what_there_was(scripted: LoadedModel) -> None:
    generation = Generation(scripted, [1, 100], greedy(50))
    pieces = iter(generation)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert generation.answer.finish_reason == "cancelled"
    assert generation.answer.token_ids[:1] == [101]


def test_logits_that_are_not_finite(tmp_path: Path) -> None:
    config = config_4x(num_hidden_layers=1)
    loaded = open_folder(write_checkpoint(tmp_path, config)).load(RunOptions(compute="mlx"))
    assert isinstance(loaded.model, Model)
    loaded.model.model.norm.weight = mx.full((64,), float("nan"))
    with pytest.raises(RejectedError, match="no finite logits"):
        list(Generation(loaded, [1, 100], greedy(5)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_all_equal(tmp_path: Path, temperature: float) -> None:
    config = config_4x(num_hidden_layers=1)
    loaded = open_folder(write_checkpoint(tmp_path, config)).load(RunOptions(compute="mlx"))
    assert isinstance(loaded.model, Model)
    loaded.model.model.norm.weight = mx.zeros(64)
    with pytest.raises(RejectedError, match="all equal"):
        list(
            Generation(
                loaded, [1, 100], SamplingOptions(temperature=temperature, seed=0, max_tokens=5)
            )
        )


def test_measures(scripted: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that is a second later at each look: one before the prompt, one after each token.
    clock = SimpleNamespace(perf_counter=count(start=7.0).__next__)
    monkeypatch.setattr("apertus_mlx.generation.answer.time", clock)
    result = run(scripted, [1] + [100] * 40, 10)
    assert result.time_to_first_token_s == 1
    assert result.prefill_tokens_per_s == 41
    assert result.decode_tokens_per_s == 1
    assert result.peak_memory_bytes > 400 * 512 * 4


def ask(conversation: Conversation, text: str) -> str:
    return "".join(piece.text for piece in conversation.ask(text, greedy(40)))


def test_chat_equals_one_long_prompt(embedded: LoadedModel) -> None:
    """Reusing the prefix changes nothing: each turn equals a run from scratch."""
    assert embedded.folder.template is not None
    conversation = Conversation(embedded, system="Answer briefly.")
    for turn, question in enumerate(["What is the capital of Italy?", "And of Germany?", "Thanks"]):
        before = [*conversation.messages, Message(role="user", content=question)]
        answer = ask(conversation, question)
        fresh = run(embedded, embedded.folder.template.render(before), 40)
        assert answer == fresh.text
        assert conversation.last_answer is not None
        assert (conversation.last_answer.reused_prompt_tokens > 0) == (turn > 0)
    assert [message["role"] for message in conversation.messages] == [
        "system", "user", "assistant", "user", "assistant", "user", "assistant",
    ]  # fmt: skip


def test_chat_computes_only_what_is_new(embedded: LoadedModel) -> None:
    conversation = Conversation(embedded)
    ask(conversation, "What is the capital of France?")
    first = conversation.last_answer
    ask(conversation, "What is the capital of Spain?")
    second = conversation.last_answer
    assert first is not None and second is not None
    shared = len(first.prompt_token_ids) + len(first.token_ids)
    assert second.reused_prompt_tokens == shared


def test_chat_undo_and_interrupt(embedded: LoadedModel) -> None:
    conversation = Conversation(embedded)
    first = ask(conversation, "What is the capital of France?")
    ask(conversation, "What is the capital of Spain?")
    assert conversation.undo() and conversation.undo() and not conversation.undo()
    assert ask(conversation, "What is the capital of France?") == first
    pieces = conversation.ask("What is the capital of Italy?", greedy(40))
    assert isinstance(next(pieces), Piece)
    pieces.close()
    assert conversation.messages[-1]["role"] == "assistant"
    conversation.undo()
    again = ask(conversation, "What is the capital of Spain?")
    other = Conversation(embedded)
    ask(other, "What is the capital of France?")
    assert ask(other, "What is the capital of Spain?") == again


def test_chat_without_room_stays_as_it_was(scripted: LoadedModel) -> None:
    conversation = Conversation(scripted)
    ask(conversation, "a")
    before = list(conversation.messages)
    with pytest.raises(UsageError, match="context"):
        ask(conversation, "x" * 600)
    assert conversation.messages == before


def test_chat_needs_a_template(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_4x(num_hidden_layers=1))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(RejectedError, match="no chat template"):
        Conversation(open_folder(folder).load())
