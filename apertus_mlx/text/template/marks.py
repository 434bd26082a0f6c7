"""Tells the control tokens that a template writes from texts in messages that spell one.

The template is rendered twice: with the texts of control tokens, as other programs do, and with
marks in their place, characters that no message has. If both agree, marks are where the control
tokens are, and all else is text. If not, the template looks at the text of a control token.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Mapping

import jinja2

from apertus_mlx.text.template.budget import STEP, LimitError, charged, start_rendering
from apertus_mlx.text.template.sandbox import SandboxEnvironment
from apertus_mlx.text.tokenizer import Tokenizer

# Unicode's private characters, the smaller ones first: they take less memory.
CHARACTERS = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))


class ControlTokenError(jinja2.TemplateError):
    """The template does with the text of a control token what is not supported."""


class MarkedTemplate:
    """A template in its sandbox, whose control tokens are ids."""

    def __init__(self, source: str, tokenizer: Tokenizer, texts: Mapping[str, str]):
        """Compile `source`; `texts` are variables that it may write as its own texts.

        Raises:
            jinja2.TemplateError: it is no template, or uses a feature that is missing here.
        """
        self._sandbox = SandboxEnvironment(source)
        self._tokenizer = tokenizer
        self._texts = texts
        self._own = "\n".join([*self._sandbox.texts, *texts.values()])
        pieces = tokenizer.split_special(self._own)
        ids = sorted({piece for piece in pieces if isinstance(piece, int)})
        self._names = {token_id: tokenizer.id_to_token(token_id) or "" for token_id in ids}

    def write(self, data: str, variables: Mapping[str, object]) -> list[str | int]:
        """Return texts and control tokens in order.

        Args:
            data: Messages and tools in JSON.
            variables: Further ones.

        Raises:
            Exception: of whatever type, for whatever the template does wrong.
        """
        text = self._write(data, variables, {})
        characters = map(chr, itertools.chain(*CHARACTERS))
        free = (each for each in characters if each not in data and each not in self._own)
        marks = {next(free): token_id for token_id in self._names}

        def marked(count: int) -> str | None:
            """Return the text with the first marks, or None if they make it another text."""
            some = dict(itertools.islice(marks.items(), count))
            try:
                result = self._write(data, variables, {i: mark for mark, i in some.items()})
            except LimitError:
                raise
            except Exception:  # noqa: BLE001  # a template can make any
                return None
            names = {ord(mark): self._names[token_id] for mark, token_id in some.items()}
            return result if result.translate(names) == text else None

        result = marked(len(marks))
        if result is None:  # and so is it from some number on, which halving finds
            counts = range(1, len(marks))
            index = bisect.bisect_left(counts, True, key=lambda count: marked(count) is None)
            name = list(self._names.values())[index]
            raise ControlTokenError(
                f"it looks at the text of control token {name!r}, which is not supported"
            )
        some = "".join(marks)
        found = re.finditer(f"[{some}]|[^{some}]+" if marks else "(?s).+", result)
        pieces = [match.group() for match in charged(found, STEP)]
        for piece in itertools.chain.from_iterable(map(self._tokenizer.split_special, pieces)):
            name = "" if isinstance(piece, str) else self._tokenizer.id_to_token(piece) or ""
            if json.dumps(name, ensure_ascii=False)[1:-1] not in data:
                raise ControlTokenError(
                    f"the text of control token {name!r} is put together from parts, which is not "
                    "supported"
                )
        return [marks.get(piece, piece) for piece in pieces]

    def _write(self, data: str, variables: Mapping[str, object], marks: Mapping[int, str]) -> str:
        def own(text: str) -> str:
            pieces = self._tokenizer.split_special(text)
            return "".join(
                piece if isinstance(piece, str) else marks.get(piece, self._names[piece])
                for piece in pieces
            )

        start_rendering(data)
        messages, tools = json.loads(data)
        texts = {name: own(text) for name, text in self._texts.items()}
        return self._sandbox.write(
            {**texts, **variables, "messages": messages, "tools": tools, "documents": None},
            list(map(own, self._sandbox.texts)),
        )
