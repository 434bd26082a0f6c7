"""Tool calls that no model can get wrong: declared names, arguments under their schema."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any

from apertus_mlx.errors import UsageError
from apertus_mlx.generation.grammar import (
    WHITESPACE,
    check_grammar,
    embedded_schema,
    require_engine,
)
from apertus_mlx.generation.json_schema import read_schema

_ANY_ARGUMENTS = '{"type": "object"}'
_NO_ARGUMENTS = '{"type": "object", "additionalProperties": false}'


class ToolGrammar:
    """What a model may write between the control tokens of a tool call, and whether it must.

    Attributes:
        choice: `auto`, `none`, `required`, or the name of the tool that has to be called.
        must_call: whether the answer is a call.
        grammar: of what stands between the control tokens; None where it is not enforced, because
            there is no call or no engine.
        loose: by the name of a tool, why its arguments are any JSON object: its schema has what
            cannot be enforced.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]],
        choice: str = "auto",
        parallel: bool = True,
        strict: bool = False,
    ) -> None:
        """Compile the tools' schemas; without llguidance `auto` and `none` enforce no form.

        Args:
            tools: each with `name` and `parameters`, a JSON schema or nothing.
            choice: see above.
            parallel: whether an answer may have several calls.
            strict: whether to refuse a schema that cannot be enforced.

        Raises:
            UsageError: there is no such tool, no engine for a choice that needs it, or `strict`.
        """
        self.choice = choice
        self.must_call = choice not in ("auto", "none")
        self.grammar: str | None = None
        self.loose: dict[str, str] = {}
        by_name = {str(tool["name"]): tool.get("parameters") or {} for tool in tools}
        if self.must_call and choice != "required":
            if choice not in by_name:
                known = ", ".join(by_name) or "there are none"
                raise UsageError(f"--tool-choice {choice[:60]}: no such tool ({known[:200]})")
            by_name = {choice: by_name[choice]}
        if self.must_call:
            if not by_name:
                raise UsageError(f"--tool-choice {choice}: there are no tools")
            require_engine(f"--tool-choice {choice[:60]}")
        if choice == "none" or not by_name or importlib.util.find_spec("llguidance") is None:
            return
        arguments = [self._arguments(name, by_name[name], strict) for name in by_name]
        self.grammar = _grammar(list(by_name), arguments, parallel)
        check_grammar(self.grammar, "tools")

    @property
    def allows_all(self) -> bool:
        """Whether nothing is forbidden or prescribed."""
        return self.choice == "auto" and self.grammar is None

    def _arguments(self, name: str, parameters: Any, strict: bool) -> str:
        """The grammar of one tool's arguments."""
        if not parameters:
            return embedded_schema(_NO_ARGUMENTS)
        try:
            schema = read_schema({"type": "object", **parameters}, f"tool {name[:60]}")
            found = embedded_schema(schema)
            check_grammar(f"start: {found}", f"tool {name[:60]}")
        except UsageError as error:
            if strict:
                raise
            self.loose[name] = str(error)
            return embedded_schema(_ANY_ARGUMENTS)
        return found


def _grammar(names: Sequence[str], arguments: Sequence[str], parallel: bool) -> str:
    """A list of calls, each an object with the tool's name and its arguments."""
    calls = " | ".join(f"call_{index}" for index in range(len(names)))
    more = '(WS? "," WS? call)*' if parallel else ""
    lines = [
        f'start: "[" WS? call {more} WS? "]"',
        f"call: {calls}",
        f"WS: /{WHITESPACE}/",
    ]
    for index, (name, form) in enumerate(zip(names, arguments, strict=True)):
        key = json.dumps(json.dumps(name, ensure_ascii=False), ensure_ascii=False)
        lines.append(f'call_{index}: "{{" WS? {key} WS? ":" WS? arguments_{index} WS? "}}"')
        lines.append(f"arguments_{index}: {form}")
    return "\n".join(lines)
