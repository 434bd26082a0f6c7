"""The Python API as a caller sees it: values, errors, ends, and nothing on the streams."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import Any, get_type_hints

import mlx.core as mx
import numpy as np
import pytest

import apertus_mlx
from apertus_mlx import (
    Answer,
    Apertus,
    NotFoundError,
    Piece,
    Progress,
    RejectedError,
    ResourceError,
    UsageError,
    load,
)
from apertus_mlx.generation import options
from apertus_mlx.hub.demo import model_dir
from tests.builders import config_4x, write_checkpoint

QUESTION = "What is the capital of France?"
OTHER = "What is the chemical symbol for gold?"
ANSWER = "The capital of France is Paris."
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module", params=["mlx", "cpu"])
def model(request: pytest.FixtureRequest) -> Iterator[Apertus]:
    if request.param == "cpu":
        pytest.importorskip("onnxruntime")
    with load(compute=request.param) as loaded:
        yield loaded


def test_an_answer(model: Apertus) -> None:
    answer = model.generate(QUESTION, temperature=0, seed=5)
    assert isinstance(answer, Answer)
    assert (answer.text, answer.thought, answer.finish_reason) == (ANSWER, "", "stop")
    assert answer.prompt_token_ids == model.render(MESSAGES)
    assert model.decode(answer.token_ids) == ANSWER
    assert answer.generated_tokens == len(answer.token_ids)
    assert answer.prompt_tokens == len(answer.prompt_token_ids)
    assert answer.seed == 5
    assert model.generate(MESSAGES, temperature=0).token_ids == answer.token_ids
    assert model.generate(QUESTION, temperature=0, max_tokens=2).finish_reason == "length"
    assert model.generate(QUESTION, temperature=0, stop=" is").text == "The capital of France"


def test_what_the_command_line_says(model: Apertus) -> None:
    """The same ids as `apertus-mlx generate`, which takes another way to them."""
    command = [sys.executable, "-P", "-m", "apertus_mlx", "generate", QUESTION, "--seed", "3"]
    told = subprocess.run([*command, "--json"], capture_output=True, check=True, text=True)
    mine = model.generate(QUESTION, seed=3)
    assert f'"text": "{mine.text}"' in told.stdout


def test_thought_and_text_are_apart(model: Apertus) -> None:
    stream = model.stream(QUESTION, think=True, temperature=0)
    pieces = list(stream)
    answer = stream.answer
    assert "Paris" in answer.text and answer.thought and answer.thought not in answer.text
    assert "".join(piece.text for piece in pieces if piece.is_thought) == answer.thought
    assert "".join(piece.text for piece in pieces if not piece.is_thought) == answer.text
    system = {"role": "system", "content": "Be brief."}
    with_system = model.generate(QUESTION, system="Be brief.", think=True, temperature=0)
    assert with_system.prompt_token_ids == model.render([system, *MESSAGES], think=True)


def test_raw_continues_a_text(model: Apertus) -> None:
    answer = model.generate("The capital of France is", raw=True, max_tokens=3, temperature=0)
    assert answer.text.startswith(" Paris")
    assert answer.prompt_token_ids == [1, *model.encode("The capital of France is")]


def test_many_prompts_share_what_they_begin_with(model: Apertus) -> None:
    prompts: list[Any] = [QUESTION, MESSAGES, OTHER]
    answers = model.generate_all(prompts, system="Answer briefly.", temperature=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        fresh = model.generate(prompt, system="Answer briefly.", temperature=0)
        assert answer.token_ids == fresh.token_ids
    assert answers[0].reused_prompt_tokens == 0
    assert answers[1].reused_prompt_tokens == answers[1].prompt_tokens - 1
    pairs = zip(answers[1].prompt_token_ids, answers[2].prompt_token_ids, strict=False)
    common = list(takewhile(lambda pair: pair[0] == pair[1], pairs))
    assert answers[2].reused_prompt_tokens == len(common) > 10
    assert model.generate_all([]) == []


def test_a_chat(model: Apertus) -> None:
    chat = model.chat(system="Answer briefly.", temperature=0)
    first = chat.ask(QUESTION)
    second = chat.ask(OTHER)
    assert [message["role"] for message in chat.messages] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    fresh = model.generate(chat.messages[:-1], temperature=0)
    assert second.token_ids == fresh.token_ids and second.reused_prompt_tokens > 0
    assert chat.retry().token_ids == second.token_ids
    assert len(chat.retry(max_tokens=1).token_ids) == 1
    assert chat.undo()
    chat.messages.clear()  # a copy
    assert [message["content"] for message in chat.messages[1:]] == [QUESTION, first.text]
    stream = chat.stream(OTHER)
    with pytest.raises(UsageError, match="nothing of this stream"):
        _ = stream.answer
    assert "".join(piece.text for piece in stream) == stream.answer.text == second.text
    chat.ask(QUESTION)
    assert stream.answer.text == second.text
    assert chat.undo() and chat.undo() and chat.undo() and not chat.undo()
    with pytest.raises(UsageError, match="nothing to retry"):
        chat.retry()


def test_logprobs_are_those_of_a_log_softmax() -> None:
    """Against mlx-lm's own model of the same folder, in float64."""
    pytest.importorskip("mlx_lm")
    from mlx_lm.utils import load_model

    text = f"{ANSWER} The capital of Italy is Rome. " * 3
    peer = load_model(model_dir())[0]
    peer.set_dtype(mx.float32)
    for given in (
        {"compute": "mlx", "dtype": "float32"}, {"compute": "cpu", "precision": "float32"}
    ):  # fmt: skip
        with load(prefill_step=40, **given) as model:  # type: ignore[arg-type]
            ids = model.encode(text)
            found = model.logprobs(text)
            assert model.logprobs("") == []
        logits = np.array(peer(mx.array([[1, *ids]]))[0, :-1]).astype(np.float64)
        largest = logits.max(-1, keepdims=True)
        logs = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
        expected = logs[np.arange(len(ids)), ids]
        assert len(found) == len(ids) > 40
        np.testing.assert_allclose(found, expected, atol=2e-4)


