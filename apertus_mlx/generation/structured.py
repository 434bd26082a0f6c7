"""Answers of a prescribed form: JSON that follows a schema, tool calls that follow theirs.

`AnswerRules` say, token by token, what may come next. What they let pass as a whole is valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from apertus_mlx.generation.grammar import (
    Engine,
    Mask,
    Matcher,
    check_grammar,
    find_engine,
    require_engine,
    schema_grammar,
)
from apertus_mlx.generation.json_schema import read_schema
from apertus_mlx.generation.tool_grammar import ToolGrammar
from apertus_mlx.text.roles import Role
from apertus_mlx.text.tokenizer import Tokenizer

_Part = Literal["start", "thought", "free", "json", "calls", "ended"]


def require_schema(given: Path | str | Mapping[str, Any] | type) -> str:
    """Read a schema and check all that can be checked without a model; returns its text.

    Raises:
        NotFoundError, UsageError: see `read_schema`, `require_engine` and `check_grammar`.
    """
    schema = read_schema(given)
    require_engine("--schema")
    check_grammar(schema_grammar(schema), "--schema")
    return schema


class AnswerRules:
    """Which tokens may come next in one answer.

    A deliberation may come first, where it is asked for. Then JSON or tool calls follow if these
    are prescribed, else text with or without calls. No token can be drawn that makes JSON or a
    call invalid, and when they are complete nothing follows but the end.

    Attributes:
        allowed: the tokens that may come next, `[vocabulary]`; None: all.
        steady: whether `allowed` stays what it is, whatever token comes next but a few.
        complete: whether the answer may end here. One that ends before is cut.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        stop_ids: frozenset[int],
        *,
        prompt: Sequence[int] = (),
        schema: str | None = None,
        tools: ToolGrammar | None = None,
        think: bool = False,
    ) -> None:
        """Begin an answer to `prompt`.

        Args:
            tokenizer: whose ids they are.
            vocab_size: how many logits the model has.
            stop_ids: what ends an answer.
            prompt: ids; it may end within a deliberation.
            schema: what `require_schema` returned; the answer is JSON that follows it.
            tools: which calls there may be, and whether there must be one.
            think: whether a deliberation may come first.
        """
        self._roles = tokenizer.roles
        self._size = vocab_size
        self._stop_ids = stop_ids
        self._tools = tools
        self._may_call = tools is not None and tools.choice != "none"
        self._must_call = tools is not None and tools.must_call
        self._may_think = think
        self._engine: Engine | None = None
        self._json: Matcher | None = None
        self._calls: Matcher | None = None
        if schema is not None or (tools is not None and tools.grammar is not None):
            # Calls end in the grammar of `tools`, not here.
            self._engine = find_engine(tokenizer, vocab_size, stop_ids - {Role.TOOLS.end})
        if schema is not None and self._engine is not None and not self._must_call:
            self._json = self._engine.matcher(schema_grammar(schema), "--schema")
        self._prescribed = self._json is not None or self._must_call
        self.complete = not self._prescribed
        self._enter("thought" if self._roles.leaves_thought_open(prompt) else "start")

    def copy(self) -> AnswerRules:
        """The same rules at the same point, which then go their own way."""
        twin = copy(self)
        twin._json = None if self._json is None else self._json.copy()
        twin._calls = None if self._calls is None else self._calls.copy()
        return twin

    def allows(self, token: int) -> bool:
        """Whether `token` may come next."""
        return self._mask is None or bool(self._mask[token])

    def ends_with(self, token: int) -> bool:
        """Whether the answer ends with `token`, so that nothing follows."""
        return token in self._stop_ids

    def accept(self, token: int) -> bool:
        """Go on with a token that was drawn; returns whether `allowed` has changed.

        Raises:
            UsageError: the grammar became too complex.
        """
        part = self._part
        if part == "calls" and token == Role.TOOLS.end:
            self.complete = True
            return self._enter("ended")
        if self.ends_with(token):
            self.complete = part in ("free", "json", "ended")
            return self._enter("ended")
        if part in ("calls", "ended"):
            matcher = self._calls
        elif token == Role.TOOLS.start and self._may_call and self._engine is not None:
            return self._begin_calls()
        elif part == "thought" and token in self._roles.thought_ends:
            self._may_think = False
            return self._enter("start")
        elif part == "start" and token in self._roles.thought_starts:
            return self._enter("thought")
        elif part in ("thought", "free"):
            return False
        else:
            part, matcher = "json", self._json
        if matcher is not None:
            matcher.accept(token)
        return self._enter(part)

    def _begin_calls(self) -> bool:
        assert self._tools is not None and self._engine is not None
        if self._tools.grammar is None:
            return False
        self._calls = self._engine.matcher(self._tools.grammar, "tools")
        self.complete = False
        return self._enter("calls")

    def _enter(self, part: _Part) -> bool:
        """Be in a part of the answer, and find out what may come next there; returns True."""
        self._part = part if self._prescribed or part in ("calls", "ended") else "free"
        self._mask = self._find_mask()
        self.steady = self._part in ("thought", "free")
        self.allowed = None if self._mask is None else mx.array(self._mask)
        return True

    def _find_mask(self) -> Mask | None:
        """Which tokens may come next, in this part."""
        if self._part == "free":
            if self._tools is None or self._may_call:
                return None
            return ~self._only(Role.TOOLS.start)
        if self._part == "ended":
            return self._only(*self._stop_ids)
        if self._part == "calls":
            assert self._calls is not None
            return self._only(Role.TOOLS.end) if self._calls.complete else self._calls.mask()
        mask = self._only()
        if self._part == "thought":
            assert self._engine is not None
            mask = self._engine.text | self._only(*self._roles.thought_ends)
        elif self._json is not None:
            mask = self._json.mask()
        if self._part == "start" and self._may_think:
            mask = mask | self._only(*self._roles.thought_starts)
        if self._part in ("start", "thought") and self._may_call:
            mask = mask | self._only(Role.TOOLS.start)
        return mask

    def _only(self, *ids: int) -> Mask:
        mask = np.zeros(self._size, np.bool_)
        mask[[token for token in ids if token < self._size]] = True
        return mask


def answer_rules(
    tokenizer: Tokenizer,
    vocab_size: int,
    stop_ids: frozenset[int],
    prompt: Sequence[int],
    schema: str | None,
    tools: ToolGrammar | None,
    think: bool,
) -> AnswerRules | None:
    """`AnswerRules` of these, or None where nothing is prescribed or forbidden."""
    if schema is None and (tools is None or tools.allows_all):
        return None
    return AnswerRules(
        tokenizer, vocab_size, stop_ids, prompt=prompt, schema=schema, tools=tools, think=think
    )
