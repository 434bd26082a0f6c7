"""What a chat template takes, found by rendering small conversations with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from apertus_mlx.errors import RejectedError

_QUESTION = {"role": "user", "content": "probe question"}
_THOUGHTS = "probe thoughts"
_ANSWER = "probe answer"
_TOOL = "probe_tool"
_RESULT = "probe result"

# Renders messages, tools and the switch for thinking: texts, and None for each control token.
_Render = Callable[[list[Any], Any, bool], list[str | None]]


class ProbedForm:
    """The `ChatForm` of a template. Each answer is found when it is first asked for."""

    def __init__(self, render: _Render) -> None:
        self._render = render

    @cached_property
    def thinks_by_message(self) -> bool:
        """See `ChatForm`."""
        on, off = (self._developer({"has_thinking": value}) for value in (True, False))
        return on != off and "has_thinking" not in on + off

    @cached_property
    def tools_by_message(self) -> bool:
        """See `ChatForm`."""
        text = self._developer({"has_thinking": False, "formatted_tools": _TOOL})
        return _TOOL in text and "formatted_tools" not in text

    @cached_property
    def tools_by_variable(self) -> bool:
        """See `ChatForm`."""
        tool = {"name": _TOOL, "description": "d", "parameters": {}}
        return _TOOL in _text(self._try([_QUESTION], [tool]))

    @cached_property
    def blocks(self) -> bool:
        """See `ChatForm`."""
        blocks = [{"type": "thoughts", "text": _THOUGHTS}, {"type": "response", "text": _ANSWER}]
        text = _text(self._try([_QUESTION, {"role": "assistant", "content": {"blocks": blocks}}]))
        return _THOUGHTS in text and _ANSWER in text and "blocks" not in text

    @cached_property
    def tool_messages(self) -> bool:
        """See `ChatForm`."""
        return _RESULT in _text(self._with_result)

    @cached_property
    def encloses_results(self) -> bool:
        """See `ChatForm`."""
        pieces = self._with_result
        return any(
            pieces[index - 1 : index + 2] == [None, _RESULT, None]
            for index in range(1, len(pieces))
        )

    @cached_property
    def _with_result(self) -> list[str | None]:
        call = {"type": "function", "function": {"name": _TOOL, "arguments": "{}"}}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        return self._try([_QUESTION, calling, {"role": "tool", "content": _RESULT}, _QUESTION])

    def _developer(self, content: dict[str, object]) -> str:
        return _text(self._try([{"role": "developer", "content": content}, _QUESTION]))

    def _try(self, messages: list[Any], tools: Any = None) -> list[str | None]:
        """Return what the template writes; nothing if it refuses."""
        try:
            return self._render(messages, tools, False)
        except RejectedError:
            return []


def _text(pieces: list[str | None]) -> str:
    return "".join(piece or "" for piece in pieces)
