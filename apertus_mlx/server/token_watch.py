"""Watches tokens: which of an answer are thoughts, and how likely they and a prompt's were."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.text.roles import Role
from apertus_mlx.text.tokenizer import Tokenizer

# Positions of a prompt whose logits are computed at a time.
LOGITS_STEP = 32


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    data: bytes
    logprob: float
    top: Sequence[TokenLogprob] = ()

    @property
    def text(self) -> str:
        """The token's text; bytes that are no UTF-8 by themselves become U+FFFD."""
        return self.data.decode("utf-8", "replace")


class TokenWatch:
    """Follows one answer.

    Attributes:
        reasoning: how many tokens were thoughts.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], top: int | None) -> None:
        """Begin; `top`: how many of the likeliest tokens to tell of; None tells nothing."""
        self.reasoning = 0
        self._tokenizer, self._top = tokenizer, top
        self._thinks = tokenizer.roles.leaves_thought_open(prompt)
        self._calls = False
        self._waiting: deque[TokenLogprob] = deque()
        self._told_bytes = self._text_bytes = 0

    def __call__(self, token: int, logits: mx.array) -> None:
        """Note a token and the logits `[vocabulary]` that it was drawn from."""
        roles = self._tokenizer.roles
        self.reasoning += self._thinks
        if token in roles.thought_starts:
            self._thinks = True
        elif token in roles.thought_ends:
            self._thinks = False
        elif token == Role.TOOLS.start:
            self._thinks, self._calls = False, True
        elif not (
            self._top is None or self._thinks or self._calls or token in self._tokenizer.special_ids
        ):
            self._waiting.append(token_logprob(self._tokenizer, token, logits, self._top))

    def take(self, text: str) -> list[TokenLogprob]:
        """The tokens that `text`, the next of the answer, begins in."""
        self._text_bytes += len(text.encode("utf-8", "surrogatepass"))
        found = []
        while self._waiting and self._told_bytes < self._text_bytes:
            found.append(self._waiting.popleft())
            self._told_bytes += len(found[-1].data)
        return found


class PromptWatch:
    """Follows the reading of a prompt.

    Attributes:
        found: how likely its tokens were, but the first.
    """

    def __init__(self, loaded: LoadedModel, prompt: Sequence[int], top: int) -> None:
        """Begin; `top`: how many of the likeliest tokens to tell of."""
        self.found: list[TokenLogprob] = []
        self._loaded, self._prompt, self._top = loaded, prompt, top

    def __call__(self, start: int, hidden: mx.array) -> None:
        """Note the final hidden states `[1, L, D]` of the tokens from `start` on."""
        del self.found[start:]
        for first in range(0, hidden.shape[1], LOGITS_STEP):
            part = hidden[:, first : first + LOGITS_STEP]
            following = self._prompt[start + first + 1 :]
            for token, logits in zip(following, self._loaded.model.logits(part)[0], strict=False):
                tokenizer = self._loaded.folder.tokenizer
                self.found.append(token_logprob(tokenizer, token, logits, self._top))


def token_logprob(tokenizer: Tokenizer, token: int, logits: mx.array, top: int = 0) -> TokenLogprob:
    """How likely `token` was by `logits` `[vocabulary]`, and the `top` likeliest, best first."""
    values = np.asarray(logits.astype(mx.float32)).astype(np.float64)
    peak = values.max()
    logprobs = values - (peak + np.log(np.exp(values - peak).sum()))

    def entry(each: int) -> TokenLogprob:
        data = tokenizer.token_bytes(each) if each < tokenizer.vocab_size else b""
        return TokenLogprob(each, data, max(float(logprobs[each]), -9999.0))

    best: list[int] = []
    if top:
        best = np.argpartition(-values, min(top, values.size - 1))[:top].tolist()
        best.sort(key=lambda each: -values[each])
    found = entry(token)
    return TokenLogprob(token, found.data, found.logprob, [entry(each) for each in best])
