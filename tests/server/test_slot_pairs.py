"""Slots on disk together with drafts, thoughts, all forms of the cache, and clients that go."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.generation.options import RunOptions
from tests.daily import every
from tests.server.running import serving
from tests.server.test_batched import CHAT, said
from tests.server.test_draft_pairs import SETTINGS, asked_about, drafted, loaded
from tests.server.test_stream import Client, wait_until_idle

__all__ = ["drafted", "loaded"]


@pytest.mark.parametrize(
    "settings", every(5, SETTINGS[3:] + SETTINGS[:3]), ids=lambda given: str(given.form)
)
def test_who_goes_leaves_a_slot_that_changes_no_answer(
    loaded: LoadedModel, drafted: LoadedModel, settings: RunOptions, tmp_path: Path
) -> None:
    settings = replace(settings, compute="mlx", dtype="float32")  # as the models are loaded
    bodies = [asked_about("by chance", think) for think in (False, True)]
    with serving(load=lambda: loaded, settings=settings) as plain:
        expected = [said(plain.post(CHAT, body))[0] for body in bodies]
    for round_ in range(2):
        # A client goes in the middle, and so does the server.
        with serving(load=lambda: drafted, settings=settings, slots=tmp_path / "slots") as server:
            for number, (body, answer) in enumerate(zip(bodies, expected, strict=True)):
                named = {**body, "cache_key": str(number)}
                if round_:
                    found = server.post(CHAT, named)
                    assert said(found)[0] == answer
                    cached = found.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
                    assert cached > 20
                    continue

                async def leave(
                    body: object = {**named, "max_tokens": 300, "stream": True},
                ) -> None:
                    client = Client(server, body)
                    call = asyncio.create_task(client.call())
                    await client.something.wait()
                    client.leave()
                    await call

                server.run(leave())
                wait_until_idle(server)
    assert len(list((tmp_path / "slots").iterdir())) == 2
