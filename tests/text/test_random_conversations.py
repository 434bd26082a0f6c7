"""Random conversations: as OpenAI writes them, rendered here; in a template's own form, by others.

Daily, plain Jinja with the settings of transformers and the tokenizers library render some;
nightly, transformers itself renders 10,000.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from apertus_mlx.text.template import ChatTemplate
from tests.chat_templates import FAMILIES, load_template, render_with_jinja
from tests.chat_tokenizers import backend_json
from tests.text.test_tool_definitions import format_tools, random_tools, read_tools

# Everything but surrogates and what could spell a control token.
PLANES = [(0x20, 0x3B), (0x3D, 0x7F), (0xA0, 0x250), (0x900, 0xA00), (0x4E00, 0x4F00)]
PLANES += [(0x1F300, 0x1F600), (0x00, 0x20), (0x200B, 0x2030), (0xE000, 0xE010)]


class Conversation:
    """A random conversation, built twice: `messages` as OpenAI writes it, `native` as templates do.

    Attributes:
        tools: as OpenAI writes them, None for none.
        think: whether the model is to deliberate.
    """

    def __init__(self, seed: int, family: str) -> None:
        self._random = random.Random(seed)
        self._ids = 0
        chance = self._random.random
        # What spells a control token stays text here, but not for others.
        tools = json.loads(json.dumps(random_tools(self._random)).replace("<", "("))
        self.tools = tools if chance() < 0.5 else None
        self.think = chance() < 0.5 and not (self.tools and family == "v1.5")
        self.messages: list[Any] = []
        # Texts, or [(kind, text or calls)] of an assistant, or results.
        turns: list[tuple[str, Any]] = []
        self._instruct(turns)
        for _ in range(self._random.randint(1, 4)):
            self._turn(turns)
        self.native = _native(turns, self.think, self.tools, family)

    def _pick(self, *choices: Any) -> Any:
        return self._random.choice(choices)

    def _text(self, most: int = 12) -> str:
        """A text that is not empty."""
        planes = [self._random.choice(PLANES) for _ in range(3)]
        size = self._random.randint(1, most)
        return "".join(
            chr(self._random.randrange(*self._random.choice(planes))) for _ in range(size)
        )

    def _content(self, text: str) -> Any:
        """A content that is `text`: itself, or cut into parts."""
        if self._random.random() < 0.7:
            return text
        at = self._random.randint(0, len(text))
        return [{"type": "text", "text": part} for part in (text[:at], text[at:])]

    def _instruct(self, turns: list[tuple[str, Any]]) -> None:
        texts = [self._text() for _ in range(self._random.randint(0, 2))]
        for text in texts:
            role = self._pick("system", "developer")
            self.messages.append({"role": role, "content": self._content(text)})
        if texts:
            turns.append(("system", "\n\n".join(texts)))

    def _turn(self, turns: list[tuple[str, Any]]) -> None:
        text = self._text(40)
        role = "user" if not turns or self._random.random() < 0.8 else self._pick("user", "system")
        if role == "system" and all(role == "system" for role, _ in turns):
            role = "user"
        turns.append(("user", text))
        self.messages.append({"role": role, "content": self._content(text), "name": "Ann"})
        while self._random.random() < 0.4:
            self._call(turns)
        if self._random.random() < 0.8:
            self._answer(turns)

    def _assistant(
        self, calls: list[Any], text: str, turns: list[tuple[str, Any]]
    ) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._content(text)}
        blocks: list[tuple[str, Any]] = []
        if not text and calls:
            message = self._pick({"role": "assistant"}, {**message, "content": None}, message)
        if self._random.random() < 0.4:
            thoughts = self._text()
            message[self._pick("reasoning", "reasoning_content")] = thoughts
            blocks.append(("thoughts", thoughts))
        blocks += [("response", text)] if text else []
        blocks += [("calls", calls)] if calls else []
        turns.append(("assistant", blocks))
        self.messages.append(message)
        return message

    def _answer(self, turns: list[tuple[str, Any]]) -> None:
        self._assistant([], self._text(40), turns)

    def _call(self, turns: list[tuple[str, Any]]) -> None:
        """Calls, whose results come in any order."""
        calls: list[tuple[str, str]] = []
        written = []
        for _ in range(self._random.randint(1, 3)):
            values = {self._text(): self._pick(1, -2.5, None, [self._text()], {"a": "é"})}
            name, arguments = (
                self._pick("f", "get_weather", "a-b"),
                json.dumps(values, ensure_ascii=False),
            )
            given: Any = values
            if self._random.random() < 0.5:
                given = arguments = self._pick(arguments, json.dumps(values, indent=1))
            self._ids += 1
            calls.append((name, arguments))
            function = {"name": name, "arguments": given}
            written.append({"id": f"call_{self._ids}", "type": "function", "function": function})
        text = self._pick("", "", self._text())
        self._assistant(calls, text, turns)["tool_calls"] = written
        results = [self._text() for _ in calls]
        turns += [("tool", result) for result in results]
        messages = [
            {"role": "tool", "tool_call_id": call["id"], "content": self._content(result)}
            for call, result in zip(written, results, strict=True)
        ]
        self._random.shuffle(messages)
        self.messages += messages


def _block(kind: str, value: Any) -> dict[str, Any]:
    if kind != "calls":
        return {"type": kind, "text": value}
    calls = [{"name": name, "arguments": arguments} for name, arguments in value]
    return {"type": "tool_calls", "calls": calls}


def _native(turns: list[tuple[str, Any]], think: bool, tools: Any, family: str) -> list[Any]:
    kinds = {kind for role, blocks in turns if role == "assistant" for kind, _ in blocks}
    one_turn = family == "v1.1" and "calls" in kinds  # with its results in it
    as_blocks = one_turn or (think and "thoughts" in kinds)
    native: list[Any] = []
    for role, value in turns:
        if role != "assistant":
            if role == "tool" and one_turn:
                blocks = native[-1]["content"]["blocks"]
                if blocks[-1]["type"] != "tool_outputs":
                    blocks.append({"type": "tool_outputs", "outputs": []})
                blocks[-1]["outputs"].append({"output": value})
            else:
                native.append({"role": role, "content": value})
            continue
        shown = [_block(*each) for each in value if think or each[0] != "thoughts"]
        if not as_blocks:
            texts = [each["text"] for each in shown if each["type"] == "response"]
            native.append({"role": "assistant", "content": "".join(texts)})
            for each in shown:
                if each["type"] == "tool_calls":
                    functions = [{"type": "function", "function": call} for call in each["calls"]]
                    native[-1]["tool_calls"] = functions
        elif one_turn and native[-1]["role"] == "assistant":
            native[-1]["content"]["blocks"] += shown
        else:
            native.append({"role": "assistant", "content": {"blocks": shown}})
    if family == "v1.1" and (think or tools):
        content: dict[str, Any] = {"has_thinking": think}
        if tools:
            content["formatted_tools"] = format_tools(read_tools(tools))
        at = 1 if native[0]["role"] == "system" else 0
        native.insert(at, {"role": "developer", "content": content})
    return native


def compare(
    template: ChatTemplate, family: str, seeds: range, others: Callable[..., list[int]]
) -> None:
    """Require that `others` make the same ids of conversations: given messages, tools, switches."""
    for seed in seeds:
        one = Conversation(seed, family)
        prompt = seed % 2 == 0
        how: Any = {"think": one.think, "tools": one.tools, "add_generation_prompt": prompt}
        ids = template.render(json.loads(json.dumps(one.messages)), **how)
        tools = read_tools(one.tools) if one.tools and family != "v1.1" else None
        assert ids == others(one.native, tools, one.think, prompt), (family, seed)
        assert ids.count(1) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_jinja_and_the_tokenizers_library_make_the_same_ids(
    tmp_path: Path, family: str
) -> None:
    source, version = FAMILIES[family]
    backend = tokenizers.Tokenizer.from_str(backend_json(version))

    def others(messages: Any, tools: Any, think: bool, prompt: bool) -> list[int]:
        variables = {"tools": tools, "enable_thinking": think, "add_generation_prompt": prompt}
        text = render_with_jinja(source, messages, **variables)
        return backend.encode(text, add_special_tokens=False).ids

    compare(load_template(family, tmp_path)[0], family, range(30), others)


@pytest.mark.nightly
@pytest.mark.parametrize("start", range(0, 2500, 500))
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_makes_the_same_ids(tmp_path: Path, family: str, start: int) -> None:
    transformers = pytest.importorskip("transformers")
    template, _ = load_template(family, tmp_path)
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<s>",
        chat_template=FAMILIES[family][0],
    )

    def others(messages: Any, tools: Any, think: bool, prompt: bool) -> list[int]:
        ids: list[int] = reference.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=prompt,
            enable_thinking=think,
            return_dict=False,
        )
        return ids

    compare(template, family, range(start, start + 500), others)


def test_random_conversations_have_what_they_are_for() -> None:
    conversations = [Conversation(seed, "v1") for seed in range(100)]
    text = json.dumps([one.messages for one in conversations])
    for words in ("reasoning", '"tool"', '"system", "content": [', '"content": null', "arguments"):
        assert text.count(words) > 10
    assert re.search(r"\\u0[0-9a-f]{3}", text)
    assert not re.search("<", text)
