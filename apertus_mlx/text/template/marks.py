"""Tells the control tokens that a template writes from texts in messages that spell one.

The template is rendered twice: with the texts of control tokens, as other programs do, and with
marks in their place, characters that no message has. If both agree, marks are where the control
tokens are, and all else is text. If not, the template looks at the text of a control token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from itertools import chain

from apertus_mlx.text.template_process import TEMPLATES, UnsupportedTemplateError
from apertus_mlx.text.tokenizer import Tokenizer

# Unicode's private characters, the smaller ones first: they take less memory.
CHARACTERS = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))


class MarkedTemplate:
    """A template in its sandbox, whose control tokens are ids."""

    def __init__(self, source: str, tokenizer: Tokenizer, name: str, texts: Mapping[str, str]):
        """Compile `source`; `texts` are variables that it may write as its own texts.

        Raises:
            RejectedError, ResourceError: see `TemplateProcess.render`.
        """
        self._tokenizer = tokenizer
        self._question = {"name": name, "source": source, "texts": texts}
        self._own = "\n".join([source, *texts.values()])
        special = {tokenizer.id_to_token(i) or "": i for i in sorted(tokenizer.special_ids)}
        self._ids = {name: i for name, i in special.items() if name in self._own}
        TEMPLATES.render({**self._question, "marks": self._ids})

    def write(self, data: str, variables: Mapping[str, object], now: datetime) -> list[str | int]:
        """Return texts and control tokens in order.

        Args:
            data: Messages and tools in JSON.
            variables: Further ones.
            now: The time that the template may write.

        Raises:
            RejectedError, ResourceError: see `TemplateProcess.render`.
        """
        characters = map(chr, chain(*CHARACTERS))
        free = (each for each in characters if each not in data and each not in self._own)
        marks = {name: next(free) for name in self._ids}
        question = {"data": data, "variables": variables, "now": now.isoformat(), "marks": marks}
        text = TEMPLATES.render({**self._question, **question})
        some = "".join(marks.values())
        pieces = re.findall(f"[{some}]|[^{some}]+" if marks else "(?s).+", text)
        for piece in chain.from_iterable(map(self._tokenizer.split_special, pieces)):
            name = "" if isinstance(piece, str) else self._tokenizer.id_to_token(piece) or ""
            if json.dumps(name, ensure_ascii=False)[1:-1] not in data:
                raise UnsupportedTemplateError(
                    f"{self._question['name']}: the chat template failed: the text of control "
                    f"token {name!r} is put together from parts, which is not supported"
                )
        ids = {mark: self._ids[name] for name, mark in marks.items()}
        return [ids.get(piece, piece) for piece in pieces]
