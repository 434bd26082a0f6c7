"""A line that changes with each request does not keep prompts from beginning alike."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.running import QUESTION, Server

LINE = "x-anthropic-billing-header: cc_version=2.1; cch=%s;"


def prompt(server: Server, *messages: dict[str, Any]) -> list[int]:
    response = server.post("/apply-template", {"messages": [*messages, *QUESTION]})
    assert response.status_code == 200, response.text
    found: list[int] = response.json()["tokens"]
    return found


@pytest.mark.parametrize("role", ["system", "developer"])
def test_it_is_dropped_before_the_prompt_is_made(server: Server, role: str) -> None:
    def part(text: str) -> dict[str, str]:
        return {"type": "text", "text": text}

    plain = prompt(server, {"role": role, "content": "Be brief."})
    for content in (
        f"{LINE % 'a1'}\nBe brief.",
        f"{LINE % 'b2'}\n\nBe brief.",
        [part(LINE % "c3"), part("Be brief.")],
        [part(f"{LINE % 'd4'}\nBe brief.")],
    ):
        assert prompt(server, {"role": role, "content": content}) == plain
    assert prompt(server, {"role": role, "content": LINE % "e5"}) == prompt(
        server, {"role": role, "content": ""}
    )


def test_it_is_text_anywhere_else(server: Server) -> None:
    for turns, role, text in (
        (QUESTION, "user", "%s"),
        (QUESTION, "assistant", "%s"),
        ([], "system", "Bill: %s"),
        ([], "system", "Be brief.\n%s"),
    ):
        first, second = (
            prompt(server, *turns, {"role": role, "content": text % (LINE % each)})
            for each in ("a1", "b2")
        )
        assert first != second


def test_the_second_request_reuses_the_first(server: Server) -> None:
    asked = [{"role": "system", "content": f"{LINE % 'a1'}\nYou know tables of facts."}, *QUESTION]
    server.chat(messages=asked)
    asked[0] = {**asked[0], "content": f"{LINE % 'b2'}\nYou know tables of facts."}
    usage = server.chat(messages=asked).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
