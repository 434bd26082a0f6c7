"""Tools in the Python API: what the model is told, which functions run, how a chat goes on.

The model's tokens are given, so that it calls; or drawn under the tools' schemas.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest

from apertus_mlx import Apertus, ToolCall, UsageError, load, tool_schema
from tests import scripted_answers

Script = Callable[..., None]
QUESTION = "What is the weather in Bern and Zug?"
CALLS = '⟨71⟩[{"weather": {"city": "Bern"}}, {"weather": {"city": "Zug", "days": 2}}]⟨72⟩'
OUTSIDE = {"name": "outside", "description": "Look.", "parameters": {}}


def weather(city: Literal["Bern", "Zug"], days: int = 1) -> dict[str, Any]:
    """Get the weather.

    Args:
        city: Where.
        days: How long.
    """
    return {"city": city, "days": days}


@pytest.fixture(scope="module")
def model() -> Iterator[Apertus]:
    with load() as loaded:
        yield loaded


def as_text(model: Apertus, ids: list[int]) -> str:
    return scripted_answers.as_text(model._folder.tokenizer, ids)


@pytest.fixture
def says(model: Apertus, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Makes the model draw one text after another."""
    tokenizer = model._folder.tokenizer
    return lambda *texts: scripted_answers.script_answers(monkeypatch, tokenizer, *texts)


def test_a_run_calls_and_goes_on(model: Apertus, says: Script) -> None:
    says(CALLS, "Sunny.⟨68⟩")
    chat = model.chat(tools=[weather], temperature=0)
    answer = chat.run(QUESTION)
    assert (answer.text, answer.finish_reason) == ("Sunny.", "stop")
    asked = chat.messages[1]
    first, second = (call["id"] for call in asked["tool_calls"])
    assert chat.messages == [
        {"role": "user", "content": QUESTION},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": first,
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
                },
                {
                    "id": second,
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Zug", "days": 2}'},
                },
            ],
        },
        {"role": "tool", "tool_call_id": first, "content": '{"city": "Bern", "days": 1}'},
        {"role": "tool", "tool_call_id": second, "content": '{"city": "Zug", "days": 2}'},
        {"role": "assistant", "content": "Sunny."},
    ]
    prompt = as_text(model, answer.prompt_token_ids)
    results = '[{"city": "Bern", "days": 1}, {"city": "Zug", "days": 2}]'
    assert f"⟨65⟩{QUESTION}⟨66⟩⟨67⟩{CALLS}{results}" in prompt
    assert 'type weather = (_: {\n// Where.\ncity: "Bern" | "Zug",\n// How long.' in prompt
    assert chat.undo()
    assert chat.messages == []


def test_thoughts_stay_until_the_answer_is_there(model: Apertus, says: Script) -> None:
    says(f"⟨69⟩I should look.{CALLS}", "⟨70⟩Sunny.⟨68⟩")
    chat = model.chat(tools=[weather], think=True)
    answer = chat.run(QUESTION)
    assert (answer.thought, answer.text) == ("", "Sunny.")
    assert f"⟨67⟩⟨69⟩I should look.{CALLS}[" in as_text(model, answer.prompt_token_ids)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ('{"fail": {"text": "x"}}', "error: KeyError: 'x'"),
        ('{"fail": {"text": 3}}', "error: text: expected a text, not 3"),
        ('{"fail": {}}', "error: text: is missing"),
        ('{"odd": {}}', "error: odd: its result has no form in JSON (set is none of its types)"),
        ('{"other": {}}', "error: there is no tool other; there are fail, odd, echo"),
        ('{"tools.fail": {}}', "error: there is no tool tools.fail; there are fail, odd, echo"),
        (
            '{"echo": {"text": "\\ud800"}}',
            "error: echo: its result: holds a lone surrogate ('\\ud800'), which is no character",
        ),
    ],
)
def test_what_goes_wrong_is_told_to_the_model(
    model: Apertus, says: Script, call: str, told: str
) -> None:
    def fail(text: str) -> None:
        raise KeyError(text)

    def odd() -> set[int]:
        return {1}

    def echo(text: str) -> str:
        return text

    fail.__annotations__["text"] = echo.__annotations__["text"] = str
    says(f"⟨71⟩[{call}]⟨72⟩", "Sorry.⟨68⟩")
    chat = model.chat(tools=[fail, odd, echo])
    answer = chat.run("Do it.")
    assert answer.text == "Sorry."
    assert f"⟨72⟩[{told}]" in as_text(model, answer.prompt_token_ids)


