"""Conversations and tools with any value in any place: a prompt, or a line that names the place."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.errors import UsageError
from tests.chat_templates import FAMILIES, load_template
from tests.text.test_random_conversations import Conversation

_TEXTS = ["", "a", "call_1", "\ud800", "\udc80", "[1]", '{"a": NaN}', "tool", "system", "text"]
_VALUES: list[Any] = [None, True, 0, -1, 2.5, float("nan"), 10**30, [], {}, [[]], [None], ["a"]]
_VALUES += [{"a": 1}, {3: 4}, {"type": "text"}, b"a", {1, 2}, object(), "a" * 70, *_TEXTS]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a structure: what holds it, and its key there."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_in_any_place(tmp_path: Path, family: str) -> None:
    template, tokenizer = load_template(family, tmp_path)
    source = random.Random(family)
    refused = 0
    for seed in range(80):
        one = Conversation(seed, family)
        messages, tools = json.loads(json.dumps([one.messages, one.tools]))
        damaged: list[Any] = [messages, tools] if tools else [messages]
        holder, key = source.choice(list(_places(damaged)))
        if isinstance(holder, dict) and source.random() < 0.2:
            del holder[key]
        else:
            holder[key] = copy.copy(source.choice(_VALUES))
        try:
            ids = template.render(damaged[0], think=one.think, tools=damaged[1] if tools else None)
        except UsageError as error:
            refused += 1
            assert str(error).startswith(("messages", "tools"))
            assert "\n" not in str(error)
            str(error).encode()
        else:
            assert ids[0] == 1
            assert ids.count(1) == 1
            assert max(ids) < tokenizer.vocab_size
    assert 20 < refused < 76
