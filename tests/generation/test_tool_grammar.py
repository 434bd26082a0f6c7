"""Tool calls: what a model can write, by each choice; read back by Python's own JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import jsonschema
import numpy as np
import pytest

from apertus_mlx.errors import UsageError
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import SamplingOptions
from apertus_mlx.generation.run import Generation
from apertus_mlx.generation.tool_grammar import ToolGrammar
from apertus_mlx.hub.demo import model_dir
from tests.generation.test_structured import follows, rules
from tests.generation.test_structured_random import random_logits

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 9}, "unit": {"enum": ["C", "F"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
NOW = {"name": "now", "parameters": {}}
ODD = {
    "name": "odd é",
    "parameters": {"properties": {"x": {"type": "array", "uniqueItems": True}}},
}
TOOLS = [WEATHER, NOW, ODD]
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    return open_folder(model_dir()).load()


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ('[{"get_weather": {"city": "Bern"}}]', True),
        ('[{"get_weather": {"city": "Bern", "unit": "C"}}, {"now": {}}]', True),
        ('[ { "now" : { } } ]', True),
        ('[\n  {"now": {}}\n]', True),
        (json.dumps([{ODD["name"]: {"x": [1, 1]}}], ensure_ascii=False), True),
        ("[]", False),
        ('{"now": {}}', False),
        ('[{"get_weather": {}}]', False),
        ('[{"get_weather": {"city": 3}}]', False),
        ('[{"get_weather": {"city": "Bern", "unit": "K"}}]', False),
        ('[{"get_weather": "Bern"}]', False),
        ('[{"now": {"x": 1}}]', False),
        ('[{"other": {}}]', False),
        ('[{"now": {}, "get_weather": {"city": "Bern"}}]', False),
        ('[{"now": {}}', False),
        ('[{"now": {}}] ', False),
    ],
)
def test_what_a_call_may_be(text: str, passes: bool, embedded: LoadedModel) -> None:
    ids = [71, *embedded.folder.tokenizer.encode(text), 72]
    for choice in ("auto", "required"):
        assert follows(rules(embedded, tools=ToolGrammar(TOOLS, choice)), ids) is passes


def test_choices(embedded: LoadedModel) -> None:
    encode = embedded.folder.tokenizer.encode
    now = [71, *encode('[{"now": {}}]'), 72]
    both = [71, *encode('[{"now": {}}, {"now": {}}]'), 72]
    words = encode("Let me see.")

    def passes(ids: list[int], choice: str = "auto", parallel: bool = True, **rest: Any) -> bool:
        found = rules(embedded, tools=ToolGrammar(TOOLS, choice, parallel), **rest)
        return follows(found, ids) and found.complete

    assert passes([*words, 68]) and passes([*words, *now]) and passes(both)
    assert not passes(both, parallel=False) and passes(now, parallel=False)
    assert passes([*words, 68], "none") and not passes(now, "none")
    assert passes(now, "required") and not passes([*words, *now], "required")
    assert not passes([68], "required")
    assert passes(now, "now") and not passes(now, "get_weather")
    assert passes(both, "now") and not passes(both, "now", parallel=False)
    thought = [69, *words]
    assert passes([*thought, 70, *now], "required", think=True)
    assert passes([*thought, *now], "now", think=True)  # calls within a deliberation
    assert not passes([*thought, 70, *now], "required")
    assert not passes([*thought, 70, *words], "required", think=True)
    # With a schema for the answer as well, it is either.
    answer = [*encode('{"x": 1}'), 68]
    schema = {"schema": SCHEMA}
    assert passes(answer, **schema) and passes(now, **schema)
    assert not passes(now, "none", **schema) and not passes(answer, "required", **schema)


def test_nothing_but_text_stays_as_it_was(embedded: LoadedModel) -> None:
    found = rules(embedded, tools=ToolGrammar(TOOLS))
    assert found.steady and found.allowed is None
    forbidden = rules(embedded, tools=ToolGrammar(TOOLS, "none"))
    assert forbidden.steady and forbidden.allowed is not None
    assert np.flatnonzero(~np.array(forbidden.allowed)).tolist() == [71]


def test_schemas_that_cannot_be_enforced() -> None:
    loose = ToolGrammar(TOOLS).loose
    assert loose == {ODD["name"]: "tool odd é: at #/properties/x: uniqueItems is not supported"}
    with pytest.raises(UsageError, match=r"tool o.*uniqueItems is not supported"):
        ToolGrammar(TOOLS, strict=True)


def test_choices_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"--tool-choice zzz: no such tool \(get_weather, now"):
        ToolGrammar(TOOLS, "zzz")
    with pytest.raises(UsageError, match="--tool-choice required: there are no tools"):
        ToolGrammar([], "required")
    assert ToolGrammar([]).allows_all
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert ToolGrammar(TOOLS).allows_all and not ToolGrammar(TOOLS, "none").allows_all
    for choice in ("required", "now"):
        with pytest.raises(UsageError, match=rf"--tool-choice {choice} needs llguidance"):
            ToolGrammar(TOOLS, choice)


def test_calls_of_a_model_that_knows_nothing(embedded: LoadedModel) -> None:
    loaded = random_logits(embedded.folder, 1)
    schemas = {tool["name"]: tool["parameters"] for tool in TOOLS}
    calls = 0
    for seed in range(8):
        choice = ("required", "auto", "now", "get_weather")[seed % 4]
        options = SamplingOptions(
            max_tokens=200, temperature=1.0, top_p=1.0, seed=seed, logit_bias={71: 9.0},
            max_thought_tokens=4,
        )  # fmt: skip
        tools = ToolGrammar(TOOLS, choice, parallel=seed % 3 > 0)
        run = Generation(loaded, [1, 67], options, tools=tools, think=seed % 2 == 0)
        list(run)
        answer = run.answer
        if choice != "auto" and answer.finish_reason != "length":
            assert answer.finish_reason == "tool_calls" and not answer.text
        assert not answer.malformed_tool_calls
        for call in answer.tool_calls[
            : len(answer.tool_calls) - (answer.finish_reason == "length")
        ]:
            assert choice in ("required", "auto", call.name)
            arguments = json.loads(call.arguments)
            assert isinstance(arguments, dict)
            if call.name == "get_weather":
                jsonschema.validate(arguments, schemas["get_weather"])
            calls += 1
    assert calls >= 5
