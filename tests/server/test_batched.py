"""On MLX requests share decode steps, and each says what it says alone, whatever others ask."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import httpx
import mlx.core as mx
import pytest

from apertus_mlx.cache import CacheConfig, FullCache
from apertus_mlx.generation import batch as batch_module
from apertus_mlx.generation.batch import Batch, Event
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.generation.run import Generation
from apertus_mlx.model.apertus import Model
from apertus_mlx.server.engine import EngineLimits
from apertus_mlx.server.jobs import Job
from tests.server.running import QUESTION, Server, embedded_on_mlx, serving
from tests.server.test_stream import Client, wait_until_idle

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "now"}}
# No answer ends by itself.
ENDLESS = {"logit_bias": {"2": -100, "68": -100, "72": -100}}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = list(range(100, 148))


def asked(path: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    prompt = {"messages": QUESTION} if path == CHAT else {"prompt": "The capital of France"}
    return path, {"temperature": 0, "max_tokens": 9, **prompt, **fields}


# Greedy and by chance, with what makes a row differ from its neighbours.
REQUESTS = [
    asked(TEXT, prompt="Zurich is", temperature=1.5, seed=7, frequency_penalty=0.9,
          repetition_penalty=1.3, min_p=0.01, top_k=40, logprobs=2, **ENDLESS),
    asked(CHAT, temperature=2, seed=5, max_tokens=20, response_format={
        "type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}),
    asked(CHAT, temperature=1, seed=6, max_tokens=20, tools=[TOOL], tool_choice="required"),
    asked(TEXT, presence_penalty=0.5, prompt_logprobs=1),
]  # fmt: skip


class Watched(Model):
    """The embedded model, which counts the rows of its steps and breaks where a test says."""

    broken_from = 10**9
    rows: list[int]

    def make_cache(self, form: CacheConfig = CacheConfig()) -> list[Any]:  # noqa: B008
        caches = super().make_cache(form)
        return [*caches[:-1], Broken(self)] if form == CacheConfig() else caches

    def logits(self, hidden: mx.array) -> mx.array:
        self.rows.append(hidden.shape[0])
        return super().logits(hidden)


class Broken(FullCache):
    """A cache that fails from so many positions on."""

    def __init__(self, model: Watched) -> None:
        super().__init__()
        self._model = model

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.offset + keys.shape[2] > self._model.broken_from:
            raise RuntimeError("this row is broken")
        return super().update_and_fetch(keys, values)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    found = embedded_on_mlx()
    assert isinstance(found.model, Model)
    twin = Watched(found.model.config)
    vars(twin).update(vars(found.model))
    dict.update(twin, found.model)
    twin.rows = []
    return replace(found, model=twin)


@pytest.fixture
def model(loaded: LoadedModel) -> Iterator[Watched]:
    assert isinstance(loaded.model, Watched)
    loaded.model.rows.clear()
    yield loaded.model
    loaded.model.broken_from = 10**9


@pytest.fixture(scope="module")
def server(loaded: LoadedModel) -> Iterator[Server]:
    limits = EngineLimits(running=8, idle_prefixes=0)
    with serving(load=lambda: loaded, limits=limits) as found:
        yield found
        found.lives()


def gather(server: Server, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Hold jobs back until so many have come, so that they run at the same time."""
    submit, held = server.engine.submit, list[Job]()

    def hold(jobs: Sequence[Job]) -> None:
        held.extend(jobs)
        if len(held) == count:
            submit(held)

    monkeypatch.setattr(server.engine, "submit", hold)


def ask_all(server: Server, requests: Sequence[tuple[str, Any]]) -> list[httpx.Response]:
    async def ask() -> list[httpx.Response]:
        return await asyncio.gather(
            *(server.ask("POST", path, json=body) for path, body in requests)
        )

    return server.run(ask())


def said(response: httpx.Response) -> Any:
    """What a client is told, but for what is new with each answer."""
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    for choice in choices:
        for call in choice.get("message", {}).get("tool_calls", ()):
            del call["id"]
    return rounded([choices, response.json()["usage"]])


