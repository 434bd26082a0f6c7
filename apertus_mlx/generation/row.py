"""One sequence among others in a batch: its tokens, its caches, and how its next token is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from apertus_mlx.cache import FULL_PRECISION, Cache, CacheConfig
from apertus_mlx.generation.decode import is_finite, tell_apart, unsound
from apertus_mlx.generation.sampling import Sampler, SamplerState
from apertus_mlx.generation.speculate import Speculation
from apertus_mlx.generation.structured import AnswerRules
from apertus_mlx.model.language_model import NextTokenLogits


class Draw(NamedTuple):
    """A token that need not have been computed yet, and what it was drawn from."""

    token: mx.array
    after: NextTokenLogits
    before: SamplerState


class Row:
    """A prompt and what is drawn after it; `Batch.join` takes it in.

    Its seed, penalties, biases and thought budget are those of `sampler`, which nobody else may
    use; its form of answer is that of `rules`.

    Args:
        prompt: ids.
        sampler: draws its tokens.
        max_tokens: most tokens to draw.
        form: of its caches.
        rules: which tokens may come next.
        boundaries: numbers of tokens of the prompt after which its caches are kept for others. By
            default the whole prompt but its last token, for caches that cannot be cut back.
        on_hidden: is told, chunk by chunk, where in the prompt it begins, and its final hidden
            states `[1, L, D]`. All of the prompt is computed then; after a fault, once more.
        name: for whom its caches are kept; see `PrefixTrie.keep`.

    Attributes:
        ids: the prompt and all tokens handed out.
        caches: one for each layer; None until its prompt is read.
        read: tokens of the prompt that are computed, those reused included.
        reused: tokens of the prompt that had been computed for others.
        left: tokens that may still be drawn.
        speculation: what a draft was good for while it decoded alone; None without one.

    Raises:
        ValueError: the prompt is empty.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        max_tokens: int,
        *,
        form: CacheConfig = FULL_PRECISION,
        rules: AnswerRules | None = None,
        boundaries: Sequence[int] | None = None,
        on_hidden: Callable[[int, mx.array], None] | None = None,
        name: str | None = None,
    ) -> None:
        if not prompt or max_tokens < 1:
            raise ValueError("a row takes a prompt and at least one new token")
        if boundaries is None:
            fixed = form.quantized or form.bound is not None
            boundaries = [len(prompt) - 1] if fixed else []
        self.ids = list(prompt)
        self.prompt_tokens = len(prompt)
        self.sampler, self.rules, self.form = sampler, rules, form
        self.boundaries = sorted(place for place in boundaries if 0 < place < len(prompt))
        self.on_hidden = on_hidden
        self.name = name
        self.left = max_tokens
        self.caches: list[Cache] | None = None
        self.read = self.reused = 0
        self.speculation: Speculation | None = None
        # Whether it has been computed once more by itself, after something failed.
        self.retried = False
        self._start = sampler.state
        self._draw: Draw | None = None
        self._following: NextTokenLogits | None = None
        self._ahead: Draw | None = None

    @property
    def held(self) -> list[int]:
        """The ids that its caches hold."""
        return [] if self.caches is None else self.ids[: self.caches[0].offset]

    @property
    def token(self) -> mx.array:
        """The token (shape `[]`) that is handed out next; it need not have been computed yet."""
        assert self._draw is not None
        return self._draw.token

    @property
    def logits(self) -> mx.array:
        """What `token` was drawn from, as the model computed it; `[vocabulary]`."""
        assert self._draw is not None
        return self._draw.after.values

    def begin(self, after: NextTokenLogits) -> None:
        """Draw the next token from the logits after `ids`; also anew, where that was done before.

        What was drawn and not handed out is forgotten.
        """
        self.sampler.state = self._start if self._draw is None else self._draw.before
        self._draw = self._drawn(after)
        self._following = self._ahead = None

    def follow(self, after: NextTokenLogits) -> None:
        """Take the logits after `token`, and draw from them where the rules need not know it."""
        self._following = after
        self._ahead = self._drawn(after) if self.rules is None or self.rules.steady else None

    def pending(self) -> list[mx.array]:
        """What is to be computed for this step: the latest token drawn, or logits to draw from."""
        if self._ahead is not None:
            return [self._ahead.token]
        return [self.token] if self._following is None else [self._following.values]

    def value(self) -> int:
        """The id of `token`, once it is computed.

        Raises:
            RejectedError: it was drawn from logits that are not finite or all the same.
        """
        assert self._draw is not None
        token, after, _ = self._draw
        value, drawn = int(token), len(self.ids) - self.prompt_tokens
        # As in `draw_tokens`: greedy choice draws 0 from logits that tell nothing apart.
        steady = self.rules is None or self.rules.steady
        suspect = drawn == 0 or value == 0 or (not steady and not is_finite(after.values, token))
        if suspect and not tell_apart(after.values).item():
            raise unsound(drawn)
        return value

    def hand_out(self, value: int) -> None:
        """Go on behind `token`, whose id is `value`.

        Raises:
            UsageError: the grammar of its rules became too complex.
        """
        self.ids.append(value)
        self.left -= 1
        changed = False if self.rules is None else self.rules.accept(value)
        following, ahead = self._following, self._ahead
        if following is None:
            return
        if ahead is None or changed:
            if ahead is not None:
                self.sampler.state = ahead.before
            ahead = self._drawn(following)
        self._draw, self._following, self._ahead = ahead, None, None

    def _drawn(self, after: NextTokenLogits) -> Draw:
        before = self.sampler.state
        allowed = None if self.rules is None else self.rules.allowed
        return Draw(self.sampler(after, allowed), after, before)
