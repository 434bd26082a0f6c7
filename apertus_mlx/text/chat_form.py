"""What a chat template takes, and turns of a conversation written as it takes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

from apertus_mlx.errors import UsageError
from apertus_mlx.text.messages import Turn
from apertus_mlx.text.tool_definitions import format_tools


class ChatForm(Protocol):
    """What a chat template takes."""

    @property
    def thinks_by_message(self) -> bool:
        """Whether `has_thinking` of a leading developer message switches deliberation, as in v1.1.

        Otherwise the variable `enable_thinking` does, as in v1.
        """

    @property
    def tools_by_message(self) -> bool:
        """Whether tools are the text `formatted_tools` of a leading developer message, as in v1.1.

        Otherwise they are the variable `tools`, as in v1.
        """

    @property
    def tools_by_variable(self) -> bool:
        """Whether the template writes the variable `tools`."""

    @property
    def blocks(self) -> bool:
        """Whether the content of an assistant may be `{blocks}`, which thoughts need."""

    @property
    def tool_messages(self) -> bool:
        """Whether results may be messages of role tool; if not, they are blocks of an assistant."""

    @property
    def encloses_results(self) -> bool:
        """Whether control tokens stand around results, as in v1.5."""


def write_turns(
    turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], think: bool, form: ChatForm
) -> tuple[list[dict[str, Any]], Sequence[Mapping[str, Any]] | None]:
    """Return messages and the variable `tools` as the template takes them.

    Args:
        turns: See `read_messages`.
        tools: See `read_tools`.
        think: Whether the model is to deliberate. If not, thoughts of earlier turns are left out
            unless they came in blocks.
        form: Of the template.

    Raises:
        UsageError: the template has no way to do what is asked for.
    """
    if tools and think and form.encloses_results:
        raise UsageError("this model deliberates or calls tools, not both; leave one of them out")
    called = any(block["type"] == "tool_calls" for turn in turns for block in turn.blocks)
    thoughts = think and any(block["type"] == "thoughts" for turn in turns for block in turn.blocks)
    merged = called and not form.tool_messages and form.blocks
    # A template takes all contents of assistants as texts, or all as blocks.
    as_blocks = merged or any(turn.structured for turn in turns) or (thoughts and form.blocks)
    if not (think and as_blocks):
        turns = [turn if turn.structured else _without_thoughts(turn) for turn in turns]
    if merged:
        turns = list(_merged(turns))
    messages = [_message(turn, as_blocks) for turn in turns]
    if tools and not (form.tools_by_message or form.tools_by_variable):
        raise UsageError("the chat template of this model has no place for tools")
    by_message = bool(tools) and form.tools_by_message
    if any(turn.role == "developer" for turn in turns):
        if by_message:
            raise UsageError("tools: a developer message of the template's own form has them")
    elif by_message or (think and form.thinks_by_message):
        content: dict[str, object] = {"has_thinking": think}
        if by_message:
            content["formatted_tools"] = format_tools(tools)
        after_system = 1 if turns and turns[0].role == "system" else 0
        messages.insert(after_system, {"role": "developer", "content": content})
    return messages, None if by_message or not tools else tools


def _without_thoughts(turn: Turn) -> Turn:
    blocks = [block for block in turn.blocks if block["type"] != "thoughts"]
    return Turn(turn.role, turn.content, blocks, turn.structured)


def _merged(turns: Sequence[Turn]) -> Iterable[Turn]:
    """Yield turns in which an assistant's calls, their results and what follows are one."""
    for answering, group in groupby(turns, lambda turn: turn.role in ("assistant", "tool")):
        if not answering:
            yield from group
            continue
        blocks: list[dict[str, Any]] = []
        for turn in group:
            if turn.role == "assistant":
                blocks += turn.blocks
                continue
            if blocks[-1]["type"] != "tool_outputs":
                blocks.append({"type": "tool_outputs", "outputs": []})
            blocks[-1]["outputs"].append({"output": turn.content})
        yield Turn("assistant", "", blocks, True)


def _message(turn: Turn, as_blocks: bool) -> dict[str, Any]:
    if turn.role != "assistant":
        return {"role": turn.role, "content": turn.content}
    if as_blocks:
        blocks = turn.blocks or [{"type": "response", "text": ""}]
        return {"role": "assistant", "content": {"blocks": blocks}}
    texts = [block["text"] for block in turn.blocks if block["type"] == "response"]
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    calls = [call for block in turn.blocks for call in block.get("calls", ())]
    if calls:
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return message
