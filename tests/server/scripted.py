"""A model that says what a test has written, by token ids, behind the real engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx

from apertus_mlx.model.language_model import NextTokenLogits
from apertus_mlx.text.tokenizer import Tokenizer
from tests.server.running import Server, embedded, serving


class ScriptedModel:
    """The embedded model, whose caches are real and whose logits are of the script.

    One answer at a time; the script begins anew with each prompt.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.script: Sequence[int] = ()
        self._start = 0
        self.steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def logits(self, hidden: mx.array) -> mx.array:
        return mx.broadcast_to(self._row(0), (*hidden.shape[:2], self._size))

    def model(self, ids: mx.array, cache: Any) -> mx.array:
        hidden = self._inner.model(ids, cache)
        self._start = cache[0].offset
        return hidden

    def next_token_logits(self, inputs: mx.array, cache: Any) -> NextTokenLogits:
        self.steps += 1
        self._inner.next_token_logits(inputs, cache)
        return NextTokenLogits(self._row(cache[0].offset - self._start))

    @property
    def _size(self) -> int:
        return int(self._inner.config.output_vocab_size)

    def _row(self, index: int) -> mx.array:
        said = self.script[index] if index < len(self.script) else 68
        return mx.zeros((self._size,)).at[mx.array(said)].add(30.0)


class ScriptedServer:
    """A server whose model says what `say` has set."""

    def __init__(self, server: Server, model: ScriptedModel, tokenizer: Tokenizer) -> None:
        self.server, self.model, self._tokenizer = server, model, tokenizer

    def say(self, *parts: str | int) -> None:
        """Texts and the ids of control tokens."""
        self.model.script = [
            token
            for part in parts
            for token in ([part] if isinstance(part, int) else self._tokenizer.encode(part))
        ]


@contextmanager
def scripted(**settings: Any) -> Iterator[ScriptedServer]:
    loaded = embedded()
    model = ScriptedModel(loaded.model)
    with serving(load=lambda: replace(loaded, model=model), **settings) as server:
        yield ScriptedServer(server, model, loaded.folder.tokenizer)
