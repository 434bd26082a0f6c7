"""Which ids open and close a deliberation, a call and a result in each released vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.errors import RejectedError
from apertus_mlx.text.roles import find_roles
from tests.chat_templates import FAMILIES, load_template
from tests.real_tokenizers import special_names

QUESTION: Any = {"role": "user", "content": "Why?"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULT: Any = {"role": "tool", "tool_call_id": "a", "content": "7"}


def special(version: str, **changes: str) -> dict[int, str]:
    """The special tokens of a released file; `changes` are names by `id_N`."""
    names = dict(enumerate(special_names(version)))
    return names | {int(key.removeprefix("id_")): name for key, name in changes.items()}


@pytest.mark.parametrize("version", ["v1", "v1.1"])
def test_released_vocabularies(version: str) -> None:
    roles = find_roles(special(version), "tokenizer.json")
    assert 69 in roles.thought_starts and 70 in roles.thought_ends
    # `<think>` is there since the vocabulary was made; what it would enclose is a deliberation.
    assert roles.thought_starts == {69, 32} and roles.thought_ends == {70, 33}
    assert roles.results is None


def test_results_of_1_5() -> None:
    names = special("v1", id_73="<|tool_output_start|>", id_74="<|tool_output_end|>")
    assert find_roles(names, "tokenizer.json").results == (73, 74)
    moved = names | {32: "<|inner_prefix|>", 33: "<|inner_suffix|>", 69: "<a>", 70: "<b>"}
    roles = find_roles(moved, "tokenizer.json")
    assert (roles.thought_starts, roles.thought_ends) == ({32, 69}, {33, 70})
    other = special("v1", id_32="<SPECIAL_32>", id_33="<SPECIAL_33>", id_73="<|image|>")
    roles = find_roles(other, "tokenizer.json")
    assert (roles.thought_starts, roles.thought_ends, roles.results) == ({69}, {70}, None)


def test_moved_control_tokens_are_refused_by_name() -> None:
    moved = special("v1", id_67="<SPECIAL_67>", id_900="<|assistant_start|>")
    with pytest.raises(RejectedError, match=r"assistant_start.* has id 900.* 67 \(Apertus 2 "):
        find_roles(moved, "tokenizer.json")
    missing = special("v1")
    del missing[61]
    with pytest.raises(RejectedError, match=r"x/t: id 61 is not a special token.*Apertus 2 moves"):
        find_roles(missing, "x/t")


@pytest.mark.parametrize(
    ("assistants", "open_"),
    [
        ([{"reasoning": "Hm.", "tool_calls": [CALL]}, RESULT], True),
        ([{"reasoning": "Hm.", "tool_calls": [CALL]}, RESULT] * 2, True),
        ([{"reasoning": "Hm.", "content": "Let me see.", "tool_calls": [CALL]}, RESULT], False),
        ([{"content": "Let me see.", "tool_calls": [CALL]}, RESULT], False),
        ([{"reasoning": "Hm.", "tool_calls": [CALL]}, RESULT, QUESTION], False),
        ([{"reasoning": "Hm.", "content": "So."}, QUESTION], False),
        ([], False),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_deliberation_is_open_where_a_template_closes_it_before_the_answer(
    family: str, assistants: list[Any], open_: bool, tmp_path: Path
) -> None:
    template, tokenizer = load_template(family, tmp_path)
    messages: Any = [QUESTION, *({"role": "assistant", **each} for each in assistants)]
    prompt = template.render(messages, think=True)
    assert tokenizer.roles.leaves_thought_open(prompt) is open_
    answered = template.render([*messages, {"role": "assistant", "content": "Yes."}], think=True)
    text = tokenizer.encode("Yes.")
    starts = [at for at in range(len(answered)) if answered[at : at + len(text)] == text]
    assert (answered[starts[-1] - 1] in tokenizer.roles.thought_ends) is open_