def test_the_module_is_mlx_lms_only_where_mlx_computes(model: Apertus) -> None:
    if type(model._open().model).__name__ == "CPUModel":
        with pytest.raises(UsageError, match='compute="mlx"'):
            _ = model.model
    else:
        assert model.model is model._open().model


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2.0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"top_k": "3"}, "top_k"),
        ({"seed": 1.5}, "seed"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", 3]}, "stop"),
        ({"stop": b"a"}, "stop"),
        ({"system": 3}, "system"),
        ({"think": 1}, "think"),
        ({"raw": "yes"}, "raw"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_a_wrong_type_names_its_argument(
    model: Apertus, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(TypeError, match=named):
        model.generate(QUESTION, **arguments)
    with pytest.raises(TypeError, match=named):
        model.stream(QUESTION, **arguments)
    with pytest.raises(TypeError, match=named):
        model.generate_all([QUESTION], **arguments)
    if named == "nonsense":
        for call in (load, model.chat, model.chat().ask, apertus_mlx.plan):
            with pytest.raises(TypeError, match=r"^nonsense: no such option"):
                call(*[QUESTION] * (call.__name__ == "ask"), **arguments)  # type: ignore[operator]
    if named != "raw":
        with pytest.raises(TypeError, match=named):
            model.chat(**arguments)


@pytest.mark.parametrize("messages", [[3], 3, None, [None], ["text"], {"role": "user"}, b"text"])
def test_messages_of_a_wrong_type(model: Apertus, messages: Any) -> None:
    with pytest.raises(TypeError, match=r"^messages"):
        model.render(messages=messages)
    with pytest.raises(TypeError, match=r"^prompt"):
        model.generate(messages)
    with pytest.raises(TypeError, match=r"^prompts"):
        model.generate_all([messages])


@pytest.mark.parametrize(
    ("message", "kind", "words"),
    [
        ({"role": "robot", "content": "a"}, UsageError, r"^prompt\[1\]\.role: 'robot': expected"),
        ({"role": "user", "content": None}, TypeError, r"^prompt\[1\]\.content: expected a text"),
        (
            {"role": "user", "content": {"parts": 5}},
            TypeError,
            r"^prompt\[1\]\.content\.parts: .*list",
        ),
        ({"role": "tool", "content": "a"}, UsageError, r"^prompt\[1\]\.role: a result follows"),
    ],
    ids=["role", "content", "parts", "order"],
)
def test_messages_that_no_template_takes(
    model: Apertus, message: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        model.generate([{"role": "system", "content": "a"}, message])


def test_messages_without_end(model: Apertus) -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    circle: list[Any] = []
    circle.append(circle)
    for endless in ({"a": deep}, {"a": circle}):
        call = {"id": "c", "function": {"name": "f", "arguments": endless}}
        with pytest.raises(UsageError, match=r"^prompt\[0\]\.tool_calls\[0\].*deep"):
            model.generate([{"role": "assistant", "tool_calls": [call]}])


def test_messages_as_openai_writes_them(model: Apertus) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "Briefly."}]},
        {"role": "user", "content": QUESTION, "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "Paris"},
    ]
    function = {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}
    tools = [{"type": "function", "function": function}]
    text = model.decode(model.render(messages, tools=tools))
    assert "Tool Capabilities:\n// f\ntype f = (_: {\na?: number\n}) => any;" in text
    assert text.endswith(f'{QUESTION}[{{"f": {{"a": 1}}}}][Paris]')
    answer = model.generate(messages, max_tokens=1)
    assert answer.prompt_token_ids == model.render(messages)
    assert model.generate_all([messages], max_tokens=1)[0].prompt_token_ids == model.render(
        messages
    )
    with pytest.raises(UsageError, match=r"^prompts\[0\]\[3\]\.tool_call_id: 'd'"):
        model.generate_all([[*messages[:3], {**messages[3], "tool_call_id": "d"}]])
    with pytest.raises(UsageError, match=r"^tools\[0\]\.function\.name: 'a b'"):
        model.render(messages, tools=[{"type": "function", "function": {"name": "a b"}}])
    for index in (0, 1, 3):
        long = [dict(message) for message in messages]
        long[index]["content"] = [{"type": "text", "text": "word " * 9000}]
        with pytest.raises(UsageError, match="tokens or more"):
            model.render(long)


@pytest.mark.parametrize("message", [{"role": 3, "content": "a"}, {"role": "user", "content": {3}}])
def test_messages_that_hold_a_wrong_type(model: Apertus, message: Any) -> None:
    with pytest.raises(TypeError, match=r"^messages"):
        model.render([message])


def test_other_wrong_types(model: Apertus) -> None:
    wrong: Any = 3
    for call, name in (
        (lambda: load(wrong), "model"),
        (lambda: load(context=True), "context"),
        (lambda: load(progress=wrong), "progress"),
        (lambda: load(kv_bits="8"), "kv_bits"),  # type: ignore[arg-type]
        (lambda: load(memory_limit=1.5), "memory_limit"),  # type: ignore[arg-type]
        (lambda: load(compute=wrong), "compute"),
        (lambda: load(force="no"), "force"),  # type: ignore[arg-type]
        (lambda: load(nonsense=1), "nonsense"),  # type: ignore[call-arg]
        (lambda: model.encode(wrong), "text"),
        (lambda: model.decode(wrong), "ids"),
        (lambda: model.decode(["a"]), "ids"),  # type: ignore[list-item]
        (lambda: model.logprobs(wrong), "text"),
        (lambda: model.render(MESSAGES, think=wrong), "think"),
        (lambda: model.chat().ask(wrong), "text"),
        (lambda: model.chat().ask(QUESTION, seed="1"), "seed"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=name):
            call()


def test_wrong_values(model: Apertus, tmp_path: Path) -> None:
    for call, kind, words in (
        (lambda: load("no-such-folder"), NotFoundError, "no-such-folder"),
        (lambda: load(Path("organisation/name")), NotFoundError, "no such folder"),
        (lambda: load("a/b", offline=True), NotFoundError, "offline"),
        (lambda: load(tmp_path), RejectedError, "config.json"),
        (lambda: load(context=0), UsageError, "context 0"),
        (lambda: load(compute="gpu"), UsageError, "'gpu'"),  # type: ignore[arg-type]
        (lambda: load(kv_bits=5), UsageError, "kv-bits 5"),
        (lambda: load(prefill_step=0), UsageError, "prefill-step 0"),
        (lambda: load(memory_limit="much"), UsageError, "'much'"),
        (lambda: load(memory_limit=0), UsageError, "memory-limit"),
        (lambda: load(memory_limit=10**6), ResourceError, "1.0 MB"),
        (lambda: load(""), UsageError, "model: is empty"),
        (lambda: model.generate(""), UsageError, "the prompt is empty$"),
        (lambda: model.generate_all(["a", ""]), UsageError, r"^prompts\[1\]: the prompt is empty$"),
        (lambda: model.generate([]), UsageError, "no message"),
        (lambda: model.generate([{"role": "user"}]), UsageError, "content"),
        (lambda: model.generate(MESSAGES, raw=True), UsageError, "raw"),
        (lambda: model.generate("a", raw=True, think=True), UsageError, "raw"),
        (lambda: model.generate("word " * 9000), UsageError, "context"),
        (lambda: model.stream("a " * 1800 + "é" * 900), UsageError, "context"),
        (lambda: model.logprobs("a " * 4000), UsageError, "context"),
        (lambda: model.generate("a", temperature=-1), UsageError, "temperature -1"),
        (lambda: model.generate("a", max_tokens=0), UsageError, "max-tokens 0"),
        (lambda: model.generate("a", stop=""), UsageError, "stop"),
        (lambda: model.decode([10**9]), UsageError, "no token"),
        (lambda: model.chat().ask(""), UsageError, "empty"),
    ):
        with pytest.raises(kind, match=words):
            call()


def test_a_model_without_a_template_continues_text(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_4x(num_hidden_layers=1))
    (folder / "chat_template.jinja").unlink()
    with load(str(folder)) as model:
        assert sum("no chat template" in note for note in model.notes) == 1
        for how in ({"system": "Be brief."}, {"think": True}):
            with pytest.raises(UsageError, match="no chat template"):
                model.generate("hello", **how)  # type: ignore[arg-type]
        answer = model.generate("hello", max_tokens=2)
        assert answer.prompt_token_ids == [1, *model.encode("hello")]
        with pytest.raises(RejectedError, match="no chat template"):
            model.chat()
        with pytest.raises(RejectedError, match="no chat template"):
            model.generate(MESSAGES)


def test_what_loading_tells(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_4x(num_hidden_layers=1, auto_map={"a": "evil.A"}))
    told: list[Progress] = []
    with load(folder, progress=told.append) as model:
        assert any("auto_map" in note for note in model.notes)
        assert model.context_length == 512
        assert model.directory == folder
    assert {(one.stage, one.unit) for one in told} == {("loading", "bytes")}
    assert told[-1].done == told[-1].total > 0
    assert [one.done for one in told] == sorted(one.done for one in told)


def test_a_limit_shapes_the_plan_and_is_told() -> None:
    with load(compute="mlx", context=2000) as usual:
        full = usual.memory["total_bytes"]
        assert not any("memory" in note for note in usual.notes)
    with load(compute="mlx", context=2000, memory_limit=int(full * 0.9)) as tight:
        assert tight.memory["total_bytes"] <= full * 0.9
        assert any(note.startswith("memory: about") for note in tight.notes)
        assert "Paris" in tight.generate(QUESTION, temperature=0).text


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config_4x(num_hidden_layers=1, auto_map={"a": "evil.A"}))
    with load(folder, memory_limit="2GB") as model:
        model.generate("a", max_tokens=3)
        list(model.stream("a", max_tokens=3))
        model.chat().ask("a", max_tokens=3)
    assert capfd.readouterr() == ("", "")


def test_importing_is_cheap_and_names_are_there() -> None:
    script = (
        "import sys, apertus_mlx\n"
        "heavy = {'mlx', 'numpy', 'tokenizers', 'jinja2', 'huggingface_hub', 'typer', 'logging'}\n"
        "names = dir(apertus_mlx)\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from apertus_mlx import UsageError\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from apertus_mlx import *\n"
        "assert set(apertus_mlx.__all__) == set(names) and load and Apertus\n"
        "assert not {'transformers', 'torch', 'mlx_lm', 'huggingface_hub'} & set(sys.modules)\n"
        "with load() as model: model.generate('hi', max_tokens=1)\n"
        "assert not {'transformers', 'torch', 'mlx_lm', 'huggingface_hub'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with pytest.raises(AttributeError, match="nonsense"):
        _ = apertus_mlx.nonsense  # type: ignore[attr-defined]


@pytest.mark.parametrize("end", ["model.generate('hi', max_tokens=2)", "next(stream)"])
def test_a_program_may_end_without_closing(end: str) -> None:
    script = f"import apertus_mlx\nmodel = apertus_mlx.load()\nstream = model.stream('hi')\n{end}\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("group", "keywords"),
    [
        (options.SamplingOptions, options.SamplingKeywords),
        (options.RunOptions, options.RunKeywords),
    ],
)
def test_keywords_are_the_fields(group: Any, keywords: Any) -> None:
    assert {field.name for field in fields(group)} == set(keywords.__annotations__)
    assert get_type_hints(group) == get_type_hints(keywords)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_model_is_not_copied(model: Apertus, way: Callable[[Apertus], object]) -> None:
    with pytest.raises(TypeError, match="cannot be copied or pickled; load it again"):
        way(model)


@pytest.mark.parametrize("close", ["model.close()", "del model"])
def test_no_file_stays_open(close: str) -> None:
    pytest.importorskip("onnxruntime")
    script = (
        "import gc, os\n"
        "from apertus_mlx import load\n"
        "load(compute='cpu').close()\n"
        "before = os.listdir('/dev/fd')\n"
        "model = load(compute='cpu')\n"
        "model.generate('Hi', max_tokens=2)\n"
        f"{close}\n"
        "gc.collect()\n"
        "assert os.listdir('/dev/fd') == before\n"
    )
    command = [sys.executable, "-P", "-X", "dev", "-W", "error::ResourceWarning", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_piece_is_text() -> None:
    with load() as model:
        pieces = list(model.stream(QUESTION, temperature=0))
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert "".join(piece.text for piece in pieces) == ANSWER


def test_one_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="pipeline: splits a model over the machines"):
        load(pipeline=True)
    monkeypatch.setenv("MLX_RANK", "0")
    with pytest.raises(UsageError, match=r"load: computes on one machine; under mlx\.launch"):
        load()
