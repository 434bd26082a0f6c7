"""`apertus_mlx_golden_prompts.json`: prompts and their token ids, for an app to test itself with.

Another tokenizer or template renderer, such as an app's in Swift, has to come to the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.convert.write.manifest import write_json
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.system.model_files import exists
from apertus_mlx.system.strict_json import read_object
from apertus_mlx.text.template import ChatTemplate, Message, UnsupportedTemplateError
from apertus_mlx.text.tokenizer import Tokenizer

GOLDEN = "apertus_mlx_golden_prompts.json"
FORMAT_VERSION = 1
TEXTS = (
    "The capital of France is",
    "Grüezi! Wie viel kostet das? – 3,50 €",
    "二加二等于几?  Привет, мир\n\tहिन्दी العربية 🏔️",
    "for (int i = 0; i < 10; i++) { x += i; }",
)
_QUESTION = Message(role="user", content="What is the capital of Switzerland?")
_SYSTEM = Message(role="system", content="You answer in one sentence.")
_ANSWER = Message(role="assistant", content="The capital of Switzerland is Bern.")
_TOOLS: Sequence[Mapping[str, Any]] = (
    {
        "name": "get_weather",
        "description": "Get the current weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city."},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
    {"name": "get_time", "description": "Get the time of day.", "parameters": {}},
)
_WEATHER = Message(role="user", content="Wie ist das Wetter in Zürich, und wie spät ist es?")
_CALL = {"name": "get_weather", "arguments": '{"city": "Zürich"}'}


def _calls(*functions: Mapping[str, str]) -> list[dict[str, object]]:
    return [
        {"id": f"call_{index}", "type": "function", "function": function}
        for index, function in enumerate(functions)
    ]


def _result(index: int, text: str) -> Message:
    return Message(role="tool", tool_call_id=f"call_{index}", content=text)


CONVERSATIONS: Mapping[str, tuple[tuple[Message, ...], bool]] = {
    "question": ((_QUESTION,), False),
    "question, thinking": ((_QUESTION,), True),
    "system and question": ((_SYSTEM, _QUESTION), False),
    "second turn": (
        (_QUESTION, _ANSWER, Message(role="user", content="  Und wie heisst der Fluss dort? 🏞️\n")),
        False,
    ),
}
# As the ones above, with `_TOOLS`. In the second, results come in another order than calls.
TOOL_CONVERSATIONS: Mapping[str, tuple[tuple[Message, ...], bool]] = {
    "tool result": (
        (
            _WEATHER,
            Message(role="assistant", content="", tool_calls=_calls(_CALL)),
            _result(0, '{"temperature": 7}'),
        ),
        False,
    ),
    "thoughts and tool results": (
        (
            _WEATHER,
            Message(
                role="assistant",
                content=None,
                reasoning_content="I need both tools.",
                tool_calls=_calls(_CALL, {"name": "get_time", "arguments": "{}"}),
            ),
            _result(1, "12:30"),
            _result(0, '{"temperature": 7}'),
        ),
        True,
    ),
}


def golden_prompts(directory: Path, config: ModelConfig) -> dict[str, Any]:
    """What tokenizer and chat template of the folder `directory` make of some texts.

    Conversations are in OpenAI's form; `tools` are there where the model is given some. Those that
    the template does not take, or all where there is none, are left out; so is everything where
    this package cannot read the tokenizer.
    """
    texts: list[dict[str, Any]] = []
    conversations: list[dict[str, Any]] = []
    try:
        tokenizer = Tokenizer.load(
            directory, vocab_size=config.vocab_size, bos_token_id=config.bos_token_id
        )
        texts += [{"text": text, "token_ids": tokenizer.encode(text)} for text in TEXTS]
        template = ChatTemplate.load(directory, tokenizer)
    except RejectedError:
        template = None
    for tools, group in ((), CONVERSATIONS), (_TOOLS, TOOL_CONVERSATIONS):
        for name, (messages, think) in group.items() if template else ():
            try:
                ids = template.render(messages, think=think, tools=tools) if template else []
            except (RejectedError, UsageError):
                continue
            entry = {"name": name, "messages": messages, "enable_thinking": think}
            entry |= {"tools": tools} if tools else {}
            conversations.append({**entry, "token_ids": ids})
    return {"format_version": FORMAT_VERSION, "texts": texts, "conversations": conversations}


def check_template(directory: Path, config: ModelConfig) -> str | None:
    """Refuse a chat template that is damaged; return what to say of one that only others can run.

    A folder without a template is in order, and so is a tokenizer that this package cannot read.

    Raises:
        RejectedError: the template is empty, cut off, or leaves out what the user says.
    """
    try:
        tokenizer = Tokenizer.load(
            directory, vocab_size=config.vocab_size, bos_token_id=config.bos_token_id
        )
    except RejectedError:
        return None
    try:
        template = ChatTemplate.load(directory, tokenizer)
        if template is not None:
            template.render(CONVERSATIONS["question"][0])
    except UnsupportedTemplateError as error:
        return f"apertus-mlx cannot chat with the output: {error}"
    return None


def write_golden(directory: Path, config: ModelConfig) -> None:
    """Write the file into the folder whose tokenizer and template it is about."""
    write_json(directory / GOLDEN, golden_prompts(directory, config))


def differing(directory: Path, config: ModelConfig) -> list[str]:
    """Which prompts of the folder's own file come out otherwise today; none if it has no file.

    Raises:
        RejectedError: the file is damaged.
    """
    path = directory / GOLDEN
    if not exists(path):
        return []
    # As the prompts of today are after a way through JSON.
    stored, now = read_object(path), json.loads(json.dumps(golden_prompts(directory, config)))
    if stored.get("format_version") != FORMAT_VERSION:
        return ["format_version"]
    return [
        str(entry.get("name", entry.get("text")))[:60] if isinstance(entry, dict) else str(kind)
        for kind in ("texts", "conversations")
        for entry in _entries(stored, kind)
        if entry not in now[kind]
    ]


def _entries(stored: Mapping[str, Any], kind: str) -> list[Any]:
    entries = stored.get(kind)
    return entries if isinstance(entries, list) else [kind]
