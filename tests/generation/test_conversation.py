"""Whatever changes a conversation, the next answer is that of a fresh run over its messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.cache import CacheConfig
from apertus_mlx.errors import NotFoundError, RejectedError, UsageError
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.conversation import Conversation
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import SamplingOptions
from apertus_mlx.generation.request_files import read_messages, write_messages
from apertus_mlx.generation.run import Generation
from apertus_mlx.generation.tool_set import read_tool_set
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.text.template import Message
from tests.daily import every

GREEDY = SamplingOptions(temperature=0, max_tokens=8)
FIRST, SECOND, THIRD = "What is the capital of France?", "And of Italy?", "Who wrote Faust?"
FORMS = [CacheConfig(), CacheConfig(4, 4, window=32), CacheConfig(bound=64)]
ENDS = ["all", "cancelled", "interrupt"]
OTHERS = [Message(role="user", content=THIRD), Message(role="assistant", content="Goethe.")]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return open_folder(model_dir()).load()


def said(role: str, content: str) -> Message:
    return Message(role=role, content=content)


class Interrupting:
    """A model whose user interrupts behind the third step of decoding."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.left = inner, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def next_token_logits(self, *arguments: Any) -> Any:
        logits = self._inner.next_token_logits(*arguments)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return logits


def undo(talk: Conversation, messages: list[Message]) -> list[Message]:
    assert talk.undo()
    return messages[:-2]


def undo_all(talk: Conversation, messages: list[Message]) -> list[Message]:
    assert talk.undo() and talk.undo() and not talk.undo()
    return messages[:-4]


def retry(talk: Conversation, messages: list[Message]) -> list[Message]:
    answer = "".join(piece.text for piece in talk.retry(GREEDY) if not piece.is_thought)
    return [*messages[:-1], said("assistant", answer)]


def reset(talk: Conversation, messages: list[Message]) -> list[Message]:
    talk.reset()
    assert talk._prefix.tokens == [] and talk.last_answer is None
    return [message for message in messages if message["role"] == "system"]


def system(talk: Conversation, messages: list[Message]) -> list[Message]:
    talk.system = "Answer briefly."
    rest = [message for message in messages if message["role"] != "system"]
    return [said("system", "Answer briefly."), *rest]


def no_system(talk: Conversation, messages: list[Message]) -> list[Message]:
    talk.system = None
    return [message for message in messages if message["role"] != "system"]


def think(talk: Conversation, messages: list[Message]) -> list[Message]:
    talk.think = not talk.think
    return messages


def load(talk: Conversation, messages: list[Message]) -> list[Message]:
    talk.load(OTHERS)
    return OTHERS


def load_own(talk: Conversation, messages: list[Message]) -> list[Message]:
    """A part of what was said, ending in a question, answered and undone."""
    part = json.loads(json.dumps(messages[:-1]))
    talk.load(part)
    assert len(list(talk.retry(GREEDY))) and len(talk.messages) == len(part) + 1
    assert talk.undo()
    return part[:-1]


def system_undo(talk: Conversation, messages: list[Message]) -> list[Message]:
    return undo(talk, system(talk, messages))


CHANGES = [undo, undo_all, retry, reset, system, no_system, think, load, load_own, system_undo]