def rounded(value: Any) -> Any:
    """With numbers to three digits: those of a batch differ from those alone in the last ones."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def alone(server: Server) -> list[Any]:
    return [said(server.post(path, body)) for path, body in REQUESTS]


def test_each_says_what_it_says_alone(
    server: Server, model: Watched, alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gather(server, monkeypatch, len(REQUESTS))
    together = [said(each) for each in ask_all(server, REQUESTS)]
    assert max(model.rows) == len(REQUESTS)
    assert together == alone


@pytest.mark.parametrize("settings", [RunOptions(kv_bits=4), RunOptions(max_kv=16)])
def test_answers_are_those_of_runs(
    loaded: LoadedModel, settings: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the API's own way to an answer, with all forms of cache."""
    texts, expected = ["The capital of France", "Zurich is a", "word " * 12], []
    for text in texts:
        prefix = CachedPrefix(loaded.model, settings.form or CacheConfig())
        prompt = loaded.folder.encode_raw(text)
        run = Generation(
            loaded, prompt, SamplingOptions(temperature=0, max_tokens=6), prefix=prefix
        )
        deque(run, maxlen=0)
        expected.append(run.answer.text)
    with serving(load=lambda: loaded, settings=settings) as server:
        gather(server, monkeypatch, len(texts))
        found = ask_all(server, [asked(TEXT, prompt=text, max_tokens=6) for text in texts])
    assert [each.json()["choices"][0]["text"] for each in found] == expected


def test_all_answers_of_a_request_read_its_prompt_once(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is that of a request with its seed."""
    lengths: list[int] = []
    read_chunk = batch_module.read_chunk

    def noting(model: Any, ids: mx.array, *given: Any) -> Any:
        lengths.append(ids.size)
        return read_chunk(model, ids, *given)

    body = {"prompt": LONG[:20], "temperature": 1.5, "max_tokens": 4, **ENDLESS}
    with serving(load=lambda: loaded) as server:
        monkeypatch.setattr(batch_module, "read_chunk", noting)
        several = server.post(TEXT, {**body, "seed": 3, "n": 3}).json()
        assert sum(lengths) == 20 + 2
        assert several["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        one_by_one = [server.post(TEXT, {**body, "seed": seed}).json() for seed in (3, 4, 5)]
    assert [each["index"] for each in several["choices"]] == [0, 1, 2]
    texts = [each["choices"][0]["text"] for each in one_by_one]
    assert [each["text"] for each in several["choices"]] == texts and len(set(texts)) == 3


def test_a_client_that_goes_leaves_its_neighbours_alone(
    server: Server, model: Watched, alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gather(server, monkeypatch, 3)
    cancelled = server.engine.metrics.finished.labels("cancelled")._value

    async def play() -> tuple[httpx.Response, ...]:
        client = Client(server, asked(CHAT, max_tokens=1500, stream=True, **ENDLESS)[1])
        call = asyncio.create_task(client.call())
        others = [
            asyncio.create_task(server.ask("POST", path, json=body)) for path, body in REQUESTS[:2]
        ]
        await client.something.wait()
        client.leave()
        await call
        return await asyncio.gather(*others)

    before = cancelled.get()
    assert [said(each) for each in server.run(play())] == alone[:2]
    wait_until_idle(server)
    assert cancelled.get() == before + 1 and max(model.rows) > 1


@pytest.mark.parametrize("broken_from", [44, 51])
def test_a_fault_ends_only_its_row(
    server: Server,
    model: Watched,
    alone: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    broken_from: int,
) -> None:
    """In the reading of its prompt, or in a step that it shares."""
    model.broken_from = broken_from
    guilty = asked(TEXT, prompt=LONG, **ENDLESS)
    gather(server, monkeypatch, 3)
    found = ask_all(server, [REQUESTS[0], guilty, REQUESTS[1]])
    failed = found.pop(1)
    assert failed.status_code == 500 and failed.json()["error"]["code"] == "internal"
    assert [said(each) for each in found] == alone[:2]
    monkeypatch.undo()
    server.lives()


def test_a_long_prompt_stops_nobody(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tokens of an answer at most one chunk is read."""
    log: list[int | None] = []
    read_chunk, step = batch_module.read_chunk, Batch.step

    def reading(model: Any, ids: mx.array, *given: Any) -> Any:
        log.append(ids.size)
        return read_chunk(model, ids, *given)

    def stepping(batch: Batch) -> list[Event]:
        events = step(batch)
        log.extend(None for event in events if event.row.prompt_tokens < 100)
        return events

    monkeypatch.setattr(batch_module, "read_chunk", reading)
    monkeypatch.setattr(Batch, "step", stepping)
    settings = RunOptions(prefill_step=8)
    with serving(load=lambda: loaded, settings=settings) as server:
        gather(server, monkeypatch, 2)
        long = asked(TEXT, prompt=LONG, max_tokens=2)
        for each in ask_all(server, [asked(TEXT, max_tokens=12, **ENDLESS), long]):
            said(each)
    first, last = log.index(None), len(log) - log[::-1].index(None)
    gaps = [list(chunks) for read, chunks in groupby(log[first:last], bool) if read]
    assert gaps == [[8]] * 6
