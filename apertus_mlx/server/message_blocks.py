"""Anthropic's conversations as the runtime takes them: blocks to texts, thoughts, calls, results.

A message of role `system` becomes a turn of the user where it stands: at the head it would change
the beginning of the prompt, and nothing computed before could be used again.
"""

from __future__ import annotations

from typing import Any

from apertus_mlx.errors import UsageError
from apertus_mlx.server.billing_line import without_billing_line
from apertus_mlx.server.errors import in_request
from apertus_mlx.server.fields import require_messages
from apertus_mlx.text.given import Given

Message = dict[str, Any]
BETWEEN_BLOCKS = "\n\n"
ERROR_RESULT = "Error: "
ROLES = ("user", "assistant", "system")


def read_conversation(system: Any, messages: Any) -> list[Message]:
    """The messages in OpenAI's form; a field `system` that is given comes first.

    Raises:
        ApiError: 400, something is wrong or not supported.
    """
    require_messages(messages)
    name = "system"
    try:
        found = [] if system is None else [_system(system)]
        name = "messages"
        reader = _Reader()
        for message in Given(messages, "messages").list():
            reader.add(message)
    except UsageError as error:
        raise in_request(error, name) from None
    return found + reader.found


def _system(value: Any) -> Message:
    # Claude Code's billing line is a block of its own.
    [message] = without_billing_line([{"role": "system", "content": value}])
    return {"role": "system", "content": _text(Given(message["content"], "system"))}


class _Reader:
    """Takes messages in turn, and knows which calls have no result yet."""

    def __init__(self) -> None:
        self.found: list[Message] = []
        self._open: dict[str, str] = {}  # the ids of such calls, with their places

    def add(self, message: Given) -> None:
        role = message["role"]
        if role.value is None:
            role.refuse("is missing")
        if role.text() not in ROLES:
            role.refuse(f"{role.value[:40]!r}: expected {', '.join(ROLES)}")
        if role.value == "assistant":
            self._assistant(message["content"])
        else:
            self._user(message["content"], may_answer=role.value == "user")

    def _user(self, content: Given, may_answer: bool) -> None:
        if isinstance(content.value, str):
            self._say("user", content.text(), content)
            return
        blocks = content.list("a text or a list of blocks")
        texts: list[str] = []
        for block in blocks:
            if may_answer and block["type"].value == "tool_result":
                if texts:
                    block.refuse("results of calls come before texts")
                self._result(block)
            else:
                texts.append(_text_block(block))
        if texts or not blocks:
            self._say("user", BETWEEN_BLOCKS.join(texts), content)

    def _say(self, role: str, text: str, content: Given) -> None:
        if self._open:
            content.refuse(
                f"first comes a tool_result for the call at {next(iter(self._open.values()))}"
            )
        self.found.append({"role": role, "content": text})

    def _result(self, block: Given) -> None:
        given = block["tool_use_id"]
        if self._open.pop(given.text(), None) is None:
            given.refuse(f"{given.value[:64]!r} is the id of no call that waits for its result")
        content = block["content"]
        text = "" if content.value is None else _text(content)
        failed = block["is_error"]
        if not isinstance(failed.value, bool | None):
            failed.refuse("expected true or false")
        if failed.value:
            text = ERROR_RESULT + text
        self.found.append({"role": "tool", "tool_call_id": given.value, "content": text})

    def _assistant(self, content: Given) -> None:
        if isinstance(content.value, str):
            self._say("assistant", content.text(), content)
            return
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[Message] = []
        waiting: dict[str, str] = {}
        for block in content.list("a text or a list of blocks"):
            kind = block["type"].value
            if kind == "tool_use":
                calls.append(_call(block, waiting))
            elif kind == "redacted_thinking":
                continue  # nobody here could read it
            elif calls:
                block.refuse("calls come last in a message")
            elif kind == "thinking":
                thoughts.append(block["thinking"].text())
            else:
                texts.append(_text_block(block))
        self._say("assistant", "".join(texts), content)
        message = self.found[-1]
        if thought := "".join(thoughts):
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
            message["content"] = message["content"] or None
            self._open = waiting


def _call(block: Given, places: dict[str, str]) -> Message:
    """A call, whose place is noted by its id."""
    call_id = block["id"].text()
    if call_id in places:
        block["id"].refuse(f"{call_id[:64]!r} is also the id of an earlier call")
    places[call_id] = block.place
    block["input"].object()
    function = {"name": block["name"].called_name(), "arguments": block["input"].json()}
    return {"id": call_id, "type": "function", "function": function}


def _text(content: Given) -> str:
    """A text, or those of text blocks."""
    if isinstance(content.value, str):
        return content.text()
    return BETWEEN_BLOCKS.join(map(_text_block, content.list("a text or a list of text blocks")))


def _text_block(block: Given) -> str:
    kind = block["type"]
    if kind.value != "text":
        kind.refuse(f"{kind.value!r:.40} is not supported here; this model reads text only")
    return block["text"].text()
