"""Which known form of prompts a folder's chat template writes, told by what it writes.

An app that has no template engine writes prompts by code, of the forms v1, v1.1 and v1-first: the
template that the models of v1 had at first, which never ends the assistant's last turn. Whether
that is what the model was trained on is found by comparing token ids; no hash and no name would
tell.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.text.roles import Role
from apertus_mlx.text.template import ChatTemplate, Message
from apertus_mlx.text.tokenizer import Tokenizer

UNKNOWN = "unknown"
# Of each form: what stands between the results of tools and what the assistant writes next, and
# whether the assistant's last turn ends where it begins another one.
VERSIONS = {"v1": ("", "<68>"), "v1.1": (" ", "<68>"), "v1-first": ("", "")}

_OFF = "Deliberation: disabled\nTool Capabilities: disabled"
_ON = "Deliberation: enabled\nTool Capabilities: disabled"
_TOOL = {
    "name": "weather",
    "description": "The weather of a place.",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string", "description": "A town."}},
        "required": ["place"],
    },
}
_TOOL_TEXT = (
    "// The weather of a place.\ntype weather = (_: {\n// A town.\nplace: string\n}) => any;"
)
_CALL = {"name": "weather", "arguments": '{"place": "Chur"}'}
_QUESTION: Message = {"role": "user", "content": "Wie ist es in Chur?"}
_SYSTEM: Message = {"role": "system", "content": "You answer in one sentence."}


@dataclass(frozen=True, slots=True)
class _Case:
    """A conversation and its prompt: text, with ids of control tokens as `<61>`.

    `{after}` and `{end}` stand for what depends on the form.
    """

    messages: tuple[Any, ...]
    prompt: str
    think: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()


def _prompt(developer: str, turns: str) -> str:
    return f"<61>You answer in one sentence.<62><63>{developer}<64>{turns}"


_ASKED = "<65>Wie ist es in Chur?<66><67>"
_CALLED = (
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": _CALL}]},
    {"role": "tool", "content": '{"sun": true}'},
)
_CALLED_TEXT = '<71>[{"weather": {"place": "Chur"}}]<72>[{"sun": true}]'
_THOUGHTS: tuple[Any, ...] = (
    {"role": "assistant", "content": {"blocks": [
        {"type": "thoughts", "text": "Chur is a town."}, {"type": "response", "text": "Sonnig."}]}},
)  # fmt: skip
# Every one has a system message, since what stands in its place may hold today's date.
CASES = (
    _Case((_SYSTEM, _QUESTION), _prompt(_OFF, _ASKED)),
    _Case((_SYSTEM, _QUESTION), _prompt(_ON, _ASKED), think=True),
    _Case(
        (_SYSTEM, _QUESTION, {"role": "assistant", "content": "Sonnig."}, _QUESTION),
        _prompt(_OFF, f"{_ASKED}Sonnig.<68>{_ASKED}"),
    ),
    _Case(
        (_SYSTEM, _QUESTION, *_THOUGHTS, _QUESTION),
        _prompt(_ON, f"{_ASKED}<69>Chur is a town.<70>Sonnig.<68>{_ASKED}"),
        think=True,
    ),
    _Case(
        (_SYSTEM, _QUESTION),
        _prompt(f"Deliberation: disabled\nTool Capabilities:\n{_TOOL_TEXT}", _ASKED),
        tools=(_TOOL,),
    ),
    _Case(
        (_SYSTEM, _QUESTION, *_CALLED, {"role": "assistant", "content": "Sonnig."}, _QUESTION),
        _prompt(
            f"Deliberation: disabled\nTool Capabilities:\n{_TOOL_TEXT}",
            f"{_ASKED}{_CALLED_TEXT}{{after}}Sonnig.<68>{_ASKED}",
        ),
        tools=(_TOOL,),
    ),
    _Case(
        (_SYSTEM, _QUESTION, *_CALLED),
        _prompt(
            f"Deliberation: disabled\nTool Capabilities:\n{_TOOL_TEXT}",
            f"{_ASKED}{_CALLED_TEXT}{{end}}<67>",
        ),
        tools=(_TOOL,),
    ),
)


def template_version(directory: Path, config: ModelConfig) -> str | None:
    """`v1`, `v1.1`, `v1-first` or `unknown`; None for a folder without a template."""
    return describe_template(directory, config)[0]


def describe_template(directory: Path, config: ModelConfig) -> tuple[str | None, str | None]:
    """The version, and what the system block holds where a conversation has none.

    Today's date in it is written `{date}`. None where the version is not known, or there is no
    template.
    """
    try:
        tokenizer = Tokenizer.load(
            directory, vocab_size=config.vocab_size, bos_token_id=config.bos_token_id
        )
        template = ChatTemplate.load(directory, tokenizer)
    except RejectedError:
        return UNKNOWN if (directory / "chat_template.jinja").is_file() else None, None
    if template is None:
        return None, None
    version = _version(template, tokenizer)
    return version, None if version == UNKNOWN else _default_system(template, tokenizer)


def _default_system(template: ChatTemplate, tokenizer: Tokenizer) -> str | None:
    days = {datetime.date.today()}
    ids = template.render([_QUESTION])
    days.add(datetime.date.today())  # midnight may have passed
    block = ids[ids.index(Role.SYSTEM.start) + 1 : ids.index(Role.SYSTEM.end)]
    text = tokenizer.decode(block)
    for day in days:
        text = text.replace(day.isoformat(), "{date}")
    return text


def _version(template: ChatTemplate, tokenizer: Tokenizer) -> str:
    possible = dict(VERSIONS)
    for case in CASES:
        try:
            ids = template.render(case.messages, think=case.think, tools=case.tools or None)
        except (RejectedError, UsageError):
            return UNKNOWN
        possible = {
            version: (after, end)
            for version, (after, end) in possible.items()
            if ids
            == list(_ids(case.prompt.replace("{after}", after).replace("{end}", end), tokenizer))
        }
    return next(iter(possible), UNKNOWN)


def _ids(prompt: str, tokenizer: Tokenizer) -> Iterator[int]:
    if tokenizer.bos_id is not None:
        yield tokenizer.bos_id
    for text, control in re.findall(r"(.*?)(?:<(\d\d)>|$)", prompt, re.DOTALL):
        yield from tokenizer.encode(text)
        if control:
            yield int(control)
