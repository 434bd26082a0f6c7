"""A conversation as Claude Code holds it: each turn computes only what is new.

Written by us from the documented form: a billing line that changes, marks of the cache, tools,
counts before requests, results of calls, a message of role `system`, a request for a title beside.
"""

from __future__ import annotations

from typing import Any

from apertus_mlx.server.messages import read_message_request
from tests.server.scripted import ScriptedServer, scripted
from tests.server.test_messages import (
    CALLS,
    CALLS_END,
    END,
    PATH,
    put_together,
    stream,
    text,
    turn,
)

MARK = {"cache_control": {"type": "ephemeral"}}
READ = {"type": "object", "properties": {"file_path": {"type": "string"}},
        "required": ["file_path"], "additionalProperties": False,
        "$schema": "http://json-schema.org/draft-07/schema#"}  # fmt: skip
RUN = {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}
TOOLS = [
    {"name": "Read", "description": "Reads a file.", "input_schema": READ},
    {"name": "Bash", "description": "Runs a command.", "input_schema": RUN, **MARK},
]
# What the model says in each turn; the last of them is no call.
SAID: tuple[tuple[str | int, ...], ...] = (
    ("I read the file.", CALLS, '[{"Read": {"file_path": "/a/b.py"}}]', CALLS_END),
    (CALLS, '[{"Bash": {"command": "ls"}}, {"Read": {"file_path": "c"}}]', CALLS_END),
    ("It is done.", END),
)
RESULTS = {"Read": "x = 1\ny = 2", "Bash": [{"type": "text", "text": "b.py c"}]}


def body(messages: list[Any], number: int) -> dict[str, Any]:
    system = [
        text(f"x-anthropic-billing-header: cc_version=2.1; cch={number:05x};"),
        text("You are a coding agent.", **MARK),
        text("Answer briefly. The working directory is /a.", **MARK),
    ]
    return {
        "model": "default", "max_tokens": 200, "stream": True, "temperature": 0, "system": system,
        "messages": messages, "tools": TOOLS, "metadata": {"user_id": "user_1_session_2"},
        "thinking": {"type": "disabled"}, "context_management": {"edits": []},
    }  # fmt: skip


def marked(messages: list[Any]) -> list[Any]:
    """With the mark on the last block, from where it moves on with each request."""
    *earlier, last = messages
    *blocks, end = last["content"]
    return [*earlier, {**last, "content": [*blocks, {**end, **MARK}]}]


class Session:
    """Sends one request after the other, and keeps what was computed for the one before."""

    def __init__(self, double: ScriptedServer) -> None:
        self._double = double
        self._computed: list[int] = []
        self.sent = self.reused = 0

    def send(self, messages: list[Any], *said: str | int) -> dict[str, Any]:
        double = self._double
        asked = body(marked(messages), self.sent)
        counted = {key: asked[key] for key in ("model", "messages", "system", "tools", "thinking")}
        told = double.server.post(f"{PATH}/count_tokens?beta=true", counted).json()
        double.say(*said)
        message = put_together(stream(double.server, **asked))
        reused = message["usage"]["cache_read_input_tokens"]
        assert message["usage"]["input_tokens"] + reused == told["input_tokens"]
        prompt = list(read_message_request(asked, double.server.model).task.prompt)
        common = [a == b for a, b in zip(prompt, self._computed, strict=False)]
        assert reused == [*common, False].index(False), "all that is the same"
        self._computed = [*prompt, *double.model.script]
        self.sent, self.reused = self.sent + len(prompt), self.reused + reused
        print(f"{reused} of {len(prompt)} tokens reused")
        return message


def test_each_turn_computes_only_what_is_new() -> None:
    messages = [turn("user", text("<system-reminder>Be careful.</system-reminder>"),
                     text("Fix the file."))]  # fmt: skip
    with scripted() as double:
        session = Session(double)
        for said in SAID:
            message = session.send(messages, *said)
            calls = [each for each in message["content"] if each["type"] == "tool_use"]
            assert (message["stop_reason"] == "tool_use") == bool(calls)
            results = [
                {"type": "tool_result", "tool_use_id": call["id"], "content": RESULTS[call["name"]]}
                for call in calls
            ]
            messages += [{"role": "assistant", "content": message["content"]}]
            messages += [turn("user", *results)] if calls else []
        # Another request beside, and what is said in between as `system`.
        form = {"type": "json_schema", "schema": {"type": "object"}}
        aside = {"messages": [turn("user", text("Name this."))], "max_tokens": 5}
        found = double.server.post(PATH, {**aside, "output_config": {"format": form}})
        assert found.status_code == 200, found.text
        messages += [turn("system", text("The file has changed.")), turn("user", text("Go on."))]
        session.send(messages, "Yes.", END)
    print(f"in all {session.reused} of {session.sent} tokens reused")
    assert session.reused > session.sent / 2