@pytest.mark.parametrize("form", range(3), ids=["full", "quantized", "bounded"])
@pytest.mark.parametrize("change", every(5, CHANGES))
def test_after_any_change_the_next_answer_is_as_fresh(
    loaded: LoadedModel, change: Callable[..., list[Message]], form: int
) -> None:
    # Every two meet: a change, a form of cache, thinking or not, and how the answer before ended.
    number = CHANGES.index(change)
    end, thinks = ENDS[(number + form) % 3], (number + form + number // 3) % 2 == 1
    model: Any = Interrupting(loaded.model)
    system_message = "Be kind." if number % 2 else None
    talk = Conversation(replace(loaded, model=model), system_message, thinks, FORMS[form])
    list(talk.ask(FIRST, GREEDY))
    tokens = 0

    def cancelled() -> bool:
        nonlocal tokens
        tokens += 1
        return end == "cancelled" and tokens > 3

    model.left = 3 if end == "interrupt" else 0
    try:
        list(talk.ask(SECOND, GREEDY, cancelled=cancelled))
    except KeyboardInterrupt:
        assert end == "interrupt"
    assert [message["content"] for message in talk.messages if message["role"] == "user"] == [
        FIRST, SECOND,
    ]  # fmt: skip
    messages = change(talk, [message.copy() for message in talk.messages])
    assert talk.messages == messages
    answer = "".join(piece.text for piece in talk.ask(THIRD, GREEDY))

    assert loaded.folder.template is not None
    prompt = loaded.folder.template.render([*messages, said("user", THIRD)], think=talk.think)
    result = talk.last_answer
    assert result is not None and result.prompt_token_ids == prompt
    fresh = Generation(loaded, prompt, GREEDY, prefix=CachedPrefix(loaded.model, FORMS[form]))
    assert answer == "".join(piece.text for piece in fresh)


@pytest.mark.parametrize("form", every(2, range(3)))
def test_results_of_calls_are_answered_as_fresh(loaded: LoadedModel, form: int) -> None:
    """And so is what follows, though the prompt of the answer is no part of the next one's."""
    thinks = form != 1
    tools = read_tool_set([{"name": "look", "description": "Look."}])
    talk = Conversation(loaded, None, thinks, FORMS[form], tools)
    calls = [
        {"id": name, "type": "function", "function": {"name": "look", "arguments": "{}"}}
        for name in "ab"
    ]
    asked: Any = {
        "role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": calls,
    }  # fmt: skip
    list(talk.ask(THIRD, GREEDY))
    talk.load([said("user", FIRST), asked])
    given: list[Any] = [
        {"role": "tool", "tool_call_id": "a", "content": "one"},
        {"role": "tool", "tool_call_id": "b", "content": "two"},
    ]
    turns = [
        lambda: talk.give({"b": "two", "a": "one"}, GREEDY),
        lambda: talk.ask(SECOND, GREEDY),
        lambda: talk.retry(GREEDY),
    ]
    before = [said("user", FIRST), asked]
    for turn, added in zip(turns, (given, [said("user", SECOND)], []), strict=True):
        list(turn())
        result = talk.last_answer
        assert result is not None and loaded.folder.template is not None
        messages = [*before, *added]
        prompt = loaded.folder.template.render(messages, think=thinks, tools=tools.definitions)
        assert result.prompt_token_ids == prompt
        fresh = Generation(loaded, prompt, GREEDY, prefix=CachedPrefix(loaded.model, FORMS[form]))
        assert result.text == "".join(piece.text for piece in fresh if not piece.is_thought)
        before = [*messages, said("assistant", result.text)] if turn is turns[0] else messages
    assert talk.undo() and talk.undo() and not talk.undo()


def test_a_stopped_answer_stays_as_far_as_it_went(loaded: LoadedModel) -> None:
    talk = Conversation(loaded)
    pieces: list[str] = []
    for piece in talk.ask(FIRST, GREEDY, cancelled=lambda: len(pieces) >= 2):
        pieces.append(piece.text)
    assert talk.messages[-1] == said("assistant", "".join(pieces))
    assert 0 < len("".join(pieces)) < len("The capital of France is Paris.")


def test_what_was_replaced_speaks_no_more(loaded: LoadedModel) -> None:
    """Neither a system message nor a conversation that was replaced stays in the cache."""
    for change in (system, no_system, load):
        talk = Conversation(loaded, "Speak of zebras.")
        list(talk.ask("Where do okapis live?", GREEDY))
        change(talk, [])
        list(talk.ask(SECOND, GREEDY))
        held = loaded.folder.tokenizer.decode(talk._prefix.tokens)
        assert "zebras" not in held and SECOND in held
        assert ("okapis" in held) is (change is not load)


def test_messages_that_do_not_fit_leave_the_conversation_alone(loaded: LoadedModel) -> None:
    talk = Conversation(loaded)
    list(talk.ask(FIRST, GREEDY))
    before = list(talk.messages)
    with pytest.raises(UsageError, match="context"):
        talk.load([said("user", "word " * 5000)])
    with pytest.raises(UsageError, match="nobody"):
        talk.load([said("user", THIRD), said("nobody", "x")])
    assert talk.messages == before


MESSAGES = [
    said("system", "Be kind."),
    said("user", 'a "quoted"\n\ttext \x1b[31m \\ 日本 🙂'),
    said("assistant", "half \udce9"),
]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    write_messages(path, MESSAGES)
    assert read_messages(path) == MESSAGES
    # Anybody else reads it, too.
    assert json.loads(path.read_text("utf-8")) == {"messages": MESSAGES}
    path.write_text("\ufeff" + json.dumps(MESSAGES))
    assert read_messages(path) == MESSAGES
    # As requests to OpenAI have it: calls without content, parts, and keys of other kinds.
    request = {
        "model": "any",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What time is it?"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "noon"},
        ],
    }
    path.write_text(json.dumps(request))
    assert read_messages(path) == request["messages"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("{", "not valid JSON"),
        ('"text"', "expected a list of messages"),
        ("{}", "expected a list of messages"),
        ('{"messages": {}}', "expected a list of messages"),
        ("[]", "no message"),
        ('{"messages": []}', "no message"),
        ("[1]", r"talk.json\[0\]: expected an object"),
        ('{"messages": [{"role": "user", "content": "x"}, {"content": "x"}]}',
         r"talk.json: messages\[1\].role: is missing"),
        ('[{"role": ["user"], "content": "x"}]', r"\[0\].role: expected a text, not list"),
        ('[{"role": "robot", "content": "x"}]', r"\[0\].role: 'robot': expected system"),
        ('[{"role": "user"}]', r"\[0\].content: expected a text or a list of text parts, not null"),
        ('[{"role": "user", "content": 1}]', r"\[0\].content: expected a text .*, not int"),
        ('[{"role": "assistant", "tool_calls": []}]', r"\[0\].content: is missing"),
        ('[{"role": "tool", "content": "x"}]', r"\[0\].role: a result follows"),
        ('[{"role": "user", "role": "user", "content": "x"}]', "duplicate key"),
        ("[" * 100_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_other_files_are_refused_by_their_place(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(text)
    with pytest.raises(RejectedError, match=told) as refused:
        read_messages(path)
    assert str(refused.value).startswith(str(path))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        read_messages(tmp_path / "talk.json")
    with pytest.raises(RejectedError, match="not a regular file"):
        read_messages(tmp_path)
