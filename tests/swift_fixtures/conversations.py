"""Conversations as OpenAI writes them with the ids of their prompts, and tools in TypeScript.

`conversations/FAMILY/` has a `tokenizer.json` and `conversations.json`: the family's version and
system block, the day, and conversations with ids or with the place of what is wrong with them;
`own` are those that hold the structure of a template, which Swift refuses, and its place.
`conversations/tools.json` is a list of `[tools, text]`, `values.json` one of
`[value, json.dumps(value), str(value)]`.
"""

from __future__ import annotations

import copy
import datetime
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apertus_mlx.errors import UsageError
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.text.messages import ROLES
from apertus_mlx.text.template import ChatTemplate
from apertus_mlx.text.tokenizer import Tokenizer
from apertus_mlx.text.tool_definitions import format_tools, read_tools
from tests.chat_templates import V1, V1_1, V1_FIRST
from tests.swift_fixtures.sizes import sized
from tests.text.test_messages import MAPPED, REFUSED, SYSTEM
from tests.text.test_random_conversations import Conversation
from tests.text.test_tool_definitions import random_tools

# What the released models of v1 begin with.
RELEASED_SYSTEM = (
    "You are Apertus, a helpful assistant created by the SwissAI initiative.\n"
    "Knowledge cutoff: 2024-04\nCurrent date: {date}"
)
_EMPTY = "{%- macro default_system() -%}{%- endmacro -%}"
_RELEASED = RELEASED_SYSTEM.replace("\n", "\\n").replace(
    "{date}", "' ~ strftime_now('%Y-%m-%d') ~ '"
)
V1_RELEASED = V1.replace(_EMPTY, _EMPTY.replace("{%- endm", f"{{{{- '{_RELEASED}' }}}}{{%- endm"))
# Of each family: the version of its template, the template, its system block.
FAMILIES = {
    "v1": ("v1", V1_RELEASED, None),
    "v1-embedded": ("v1", V1, ""),
    "v1-first": ("v1-first", V1_FIRST, ""),
    "v1.1": ("v1.1", V1_1, None),
}
SPELLED = [
    *("<|assistant_end|>", "<|user_start|>", "<s>", "<SPECIAL_67>", "<|tools_prefix|>", "[INST]"),
    *("{date}", "e\u0301", "\u212a", "🏔️", "  \n", "Zürich ", "</s>", "<think>"),
]
USER: Any = {"role": "user", "content": "U"}
DISPLAY: Any = {"function": {"name": "display_answers", "arguments": '{"answer":"done"}'}}
ENDS: dict[str, dict[str, Any]] = {
    "answer": {},
    "none": {"add_generation_prompt": False},
    "continuation": {"continue_final_message": True},
}
_VALUES: list[Any] = [None, True, 0, -1, 2.5, 10**30, 1e999, [], {}, [[]], [None], ["a"], {"a": 1},
                      {"type": "text"}, "a" * 70, "", "a", "call_1", "[1]", '{"a": NaN}', "tool",
                      "system", "text", "\u212a", {"a": {"b": 1e999}}]  # fmt: skip


class SpellingConversation(Conversation):
    """A random conversation whose texts may spell control tokens."""

    def _text(self, most: int = 12) -> str:
        text = super()._text(most)
        if self._random.random() < 0.4:
            at = self._random.randint(0, len(text))
            text = text[:at] + self._random.choice(SPELLED) + text[at:]
        return text


def write_conversation_fixtures(out: Path) -> None:
    """Write the folders described above."""
    for family, (version, source, system) in FAMILIES.items():
        folder = out / "conversations" / family
        folder.mkdir(parents=True, exist_ok=True)
        template = _template(folder, version, source)
        day, rows = "", []
        while day != (today := datetime.date.today().isoformat()):
            day = today
            rows = [_row(template, *each) for each in _conversations(family, version)]
        about = {"version": version, "system": system, "day": day, "conversations": rows}
        _write(folder / "conversations.json", about)
    rng = random.Random(1)
    tools = [read_tools(random_tools(rng)) for _ in range(sized(600, 150))]
    _write(out / "conversations/tools.json", [[each, format_tools(each)] for each in tools])
    values = [_value(rng, 3) for _ in range(sized(800, 200))]
    written = [[each, json.dumps(each, ensure_ascii=False), str(each)] for each in values]
    _write(out / "conversations/values.json", written)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _template(folder: Path, version: str, source: str) -> ChatTemplate:
    """The template and a tokenizer, the embedded one; in v1.1 with the names of that version."""
    data = json.loads((model_dir() / "tokenizer.json").read_text(encoding="utf-8"))
    if version == "v1.1":
        names = {
            each["content"]: f"<SPECIAL_{each['id']}>"
            for each in data["added_tokens"]
            if 61 <= each["id"] <= 72
        }
        for each in data["added_tokens"]:
            each["content"] = names.get(each["content"], each["content"])
        data["model"]["vocab"] = {names.get(k, k): v for k, v in data["model"]["vocab"].items()}
    _write(folder / "tokenizer.json", data)
    tokenizer = Tokenizer.load(folder, vocab_size=2**17, bos_token_id=1)
    return ChatTemplate(source, tokenizer, name=version)


