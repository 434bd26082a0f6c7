"""With a draft, everything together: thoughts, stop texts, schemas, tools, forms of the cache."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from apertus_mlx.cache import CacheConfig
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.draft_pace import FixedPace
from apertus_mlx.generation.drafts import Drafting, ModelDraft
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.generation.run import Generation
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.server.engine import EngineLimits
from tests.server.running import QUESTION, Server, serving
from tests.server.test_batched import CHAT, ENDLESS, SCHEMA, TOOL, asked, said
from tests.server.test_stream import Client, wait_until_idle

# Longer than the window that stays in full precision, and than each ring.
LONG = [{"role": "user", "content": "Name the capital of France, in one sentence. " * 12}]
SETTINGS = [
    RunOptions(kv_bits=4),
    RunOptions(),
    RunOptions(kv_bits=8),
    RunOptions(max_kv=16),
    RunOptions(kv_bits=4, max_kv=180),
]
KINDS: dict[str, dict[str, Any]] = {
    "by chance": {"temperature": 1.2, "seed": 5, **ENDLESS},
    "stop text": {"temperature": 0, "stop": ["a"], **ENDLESS},
    "schema": {
        "temperature": 1, "seed": 6,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    },
    "tool": {"temperature": 1, "seed": 7, "tools": [TOOL], "tool_choice": "required"},
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return open_folder(model_dir()).load(RunOptions(compute="mlx", dtype="float32"))


@pytest.fixture(scope="module")
def drafted(loaded: LoadedModel) -> LoadedModel:
    folder = loaded.folder
    draft = ModelDraft(loaded.model, folder.context_length, folder.config.output_vocab_size)
    return replace(loaded, drafting=Drafting(draft, FixedPace(3)))


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda settings: str(settings.form))
def settings(request: pytest.FixtureRequest) -> RunOptions:
    found: RunOptions = request.param
    return found


@pytest.fixture(scope="module")
def server(drafted: LoadedModel, settings: RunOptions) -> Iterator[Server]:
    limits = EngineLimits(running=4, idle_prefixes=4)
    with serving(load=lambda: drafted, limits=limits, settings=settings) as found:
        yield found
        found.lives()


def asked_about(kind: str, think: bool, messages: Any = LONG) -> dict[str, Any]:
    effort = "high" if think else "none"
    how = {"max_tokens": 24, "reasoning_effort": effort, **KINDS[kind]}
    return asked(CHAT, messages=messages, **how)[1]


def require_alike(server: Server, plain: Server, kind: str, think: bool, messages: Any) -> None:
    body = asked_about(kind, think, messages)
    [choice] = said(server.post(CHAT, body))[0]
    assert [choice] == said(plain.post(CHAT, body))[0], (kind, think)
    if choice["finish_reason"] != "stop" or think:
        return
    if kind == "schema":
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
    if kind == "stop text":
        assert "a" not in choice["message"]["content"]


@pytest.mark.nightly
def test_pairs_say_what_they_say_without(
    server: Server, loaded: LoadedModel, settings: RunOptions
) -> None:
    with serving(load=lambda: loaded, settings=settings) as plain:
        for kind in KINDS:
            for think in (False, True):
                require_alike(server, plain, kind, think, LONG)
    assert server.get("/v1/status").json()["engine"]["draft"]["accepted"] > 20


def test_some_pairs_in_a_ring(loaded: LoadedModel, drafted: LoadedModel) -> None:
    settings = RunOptions(max_kv=16)
    with (
        serving(load=lambda: loaded, settings=settings) as plain,
        serving(load=lambda: drafted, settings=settings) as server,
    ):
        for kind, think in (("schema", True), ("stop text", False)):
            require_alike(server, plain, kind, think, QUESTION)
        assert server.get("/v1/status").json()["engine"]["draft"]["accepted"] > 5


def plainly(loaded: LoadedModel, settings: RunOptions, think: bool) -> Any:
    """The API's own way to the answer `by chance`, without server, batch and draft."""
    kind = KINDS["by chance"]
    bias = {int(token): value for token, value in kind["logit_bias"].items()}
    options = SamplingOptions(temperature=1.2, seed=5, max_tokens=24, logit_bias=bias)
    prefix = CachedPrefix(loaded.model, settings.form or CacheConfig())
    prompt = loaded.folder.prompt_ids(LONG, think=think)  # type: ignore[arg-type]
    run = Generation(loaded, prompt, options, prefix=prefix, think=think)
    deque(run, maxlen=0)
    return run.answer


@pytest.mark.nightly
def test_a_client_that_goes_leaves_what_it_had_to_others(
    server: Server, loaded: LoadedModel, settings: RunOptions
) -> None:
    """In the middle of a block; the next one goes on from its prompt, and says what is right."""
    expected = plainly(loaded, settings, think=False)
    body = asked_about("by chance", think=False)

    async def play() -> None:
        client = Client(server, {**body, "max_tokens": 300, "stream": True})
        call = asyncio.create_task(client.call())
        await client.something.wait()
        client.leave()
        await call

    for _ in range(2):
        server.run(play())
        wait_until_idle(server)
        found = server.post(CHAT, body).json()
        message = found["choices"][0]["message"]
        assert (message["content"] or "") == expected.text
        assert (message.get("reasoning_content") or "") == (expected.thought or "")
        assert found["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
