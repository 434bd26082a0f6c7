"""A server with a draft says what one without says, and tells what the draft was good for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from apertus_mlx.generation.draft_pace import FixedPace
from apertus_mlx.generation.drafts import Drafting, LookupDraft, ModelDraft
from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.server.engine import EngineLimits
from tests.server.running import Server, embedded_on_mlx, serving
from tests.server.test_batched import ENDLESS, REQUESTS, TEXT, ask_all, asked, gather, said

ASKED = [
    *REQUESTS,
    asked(TEXT, prompt="a b c d e f g a b c d", max_tokens=24, temperature=0.7, seed=3, **ENDLESS),
    asked(TEXT, prompt="Paris is the capital of", max_tokens=12, stop=["France"]),
]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return embedded_on_mlx()


@pytest.fixture(
    scope="module", params=["same model", pytest.param("lookup", marks=pytest.mark.nightly)]
)
def server(request: pytest.FixtureRequest, loaded: LoadedModel) -> Iterator[Server]:
    folder = loaded.folder
    model = ModelDraft(loaded.model, folder.context_length, folder.config.output_vocab_size)
    draft: Any = model if request.param == "same model" else LookupDraft()
    drafted = replace(loaded, drafting=Drafting(draft, FixedPace(3)))
    limits = EngineLimits(running=8, idle_prefixes=4)
    with serving(load=lambda: drafted, limits=limits) as found:
        yield found
        found.lives()


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> list[Any]:
    limits = EngineLimits(running=8, idle_prefixes=0)
    with serving(load=lambda: loaded, limits=limits) as found:
        return [said(found.post(path, body)) for path, body in ASKED]


def test_each_says_what_it_says_without(server: Server, expected: list[Any]) -> None:
    for (path, body), alone in zip(ASKED, expected, strict=True):
        # What earlier requests have computed is counted otherwise.
        assert said(server.post(path, body))[0] == alone[0]
    counted = server.get("/v1/status").json()["engine"]["draft"]
    assert counted["drafted"] >= counted["accepted"] > 0
    assert counted["off"] is None and counted["row_costs"] is None


def test_together_too(server: Server, expected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    gather(server, monkeypatch, len(ASKED))
    together = [said(each) for each in ask_all(server, ASKED)]
    assert [found[0] for found in together] == [alone[0] for alone in expected]


def test_a_prefix_that_a_draft_helped_to_make_is_used_again(server: Server) -> None:
    path, body = asked(TEXT, prompt="The capital of France is", max_tokens=20, **ENDLESS)
    first = server.post(path, body).json()
    again = server.post(path, body).json()
    assert again["choices"] == first["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
