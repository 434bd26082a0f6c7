"""A conversation as Codex has it, replayed: what was sent before is not computed again.

Codex sends its instructions, a developer's message and all that was said with each request; the
same conversation goes on by `previous_response_id`, too.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.scripted import ScriptedServer, scripted
from tests.server.test_conformance import CALLS, CALLS_END, END, THOUGHT, THOUGHT_END
from tests.server.test_responses import events

SHELL = {
    "type": "function", "name": "shell", "description": "Runs a command", "strict": False,
    "parameters": {
        "type": "object",
        "properties": {"command": {"type": "array", "items": {"type": "string"}},
                       "workdir": {"type": "string"}},
        "required": ["command"], "additionalProperties": False,
    },
}  # fmt: skip
BODY = {
    "model": "default",
    "instructions": "You are a coding agent in a terminal. Use the shell to read files.",
    "tools": [SHELL, {"type": "web_search"}, {"type": "image_generation"},
              {"type": "namespace", "name": "mcp", "tools": []}],
    "tool_choice": "auto", "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "a-conversation",
}  # fmt: skip
OPENING = [
    {"type": "message", "role": "developer",
     "content": [{"type": "input_text", "text": "<sandbox>Write in /repo only.</sandbox>"}]},
    {"type": "message", "role": "user",
     "content": [{"type": "input_text", "text": "<cwd>/repo</cwd>"}]},
    {"type": "message", "role": "user",
     "content": [{"type": "input_text", "text": "Why does the build fail?"}]},
]  # fmt: skip
# What the model says, and what the shell answers.
STEPS = (
    ((CALLS, '[{"shell": {"command": ["ls"], "workdir": "/repo"}}]', CALLS_END),
     "Makefile\nmain.c\n"),
    ((CALLS, '[{"shell": {"command": ["make"]}}]', CALLS_END), "main.c:3: error: x undeclared\n"),
    (("The variable x is not declared in main.c.", END), None),
)  # fmt: skip


def outputs(response: dict[str, Any], text: str) -> list[dict[str, Any]]:
    return [
        {"type": "function_call_output", "call_id": item["call_id"], "output": text}
        for item in response["output"]
        if item["type"] == "function_call"
    ]


def replay(double: ScriptedServer, *, stateless: bool, think: bool = False) -> list[dict[str, Any]]:
    """The responses to a conversation of three requests."""
    history: list[Any] = list(OPENING)
    sent, before, found = list(OPENING), None, []
    for parts, result in STEPS:
        thought: tuple[Any, ...] = (THOUGHT, "I look.", THOUGHT_END) if think else ()
        double.say(*thought, *parts)
        body = {**BODY, "input": history if stateless else sent, "store": not stateless}
        body["previous_response_id"] = before
        *_, last = events(double.server, **body)
        assert last["type"] == "response.completed"
        response = last["response"]
        found.append(response)
        if result is not None:
            sent, before = outputs(response, result), None if stateless else response["id"]
            assert len(sent) == 1
            history += [*response["output"], *sent]
    assert found[-1]["output"][-1]["content"][0]["text"] == STEPS[-1][0][0]
    return found


@pytest.mark.parametrize(
    ("stateless", "think"),
    [
        (True, False),
        pytest.param(False, False, marks=pytest.mark.nightly),
        pytest.param(True, True, marks=pytest.mark.nightly),
        pytest.param(False, True, marks=pytest.mark.nightly),
    ],
)
def test_what_was_sent_before_is_reused(
    stateless: bool, think: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted() as double:
        responses = replay(double, stateless=stateless, think=think)
    usages = [each["usage"] for each in responses]
    sent = [each["input_tokens"] for each in usages]
    cached = [each["input_tokens_details"]["cached_tokens"] for each in usages]
    with capsys.disabled():
        how = "the whole input each time" if stateless else "by previous_response_id"
        print(f"\nCodex, {how}: of {sum(sent)} tokens {sum(cached)} reused; {cached} of {sent}")
    assert cached[0] == 0
    for before, again, now in zip(sent, cached[1:], sent[1:], strict=False):
        # Behind results the template ends the turn and begins another, which are two tokens that
        # are not there when the turn goes on with a call.
        assert before - 2 <= again < now