def test_arguments_that_a_filter_has_broken_are_told_to_the_model(
    says: Script, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text('{"rules": [{"texts": ["Bern\\""], "replacement": "?"}]}')
    with load(output_filter=rules) as model:
        says('⟨71⟩[{"weather": {"city": "Bern"}}]⟨72⟩', "Sorry.⟨68⟩", "Well.⟨68⟩")
        chat = model.chat(tools=[weather])
        answer = chat.run(QUESTION)
        assert answer.text == "Sorry."
        prompt = as_text(model, answer.prompt_token_ids)
        assert '⟨71⟩[{"weather": {}}]⟨72⟩[error: arguments: is not valid JSON' in prompt
        assert chat.ask("Well?").text == "Well."


def test_calls_that_are_the_callers(model: Apertus, says: Script) -> None:
    says('Let me see. ⟨71⟩[{"weather": {"city": "Zug"}}, {"outside": {}}]⟨72⟩', "Warm.⟨68⟩")
    chat = model.chat(tools=[weather, OUTSIDE])
    answer = chat.run("How is it?")
    assert answer.finish_reason == "tool_calls"
    first, second = answer.tool_calls
    assert (first.name, second.name, second.arguments) == ("weather", "outside", "{}")
    for call in (lambda: chat.ask("Well?"), lambda: chat.give({first.id: "1"})):
        with pytest.raises(UsageError, match="results"):
            call()
    with pytest.raises(TypeError, match="results"):
        chat.give({first.id: 1, second.id: "2"})  # type: ignore[dict-item]
    answer = chat.give({second.id: "warm", first.id: "cold"})
    assert answer.text == "Warm."
    assert "⟨72⟩[cold, warm]" in as_text(model, answer.prompt_token_ids)
    with pytest.raises(UsageError, match="expected those of no call"):
        chat.give({first.id: "cold"})


def test_rounds_end(model: Apertus, says: Script) -> None:
    says(*[CALLS] * 4)
    chat = model.chat(tools=[weather])
    answer = chat.run(QUESTION, max_rounds=2)
    assert answer.finish_reason == "tool_calls"
    roles = [message["role"] for message in chat.messages]
    assert roles == ["user", *["assistant", "tool", "tool"] * 2, "assistant"]
    with pytest.raises(UsageError, match="max-rounds -1"):
        chat.run(QUESTION, max_rounds=-1)


def test_a_function_may_ask_the_model_and_be_interrupted(model: Apertus, says: Script) -> None:
    asked = []

    def think_about() -> str:
        """Think."""
        asked.append(model.generate("Hm?").text)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return "done"

    says('⟨71⟩[{"think_about": {}}]⟨72⟩', "Inner.⟨68⟩", "Outer.⟨68⟩")
    chat = model.chat(tools=[think_about])
    assert chat.run("Think.").text == "Outer."
    says('⟨71⟩[{"think_about": {}}]⟨72⟩', "Inner.⟨68⟩", "Fine.⟨68⟩")
    with pytest.raises(KeyboardInterrupt):
        chat.run("Again.")
    assert asked == ["Inner."] * 2
    with pytest.raises(UsageError, match="give their results, or undo"):
        chat.ask("Well?")
    assert chat.undo()
    assert chat.ask("Well?").text == "Fine."


@pytest.mark.parametrize("choice", ["required", "look"])
def test_a_call_that_has_to_come_follows_its_schema(model: Apertus, choice: str) -> None:
    """The embedded model knows no tools, so that only the grammar can bring it to call."""
    pytest.importorskip("llguidance")

    def look(city: Literal["Bern", "Zug"], hot: bool = False) -> None: ...

    look.__annotations__ = {"city": Literal["Bern", "Zug"], "hot": bool}
    schema = {
        "properties": {"city": {"enum": ["Bern", "Zug"]}, "hot": {"type": "boolean"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = model.generate(
        QUESTION, tools=[look, OUTSIDE], tool_choice=choice, temperature=0.5, seed=1, max_tokens=400
    )
    assert answer.finish_reason == "tool_calls"
    for call in answer.tool_calls:
        assert call.name == "look" or (call.name, choice) == ("outside", "required")
        if call.name == "look":
            jsonschema.validate(json.loads(call.arguments), schema)


def test_no_tool_may_be_called(model: Apertus) -> None:
    """They stay in the prompt, which does not change between turns."""
    with_none = model.generate(QUESTION, tools=[weather], tool_choice="none", max_tokens=5)
    prompt = model.render([{"role": "user", "content": QUESTION}], tools=[weather])
    assert with_none.prompt_token_ids == prompt
    assert not with_none.tool_calls
    assert model.render([{"role": "user", "content": QUESTION}], tools=[tool_schema(weather)]) == (
        prompt
    )


def test_wrong_tools(model: Apertus) -> None:
    def again(a: int) -> None: ...

    again.__annotations__ = {"a": int}
    twice = {"name": "again", "description": "", "parameters": {}}
    for how, kind, words in (
        ({"tools": 3}, TypeError, "^tools: expected list"),
        ({"tools": [3]}, TypeError, r"^tools\[0\]"),
        ({"tools": [again, twice]}, UsageError, r"^tools\[1\]\.function\.name|^tools\[1\]\.name"),
        ({"tools": [lambda a: a]}, UsageError, "^<lambda>: a tool's name"),
        ({"tools": [again], "tool_choice": "other"}, UsageError, "tool-choice other: no such tool"),
        ({"tools": [again], "tool_choice": None}, TypeError, "^tool_choice: expected str"),
        ({"tool_choice": "required"}, UsageError, "tool-choice required: there are no tools"),
    ):
        for call in (model.generate, model.stream):
            with pytest.raises(kind, match=words):
                call(QUESTION, **how)  # type: ignore[operator]
        with pytest.raises(kind, match=words.replace(r"\[0\]", "")):
            model.chat(**how)
    with pytest.raises(UsageError, match=r"raw takes no chat template, so none of .* --tools"):
        model.generate(QUESTION, raw=True, tools=[again])


SCHEMA = {
    "type": "object",
    "properties": {"warm": {"type": "boolean"}},
    "required": ["warm"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_a_schema_and_tools_at_once(model: Apertus, choice: str) -> None:
    """An answer is JSON or calls, as `tool_choice` says, and nothing else."""
    pytest.importorskip("llguidance")
    drawn = set()
    for think in (False, True):
        answer = model.generate(
            QUESTION, tools=[OUTSIDE], tool_choice=choice, schema=SCHEMA, think=think,
            max_thought_tokens=3, temperature=0.5, seed=1, max_tokens=60,
        )  # fmt: skip
        if answer.finish_reason == "tool_calls":
            assert answer.text == "" and answer.tool_calls
            drawn.add("calls")
        elif answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text), SCHEMA)
            assert not answer.tool_calls
            drawn.add("json")
    assert drawn <= {"auto": {"calls", "json"}, "none": {"json"}, "required": {"calls"}}[choice]
    assert drawn


def test_the_schema_holds_for_the_answer_to_results(model: Apertus) -> None:
    pytest.importorskip("llguidance")
    chat = model.chat(
        tools=[OUTSIDE], tool_choice="outside", schema=SCHEMA, temperature=0, max_tokens=200
    )
    answer = chat.ask(QUESTION)
    assert (answer.text, answer.finish_reason) == ("", "tool_calls")
    answer = chat.give({call.id: "warm" for call in answer.tool_calls}, logit_bias={71: -100})
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.text), SCHEMA)


def test_calls_of_many_prompts(model: Apertus, says: Script) -> None:
    says(CALLS, "Sunny.⟨68⟩")
    question = {"role": "user", "content": QUESTION}
    first, second = model.generate_all([QUESTION, [question]], tools=[weather])
    assert first.prompt_token_ids == model.render([question], tools=[weather])
    assert first.prompt_token_ids == second.prompt_token_ids
    assert [call.name for call in first.tool_calls] == ["weather"] * 2
    assert all(isinstance(call, ToolCall) for call in first.tool_calls)
    assert (second.text, second.tool_calls) == ("Sunny.", [])
    with pytest.raises(UsageError, match="no such tool"):
        model.generate_all([QUESTION], tools=[weather], tool_choice="other")


def test_messages_that_end_with_calls(model: Apertus, says: Script) -> None:
    says(CALLS, "Sunny.⟨68⟩")
    asked = model.generate(QUESTION, tools=[weather])
    talk: Any = [{"role": "user", "content": QUESTION}, asked.as_message()]
    for answer in (model.generate, lambda messages: model.generate_all([messages])):
        with pytest.raises(UsageError, match="the last one calls weather; its result comes next"):
            answer(talk)
    talk += [
        {"role": "tool", "tool_call_id": call.id, "content": "warm"} for call in asked.tool_calls
    ]
    answered = model.generate(talk, tools=[weather])
    assert answered.as_message() == {"role": "assistant", "content": "Sunny."}
    assert f"{CALLS}[warm, warm]" in as_text(model, answered.prompt_token_ids)
