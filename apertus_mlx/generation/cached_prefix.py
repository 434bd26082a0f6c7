"""Token ids and the layers' caches that hold exactly these: the one place that keeps them in step.

Decoding is a step ahead of its reader, and an interrupt may come between any two instructions, so
neither the ids that someone has read nor the caches' lengths alone say what a cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx

from apertus_mlx.cache import (
    FULL_PRECISION,
    Cache,
    CacheConfig,
    FullCache,
    QuantizedCache,
    allow_cut,
    rewind,
)
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.decode import DEFAULT_PREFILL_STEP, prefill
from apertus_mlx.model.language_model import LanguageModel, NextTokenLogits


class CachedPrefix:
    """A prefix of tokens whose keys and values have been computed by `model`.

    `begin` starts a run: what the prefix shares with the prompt stays, the rest is cut away. The
    latest run owns the prefix; an older one can go no further. However a run ends (a stop, an
    interrupt at any point, an error), the next one finds ids and caches that agree: a step that did
    not end is taken back where the form allows it, else all is forgotten and computed anew.

    Not for several threads at the same time.
    """

    def __init__(self, model: LanguageModel, form: CacheConfig = FULL_PRECISION) -> None:
        self.model = model
        self.form = form
        # Of positions computed together, how many can be cut away again; see `allow_cut`.
        self._most_cut = 0
        self._layers = self._new_layers()
        # All are read but perhaps the last ones: decoding runs ahead.
        self._tokens: list[int | mx.array] = []
        # False while ids or layers are being changed. An interrupt leaves it so.
        self._settled = True
        # Counts owners; a run that is not the latest may go no further.
        self._owner = 0

    @property
    def tokens(self) -> list[int]:
        """The ids of all tokens held; waits for one that is still being computed."""
        self._settle()
        return [int(token) for token in self._tokens]

    def begin(self, prompt: Sequence[int]) -> Run:
        """Start a run over `prompt`; its last token is always left to compute.

        Raises:
            ValueError: the prompt is empty.
        """
        if not prompt:
            raise ValueError("the prompt is empty")
        self.cut(shared_length(self.tokens, prompt[:-1]))
        return Run(self, prompt, len(self._tokens))

    def cut(self, length: int) -> None:
        """Hold only the first `length` tokens; none, where the form of the cache cannot go back."""
        self._owner += 1
        self._go_back(length)

    def forget(self) -> None:
        """Hold nothing any more."""
        self._settled = False
        self._owner += 1
        self._layers = self._new_layers()
        self._tokens = []
        self._settled = True

    def allow_cut(self, positions: int) -> None:
        """Have `Run.keep` cut away up to so many of the tokens that were computed together.

        Raises:
            UsageError: the form of the cache does not allow it.
        """
        if not allow_cut(self._layers, positions):
            raise UsageError(
                f"--draft: a cache in {self.form} cannot be cut back to what the model accepts; "
                "leave out --draft, --kv-bits or --max-kv"
            )
        self._most_cut = positions

    def export(self) -> list[dict[str, mx.array]]:
        """What `restore` needs beside the tokens: a dictionary of arrays for each layer."""
        self._settle()
        return export(self._layers)

    def restore(self, tokens: Sequence[int], layers: Sequence[Mapping[str, mx.array]]) -> None:
        """Take over what a prefix of the same form exported when it held `tokens`."""
        self.forget()
        self._settled = False
        restore(self._layers, layers, len(tokens))
        self._tokens = list(tokens)
        self._settled = True

    def _new_layers(self) -> list[Cache]:
        layers = self.model.make_cache(self.form)
        if self._most_cut:
            allow_cut(layers, self._most_cut)
        return layers

    def _settle(self) -> None:
        """Bring ids and layers back to agreement after an interrupt, and check that they agree.

        Raises:
            RuntimeError: they do not, though nothing interrupted.
        """
        if not self._settled:
            if self.form.quantized or self.form.bound is not None:
                self.forget()
                return
            # Rows of such a cache stay where and as they are, whatever is written behind them.
            sound = min([len(self._tokens), *(layer.offset for layer in self._layers)])
            for layer in self._layers:
                layer.trim(layer.offset - sound)
            del self._tokens[sound:]
            self._settled = True
        held = len(self._tokens)
        if any(layer.offset != held for layer in self._layers):
            offsets = sorted({layer.offset for layer in self._layers})
            raise RuntimeError(f"the layers hold {offsets} positions, but {held} tokens are known")
        for at in range(held - 1, -1, -1):
            if isinstance(self._tokens[at], int):
                break
            self._tokens[at] = int(self._tokens[at])

    def _read(
        self, ids: Sequence[int], step: int, on_chunk: Callable[[int], None] | None
    ) -> mx.array:
        self._settle()
        held = len(self._tokens)

        def note(done: int) -> None:
            self._tokens.extend(ids[len(self._tokens) - held : done])
            if on_chunk is not None:
                on_chunk(done)

        self._settled = False
        try:
            logits = prefill(self.model, ids, self._layers, step, note)
        except Exception:
            self.forget()
            raise
        self._settled = True
        return logits

    def _step(self, token: mx.array) -> NextTokenLogits:
        self._settle()
        self._settled = False
        try:
            logits = self.model.next_token_logits(token.reshape(1, 1), self._layers)
        except Exception:
            self.forget()
            raise
        self._tokens.append(token)
        self._settled = True
        return logits

    def _check(self, tokens: mx.array) -> mx.array:
        self._settle()
        self._settled = False
        try:
            logits = self.model(tokens[None], self._layers)[0]
        except Exception:
            self.forget()
            raise
        self._tokens.extend(tokens)
        self._settled = True
        return logits

    def _keep(self, length: int) -> None:
        excess = len(self._tokens) - length
        if not self._go_back(length):
            raise RuntimeError(f"a cache in {self.form} could not forget {excess} positions")

    def _go_back(self, length: int) -> bool:
        """Hold only the first `length` tokens, or none, where that cannot be: then False."""
        self._settle()
        excess = len(self._tokens) - length
        if excess <= 0:
            return True
        self._settled = False
        if not rewind(self._layers, excess):
            self.forget()
            return False
        del self._tokens[length:]
        self._settled = True
        return True


class Run:
    """One prompt and what is drawn after it, on a prefix that belongs to this run until the next.

    Attributes:
        reused: tokens of the prompt that the prefix held already.
    """

    def __init__(self, prefix: CachedPrefix, prompt: Sequence[int], reused: int) -> None:
        self.reused = reused
        self._prefix = prefix
        self._owner = prefix._owner
        self._left = prompt[reused:]

    def read(
        self,
        count: int | None = None,
        step: int = DEFAULT_PREFILL_STEP,
        on_chunk: Callable[[int], None] | None = None,
    ) -> mx.array:
        """Compute the next `count` tokens of the prompt, by default all that are left.

        Returns the logits `[vocabulary]` after them. For `step` and `on_chunk` see `prefill`.
        """
        self._require_owner()
        ids = self._left if count is None else self._left[:count]
        self._left = self._left[len(ids) :]
        return self._prefix._read(ids, step, on_chunk)

    def step(self, token: mx.array) -> NextTokenLogits:
        """Logits after one more token (shape `[]`), which need not have been computed yet."""
        self._require_owner()
        return self._prefix._step(token)

    def check(self, tokens: mx.array) -> mx.array:
        """Logits `[n, vocabulary]` after each of `tokens` `[n]`, which need not be computed yet.

        `keep` cuts away those that turn out to be wrong, if `CachedPrefix.allow_cut` said so.
        """
        self._require_owner()
        return self._prefix._check(tokens)

    def keep(self, length: int) -> None:
        """Cut away all but the first `length` tokens; nothing, if the run is over."""
        if self._prefix._owner == self._owner:
            self._prefix._keep(length)

    def fail(self) -> None:
        """Forget everything: what was computed cannot be trusted."""
        if self._prefix._owner == self._owner:
            self._prefix.forget()

    def _require_owner(self) -> None:
        if self._prefix._owner != self._owner:
            raise RuntimeError("this run is over: its cache was cut, or taken by another run")


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` begin with alike."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)


def export(caches: Sequence[Cache]) -> list[dict[str, mx.array]]:
    """What `restore` needs: a dictionary of arrays for each layer.

    Raises:
        TypeError: a cache is not one of ours.
    """
    return [_ours(layer).export() for layer in caches]


def restore(
    caches: Sequence[Cache], layers: Sequence[Mapping[str, mx.array]], positions: int
) -> None:
    """Have new caches take over what others of the same form exported after so many positions."""
    for layer, arrays in zip(caches, layers, strict=True):
        _ours(layer).restore(dict(arrays), positions)
    mx.eval([layer.state for layer in caches])


def _ours(layer: Cache) -> FullCache | QuantizedCache:
    if not isinstance(layer, FullCache | QuantizedCache):
        raise TypeError(f"{type(layer).__name__} cannot be exported")
    return layer
