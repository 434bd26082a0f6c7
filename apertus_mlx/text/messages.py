"""Conversations as OpenAI writes them, or a template's own way, read into checked turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, NotRequired, TypedDict

from apertus_mlx.errors import UsageError
from apertus_mlx.text.call_results import CallResults, needs_results
from apertus_mlx.text.given import Given

ROLES = ("system", "developer", "user", "assistant", "tool")
# What would change the prompt. Other keys, such as `name` and `refusal`, have no place in it.
_UNSUPPORTED = ("audio", "function_call", "images", "partial", "prefix")


class Message(TypedDict):
    """One turn of a conversation, as OpenAI's API or the chat template writes it.

    Attributes:
        role: `system`, `developer`, `user`, `assistant` or `tool`.
        content: A text, a list of text parts, or the structure that the template documents; an
            assistant's message with calls or thoughts may have none.
        tool_calls: Calls that an assistant's message makes, each
            `{id, type: "function", function: {name, arguments}}`; `arguments` is JSON or an object.
        tool_call_id: The call whose result a tool's message is.
        reasoning_content: Thoughts before an assistant's answer; `reasoning` is the same.
    """

    role: str
    content: NotRequired[object]
    tool_calls: NotRequired[Sequence[Mapping[str, object]] | None]
    tool_call_id: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]


@dataclass(slots=True)
class Turn:
    """A checked message.

    Attributes:
        role: One of `ROLES`; `developer` only with the structure of a template.
        content: A text or, of a user or developer, the structure of a template.
        blocks: Of an assistant, in order: `{type: thoughts | response, text}`,
            `{type: tool_calls, calls: [{name, arguments}]}`,
            `{type: tool_outputs, outputs: [{output}]}`; `arguments` is JSON.
        structured: Whether it came as blocks.
    """

    role: str
    content: Any = ""
    blocks: list[dict[str, Any]] = field(default_factory=list)
    structured: bool = False

    @property
    def texts(self) -> list[str]:
        """The texts in it but for calls, and thoughts, which may be left out."""
        if isinstance(self.content, Mapping):
            return [part["text"] for part in self.content.get("parts", ())]
        outputs = [each for block in self.blocks for each in block.get("outputs", ())]
        texts = [block["text"] for block in self.blocks if block["type"] == "response"]
        return [self.content, *texts, *(each["output"] for each in outputs)]


def read_messages(messages: object, name: str = "messages") -> list[Turn]:
    """Return the turns of a conversation.

    Leading messages of `system` and `developer` become one, later ones turns of the user. Results
    come in the order of their calls. A conversation may end with calls that have no result yet.

    Args:
        messages: See `Message`.
        name: What error messages call them.

    Raises:
        UsageError: what no prompt can be made of, named as `messages[3].tool_call_id: ...`; a
            `WrongTypeError` for values of a wrong type.
    """
    turns: list[Turn] = []
    results: CallResults | None = None
    given = Given(messages, name).list("a list of messages")
    for message in given:
        role = _role(message)
        if role == "tool":
            if results is None:
                message["role"].refuse("a result follows the assistant's message with its call")
            results.add(message, _text(message["content"]))
            continue
        turns += [Turn("tool", text) for text in results.texts()] if results else []
        results = None
        if role == "assistant":
            turn, results = _assistant(message)
            turns.append(turn)
        elif role == "user":
            turns.append(Turn("user", _user(message["content"])))
        elif role == "developer" and _is_object(message["content"]):
            turns.append(Turn("developer", json.loads(message["content"].json())))
        else:
            _instruct(turns, _instruction(message["content"]))
    return turns + [Turn("tool", text) for text in (results.texts(at_end=True) if results else [])]


def require_answer(messages: object, name: str = "messages") -> None:
    """Refuse a conversation that does not end with an answer, which could go on.

    Raises:
        UsageError: see `read_messages`; or the last message is no assistant's, or makes calls.
    """
    turns = read_messages(messages, name)
    last = turns[-1] if turns else Turn("user")
    if last.role != "assistant" or (last.blocks and last.blocks[-1]["type"] == "tool_calls"):
        raise UsageError(f"{name}: the last one is no text of an assistant that could go on")


def require_results(messages: object, name: str = "messages") -> None:
    """Refuse a conversation that ends with calls, since their results come before an answer.

    Raises:
        UsageError: see `read_messages`; or there are no results.
    """
    turns = read_messages(messages, name)
    last = turns[-1].blocks[-1:] if turns else []
    calls = [call for block in last for call in block.get("calls", ())]
    if needs_results(calls):
        raise UsageError(
            f"{name}: the last one calls {calls[0]['name']}; its result comes next, in a message "
            "of role 'tool'"
        )


def _role(message: Given) -> str:
    message.object()
    role = message["role"]
    if role.value is None:
        role.refuse("is missing")
    if role.text() not in ROLES:
        role.refuse(f"{role.value[:40]!r}: expected {', '.join(ROLES)}")
    for key in _UNSUPPORTED:
        if message[key].value:
            message[key].refuse("is not supported")
    if role.value != "assistant" and message["tool_calls"].value:
        message["tool_calls"].refuse("only an assistant makes calls")
    return str(role.value)


def _instruct(turns: list[Turn], text: str) -> None:
    """Add a text of role system or developer."""
    if all(turn.role == "developer" for turn in turns):
        turns.insert(0, Turn("system", text))
    elif turns[0].role == "system" and all(turn.role == "developer" for turn in turns[1:]):
        turns[0].content += f"\n\n{text}"
    else:
        turns.append(Turn("user", text))


def _instruction(content: Given) -> str:
    if _is_object(content):
        return content["text"].text()
    return _text(content)


def _user(content: Given) -> object:
    """Return a text, or the `{parts}` of the template."""
    if not _is_object(content):
        return _text(content)
    return {"parts": [{"type": "text", "text": text} for text in _parts(content["parts"])]}


def _text(content: Given) -> str:
    """Return the text of a content: itself, or its parts joined."""
    if isinstance(content.value, str):
        return content.text()
    return "".join(_parts(content))


def _parts(content: Given) -> list[str]:
    texts = []
    for part in content.list("a text or a list of text parts"):
        kind = part["type"].value
        if kind not in ("text", None):
            part["type"].refuse(f"{kind!r:.40} is not supported; this model reads text only")
        texts.append(part["text"].text())
    return texts


def _is_object(content: Given) -> bool:
    return isinstance(content.value, Mapping)


def _assistant(message: Given) -> tuple[Turn, CallResults | None]:
    content = message["content"]
    structured = _is_object(content)
    blocks: list[dict[str, Any]] = []
    for key in ("reasoning_content", "reasoning"):
        if message[key].value and not blocks:
            blocks = [{"type": "thoughts", "text": message[key].text()}]
    calls = [] if message["tool_calls"].value is None else message["tool_calls"].list()
    if structured:
        blocks += [_block(block) for block in content["blocks"].list()]
    elif content.value is not None:
        if text := _text(content):
            blocks.append({"type": "response", "text": text})
    elif not calls and not blocks:
        content.refuse("is missing; only a message with calls or thoughts may have none")
    if calls:
        functions = [_function(call) for call in calls]
        blocks.append({"type": "tool_calls", "calls": functions})
        return Turn("assistant", "", blocks, structured), CallResults(message, functions, calls)
    turn = Turn("assistant", "", blocks, structured)
    if blocks and blocks[-1]["type"] == "tool_calls":
        return turn, CallResults(message, blocks[-1]["calls"], [])
    return turn, None


def _function(call: Given) -> dict[str, str]:
    kind = call["type"]
    if kind.value not in ("function", None):
        kind.refuse(f"{kind.value!r:.40} is not supported; calls are of type 'function'")
    return _named(call["function"])


def _named(function: Given) -> dict[str, str]:
    name = function["name"].called_name()
    return {"name": name, "arguments": _arguments(function["arguments"])}


def _arguments(arguments: Given) -> str:
    """Return the arguments of a call in JSON; what is JSON already stays to the letter."""
    if arguments.value is None or arguments.value == "":
        return "{}"
    if not isinstance(arguments.value, str):
        arguments.object()
        return arguments.json()
    text = arguments.text("a text in JSON, or an object")
    try:
        # Numbers of any length are valid; NaN is none.
        value = json.loads(text, parse_int=float, parse_constant=_refuse_constant)
    except RecursionError:
        arguments.refuse("is nested too deeply")
    except ValueError as error:
        arguments.refuse(f"is not valid JSON ({error})")
    if not isinstance(value, dict):
        arguments.refuse("expected an object in JSON")
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _block(block: Given) -> dict[str, Any]:
    """Return a block of the template's own form."""
    kind = block["type"]
    if kind.value in ("thoughts", "response"):
        return {"type": kind.value, "text": block["text"].text()}
    if kind.value == "tool_calls":
        return {"type": kind.value, "calls": [_named(each) for each in block["calls"].list()]}
    if kind.value != "tool_outputs":
        kind.refuse("expected thoughts, tool_calls, tool_outputs or response")
    outputs = [{"output": each["output"].text()} for each in block["outputs"].list()]
    return {"type": kind.value, "outputs": outputs}
