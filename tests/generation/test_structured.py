"""What may come next in an answer: enforced as the jsonschema package says, and by whole runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import mlx.core as mx
import numpy as np
import pydantic
import pytest

from apertus_mlx import load
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.generation.decode import draw_tokens
from apertus_mlx.generation.grammar import find_engine
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import SamplingOptions
from apertus_mlx.generation.run import Answer, Generation
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.generation.structured import AnswerRules, require_schema
from apertus_mlx.generation.thought_budget import ThoughtBudget
from apertus_mlx.generation.tool_grammar import ToolGrammar
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.model.language_model import NextTokenLogits
from tests.commands import in_process, refusal

STOPS = frozenset({2, 68, 72})
OBJECT: dict[str, Any] = {"type": "object", "additionalProperties": False}
POINT = {**OBJECT, "properties": {"x": {"type": "integer"}, "y": {}}, "required": ["x"]}
BOUNDED = {
    **OBJECT,
    "properties": {"name": {"type": "string", "maxLength": 12}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
}


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    return open_folder(model_dir()).load()


def rules(loaded: LoadedModel, schema: object = None, **rest: Any) -> AnswerRules:
    text = None if schema is None else require_schema(schema)  # type: ignore[arg-type]
    folder = loaded.folder
    return AnswerRules(folder.tokenizer, folder.config.vocab_size, STOPS, schema=text, **rest)


def follows(found: AnswerRules, ids: Sequence[int]) -> bool:
    """Whether the rules let all of `ids` pass."""
    for token in ids:
        if not found.allows(token):
            return False
        found.accept(token)
    return True


def spelled(loaded: LoadedModel, text: str) -> list[int]:
    """The ids of a text, by which a complete answer ends."""
    return [*loaded.folder.tokenizer.encode(text), 68]


def run(loaded: LoadedModel, options: SamplingOptions, **rest: Any) -> Answer:
    prompt = loaded.folder.prompt_ids(
        "What is the capital of France?", think=rest.get("think", False)
    )
    generation = Generation(loaded, prompt, options, **rest)
    list(generation)
    return generation.answer


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"éü🏔"'], ['"a"', '"abcd"']),
        ({"type": "string", "pattern": "^a|b$"}, ['"ac"', '"cb"'], ['"ca"']),
        ({"type": "string", "pattern": "\\d"}, ['"x1y"'], ['"xy"']),
        ({"type": "string", "format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'], ['""']),
        ({"type": "string", "format": "ipv4"}, ['"10.0.0.255"'], ['"10.0.0.256"']),
        ({"type": "integer", "minimum": 3, "exclusiveMaximum": 17}, ["3", "16"], ["2", "17"]),
        ({"type": "integer", "multipleOf": 7}, ["0", "-7", "21"], ["20"]),
        ({"type": "number", "minimum": -0.5, "maximum": 0.3}, ["0.3", "-0.5"], ["0.31", "-0.6"]),
        ({"type": "number", "exclusiveMaximum": 0.3}, ["0.2999"], ["0.3", "1"]),
        ({"type": "number", "exclusiveMinimum": 2}, ["2.5"], ["2", "1.9"]),
        ({"minimum": 3}, ["3", '"x"', "null"], ["2"]),
        ({"enum": [1, None, {"k": [True]}]}, ["1", '{"k": [true]}'], ["2", '{"k": []}']),
        ({"const": 2.5}, ["2.5"], ["2"]),
        ({"type": ["null", "boolean"]}, ["null", "false"], ["0"]),
        ({"type": "array", "minItems": 1, "maxItems": 2}, ["[1]", '["a", {}]'], ["[]", "[1,1,1]"]),
        ({"items": {"type": "null"}}, ["[null]", "3"], ["[1]"]),
        ({"prefixItems": [{"type": "null"}], "items": False}, ["[null]"], ["[1]", "[null,1]"]),
        (POINT, ['{"x": 1}', '{"x": 1, "y": [2]}'], ["{}", '{"x": "1"}', '{"x": 1, "z": 1}']),
        ({"properties": {"a": {"type": "null"}}}, ['{"b": 1}'], ['{"a": 1}', '{"\\u0061": 1}']),
        ({"additionalProperties": {"type": "null"}}, ['{"b": null}'], ['{"b": 1}']),
        ({"type": "object", "required": ["z"]}, ['{"z": 1}'], ["{}"]),
        ({"type": "object", "minProperties": 1}, ['{"z": 1}'], ["{}"]),
        ({"type": "object", "maxProperties": 1}, ['{"z": 1}'], ['{"z": 1, "y": 1}']),
        (
            {"patternProperties": {"^a": {"type": "null"}}, "properties": {"ab": {"enum": [None]}}},
            ['{"ab": null}', '{"ac": null}', '{"b": 1}'],
            ['{"ab": 1}', '{"ac": 1}'],
        ),
        ({"anyOf": [{"type": "integer"}, {"maxLength": 1}], "maximum": 5}, ["5", '"a"'], ["6"]),
        (
            {"allOf": [POINT, {"properties": {"y": {"type": "null"}}}]},
            ['{"x": 1, "y": null}'],
            ['{"x": 1, "y": 1}'],
        ),
        ({"oneOf": [{"type": "string"}, {"type": "null"}]}, ['"a"', "null"], ["1"]),
        (
            {"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", "maximum": 5},
            ["5"],
            ["6", '"a"'],
        ),
        (
            {"properties": {"v": {"type": "null"}, "next": {"$ref": "#"}}, **OBJECT},
            ['{"next": {"next": {"v": null}}}'],
            ['{"next": {"next": {"v": 1}}}'],
        ),
    ],
)  # fmt: skip
def test_each_keyword(
    schema: dict[str, Any], good: list[str], bad: list[str], embedded: LoadedModel
) -> None:
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for text in good:
        assert validator.is_valid(json.loads(text))
        assert follows(rules(embedded, schema), spelled(embedded, text)), text
    for text in bad:
        assert not validator.is_valid(json.loads(text))
        assert not follows(rules(embedded, schema), spelled(embedded, text)), text


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ('{"x":1}', True), ('{ "x" : 1 }', True), ('{\n    "x": 1\n}', True), ("{\t}", False),
        (' {"x":1}', False), ('{"x":1} ', False), ('{"x":1}\n', False), ('{"x":  1}', False),
        ('{\n\n"x": 1}', False), ('{"x": 1}{"x": 1}', False), ('{"x": 01}', False),
        ('Sure: {"x": 1}', False), ('```json\n{"x": 1}', False), ('{"x": 1', False),
        ('{"x": 1, "y": "\\ud800"}', False), ('{"x": 1, "y": "\x01"}', False), ("", False),
    ],
)  # fmt: skip
def test_form(text: str, passes: bool, embedded: LoadedModel) -> None:
    assert follows(rules(embedded, POINT), spelled(embedded, text)) is passes


def test_no_control_token_and_no_padding_in_a_text(embedded: LoadedModel) -> None:
    folder = embedded.folder
    size = folder.config.vocab_size + 37
    found = AnswerRules(folder.tokenizer, size, STOPS, schema=require_schema({"type": "string"}))
    assert follows(found, folder.tokenizer.encode('"a <|assistant_end|> '))
    assert found.allowed is not None
    allowed = np.flatnonzero(np.array(found.allowed))
    assert len(allowed) > 1000 and max(allowed) < folder.config.vocab_size
    assert folder.tokenizer.special_ids.isdisjoint(allowed.tolist())


def test_only_the_end_follows(embedded: LoadedModel) -> None:
    found = rules(embedded, POINT)
    assert follows(found, embedded.folder.tokenizer.encode('{"x": 12}')) and not found.complete
    assert found.allowed is not None
    assert np.flatnonzero(np.array(found.allowed)).tolist() == [2, 68]
    found.accept(68)
    assert found.complete


def test_thoughts_come_first_where_they_are_asked_for(embedded: LoadedModel) -> None:
    encode = embedded.folder.tokenizer.encode
    thought = [69, *encode('Hm {"'), 70]
    ids = [*thought, *spelled(embedded, '{"x": 1}')]
    assert follows(rules(embedded, POINT, think=True), ids)
    assert not follows(rules(embedded, POINT), ids)
    assert not follows(rules(embedded, POINT, think=True), [*thought, *thought])
    for inside in (2, 68, 69, 71, 72):
        assert not follows(rules(embedded, POINT, think=True), [69, *encode("Hm"), inside])
    opened = rules(embedded, POINT, think=True, prompt=[67, 69, *encode("So")])
    assert follows(opened, [*encode("far"), *ids[len(thought) - 1 :]])
    # A deliberation of an earlier turn is none of this one.
    closed = rules(embedded, POINT, prompt=[67, 69, 68, 65, 66, 67])
    assert follows(closed, spelled(embedded, '{"x": 1}'))


@pytest.mark.parametrize("temperature", [0, 1])
def test_the_embedded_model_thinks_and_answers(embedded: LoadedModel, temperature: float) -> None:
    options = SamplingOptions(
        schema=BOUNDED, temperature=temperature, seed=1, max_thought_tokens=20, max_tokens=120,
        logit_bias={69: 100},
    )  # fmt: skip
    answer = run(embedded, options, think=True)
    assert answer.thought and answer.token_ids.count(69) == answer.token_ids.count(70) == 1
    assert answer.token_ids.index(70) - answer.token_ids.index(69) <= 21
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.text), BOUNDED)


def test_a_cut_answer_says_so(embedded: LoadedModel) -> None:
    options = SamplingOptions(schema=BOUNDED, temperature=0, max_tokens=100)
    whole = run(embedded, options)
    assert whole.finish_reason == "stop"
    assert run(embedded, replace(options, max_tokens=3)).finish_reason == "length"
    cut = run(embedded, replace(options, stop='"old"'))
    assert (cut.finish_reason, cut.text) == ("length", whole.text.split('"old"')[0])
    assert run(embedded, replace(options, stop="}")).finish_reason == "length"
    assert run(embedded, replace(options, stop="nowhere")).text == whole.text
    # A deliberation that reaches the limit leaves no answer.
    thinking = replace(options, max_tokens=5, logit_bias={69: 100})
    answer = run(embedded, thinking, think=True)
    assert (answer.finish_reason, answer.text) == ("length", "") and answer.thought


def test_python(tmp_path: Path) -> None:
    class City(pydantic.BaseModel, extra="forbid"):
        name: str = pydantic.Field(max_length=20)
        inhabitants: int = pydantic.Field(ge=0, lt=10**8)

    path = tmp_path / "city.json"
    path.write_text(json.dumps(City.model_json_schema()))
    with load() as model:
        question = "What is the capital of France?"
        for schema in (City, City.model_json_schema(), path.read_text(), path):
            answer = model.generate(question, schema=schema, temperature=0)
            City.model_validate_json(answer.text)
        chat = model.chat(schema=City, temperature=0)
        assert City.model_validate_json(chat.ask(question).text)
        for each in model.generate_all([question] * 2, schema=City, temperature=0):
            City.model_validate_json(each.text)
        with pytest.raises(UsageError, match="--schema: at #: not is not supported"):
            model.generate(question, schema={"not": {}})


def test_commands(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(BOUNDED))
    done = in_process(
        "generate", "Who are you?", "--schema", path, "-t", "0", "--logit-bias", "2=1"
    )
    jsonschema.validate(json.loads(done.stdout), BOUNDED)
    path.write_text('{"items": {"not": {}}}')
    line = refusal(in_process("generate", "Hello", "--schema", path, "-m", tmp_path), 2)
    assert line == "error: --schema: at #/items: not is not supported"
    refusal(in_process("generate", "Hello", "--schema", tmp_path / "none"), 4)


def test_a_second_use_is_free(monkeypatch: pytest.MonkeyPatch, embedded: LoadedModel) -> None:
    options = SamplingOptions(schema=BOUNDED, temperature=0, max_tokens=50)
    first = run(embedded, options)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(llguidance, "LLTokenizer", never)
    monkeypatch.setattr(llguidance, "LLMatcher", never)
    assert (
        run(embedded, SamplingOptions(schema=BOUNDED, temperature=0, max_tokens=50)).text
        == first.text
    )


def test_a_schema_that_grows_too_large_on_the_way(embedded: LoadedModel) -> None:
    # All optional, so that each of them may come next.
    schema = {
        "type": "array",
        "minItems": 1,
        "items": {"type": "object", "properties": {f"p{i}": {} for i in range(1500)}},
    }
    options = SamplingOptions(schema=schema, temperature=0, max_tokens=30)
    with pytest.raises(UsageError, match="--schema: cannot be enforced"):
        run(embedded, options)


def test_logits_that_are_not_finite_are_told(embedded: LoadedModel) -> None:
    found = rules(embedded, POINT)
    size = embedded.folder.config.vocab_size
    nothing = mx.full((size,), float("nan"))
    sampler = Sampler(SamplingParams(temperature=0), [], size)
    with pytest.raises(RejectedError, match="no finite logits"):
        list(draw_tokens(lambda _: NextTokenLogits(nothing), nothing, sampler, 5, found))
    sound = mx.array(np.random.default_rng(0).standard_normal(size, np.float32))
    sampler = Sampler(SamplingParams(temperature=0), [], size)
    with pytest.raises(RejectedError, match="no finite logits"):
        list(draw_tokens(lambda _: NextTokenLogits(nothing), sound, sampler, 5, found))


def test_running_ahead_changes_nothing(embedded: LoadedModel) -> None:
    """Free text, then a tool call: as if each token had been read before the next was drawn."""
    tools = ToolGrammar([{"name": "f", "parameters": POINT}])
    folder, size = embedded.folder, embedded.folder.config.vocab_size
    params = SamplingParams(
        temperature=1.0, top_p=0.9, seed=4, presence_penalty=1.0, frequency_penalty=0.2,
        repetition_penalty=1.2, logit_bias={71: 6.0, 69: 3.0},
    )  # fmt: skip

    class Careful(AnswerRules):
        steady = property(lambda self: False, lambda self, value: None)  # type: ignore[assignment]

    def drawn(kind: type[AnswerRules], seed: int) -> list[int]:
        numbers = np.random.default_rng(seed)
        found = kind(folder.tokenizer, size, STOPS - {72}, tools=tools)
        budget = ThoughtBudget(3, [(69, 70)], 71)
        sampler = Sampler(replace(params, seed=seed), [5, 6], size, budget)

        def step(_: object = None) -> NextTokenLogits:
            return NextTokenLogits(mx.array(numbers.standard_normal(size, np.float32)))

        return list(draw_tokens(step, step().values, sampler, 40, found))

    calls = 0
    for seed in range(3):
        ids = drawn(AnswerRules, seed)
        assert ids == drawn(Careful, seed)
        calls += 71 in ids
    assert calls


def test_engines_end_with_their_tokenizer() -> None:
    import gc
    import weakref

    folder = open_folder(model_dir())
    found = weakref.ref(find_engine(folder.tokenizer, folder.config.vocab_size, STOPS))
    assert found() is find_engine(folder.tokenizer, folder.config.vocab_size, STOPS)
    del folder
    gc.collect()
    assert found() is None