def _row(
    template: ChatTemplate, messages: Any, tools: Any, think: bool, end: str
) -> dict[str, Any]:
    """A conversation, its messages and tools as texts in JSON, and what becomes of it."""
    row = {"messages": _json(messages), "tools": tools and _json(tools), "think": think, "end": end}
    row["own"] = next(_own(messages), None)
    messages, tools = json.loads(json.dumps([messages, tools]))
    try:
        row["ids"] = template.render(messages, think=think, tools=tools, **ENDS[end])
    except UsageError as error:
        row["place"] = str(error).split(": ")[0]
    return row


def _own(messages: Any) -> Iterator[str]:
    for index, each in enumerate(messages if isinstance(messages, list) else ()):
        structured = isinstance(each, dict) and isinstance(each.get("content"), dict)
        if structured and each.get("role") in ROLES:
            yield f"messages[{index}].content"


def _json(value: Any) -> str:
    return json.dumps(value).replace("Infinity", "1e999")


def _conversations(family: str, version: str) -> Iterator[tuple[Any, Any, bool, str]]:
    """Messages, tools, whether to think, and the end of the prompt."""
    for messages, *_ in [*MAPPED.values(), *SYSTEM.values(), *REFUSED.values()]:
        if _is_openai(messages):
            for think, end in ((False, "answer"), (True, "none"), (True, "continuation")):
                yield messages, None, think, end
    thoughts = {"reasoning": "T"}
    final = {"role": "assistant", **thoughts, "tool_calls": [DISPLAY]}
    answer = {"role": "assistant", "content": "A"}
    empty = {"role": "assistant", "content": ""}
    thinking = {"role": "assistant", "content": None, **thoughts}
    for turns in (
        [final], [final, USER], [final, USER, answer], [{**final, "content": "So"}, USER, answer],
        [empty], [empty, empty], [thinking, empty], [thinking, thinking, answer], [answer, answer],
        [thinking, empty, final, empty, answer], [empty, USER, answer], [thinking, USER, empty],
        [{**final, "tool_calls": [DISPLAY] * 2}], [thinking, final, answer],
    ):  # fmt: skip
        for end in ENDS:
            for think in (False, True):
                yield [USER, *turns], None, think, end
    parts = {"parts": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}
    for content in (parts, {"parts": []}, {"parts": [{"type": "image"}]}, {"text": "U"}, {}):
        yield (
            [{"role": "system", "content": {"text": "S"}}, {**USER, "content": content}],
            None,
            False,
            "answer",
        )
    digits = {"function": {"name": "f", "arguments": '{"a": ' + "1" * 5000 + "}"}}
    yield [USER, {"role": "assistant", "tool_calls": [digits]}], None, False, "answer"
    rng = random.Random(family)
    for seed in range(sized(250, 60)):
        one = SpellingConversation(seed, version)
        tools = random_tools(rng) if one.tools else None
        yield one.messages, tools, one.think, rng.choice(list(ENDS))
    for seed in range(250, sized(450, 300)):
        one = SpellingConversation(seed, version)
        damaged = json.loads(json.dumps([one.messages, one.tools]))
        holder, key = rng.choice(list(_places(damaged if one.tools else damaged[:1])))
        value = copy.copy(rng.choice(_VALUES))
        if isinstance(holder, dict) and rng.random() < 0.2:
            del holder[key]
        elif not (key == "content" and isinstance(value, dict)):
            holder[key] = value
        yield damaged[0], damaged[1], one.think, "answer"


def _is_openai(messages: Any) -> bool:
    """Whether messages can be written in JSON."""
    try:
        json.loads(json.dumps(messages, allow_nan=False).encode("ascii"))
        json.dumps(messages, ensure_ascii=False).encode()
    except (TypeError, ValueError):
        return False
    return True


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a structure: what holds it, and its key there."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _value(rng: random.Random, depth: int) -> Any:
    """A random value of JSON."""
    kind = rng.randrange(9 if depth else 7)
    if kind == 0:
        return rng.choice([None, True, False, 0, -7, 10**30, -0.0, 1e16, 1e15, 1e-4, 1e-5, 123e20])
    if kind in (1, 2):
        found = struct.unpack("<d", rng.randbytes(8))[0]
        return found if abs(found) < 1e308 else rng.uniform(-1e3, 1e3)
    if kind == 3:
        return round(rng.uniform(-1, 1) * 10 ** rng.randint(-8, 20), rng.randint(0, 6))
    if kind < 7:
        planes = [(0, 0x80), (0x80, 0x250), (0x2000, 0x2070), (0x20, 0xD800), (0x1F300, 0x1F700)]
        low, high = rng.choice(planes)
        text = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(8)))
        return text + rng.choice(["", "'", '"', "'\"", "\\", "\n"])
    inner = [_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return inner if kind == 7 else {f"k{i}'é": each for i, each in enumerate(inner)}
