"""Random conversations in which anything may happen, held against runs from scratch.

A sequence of questions, interrupts, undone and repeated answers, stop strings and prompt caches is
played on one conversation. Every logit that it computes is compared with that of a fresh cache.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np

import apertus_mlx
from apertus_mlx.cache import Cache, CacheConfig
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.conversation import Conversation
from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.generation.options import SamplingOptions
from apertus_mlx.generation.prompt_cache import Fingerprint, load_prompt_cache, save_prompt_cache
from apertus_mlx.generation.run import Piece
from apertus_mlx.model.language_model import NextTokenLogits
from apertus_mlx.system import rust_panics

# Small windows, so that conversations of some hundred tokens reach everything there is.
FORMS = {
    "full": CacheConfig(),
    "bounded": CacheConfig(bound=60),
    "bounded, no sinks": CacheConfig(bound=90, sinks=0),
    "bounded, never full": CacheConfig(bound=3000, sinks=16),
    "2 bits": CacheConfig(2, 2, window=8),
    "3 bits": CacheConfig(3, 3, window=16),
    "4 bits": CacheConfig(4, 4),
    "4 bits, not rotated": CacheConfig(4, 4, window=8, rotate=False),
    "6 bits, rotated": CacheConfig(6, 6, window=8, rotate=True),
    "8 bits, no window": CacheConfig(8, 8, window=0, sinks=0),
    "keys 8, values 3": CacheConfig(8, 3, window=8),
    "keys 16, values 4": CacheConfig(16, 4, window=8),
    "keys 4, values 16": CacheConfig(4, 16, window=8),
    "4 bits, bounded": CacheConfig(4, 4, bound=116, window=8),
    "8 bits, bounded, not rotated": CacheConfig(8, 8, bound=140, window=16, rotate=False),
}
# Of the largest logit.
TOLERANCE = 1e-5
# Rounding moves a number across the border between two codes now and then.
TOLERANCE_OF_CODES = 0.05
# What may happen, and how often in proportion.
STEPS = {
    "ask": 10,
    "undo": 3,
    "retry": 3,
    "think": 1,
    "system": 1,
    "load": 1,
    "reset": 1,
    "disk": 2,
}
MADE_WITH = Fingerprint("model", "weights", "quantization", "template")
PACKAGE = str(Path(apertus_mlx.__file__).parent)
LETTERS = "abcdefghijklmnopqrstuvwxyz ?"


@dataclass
class Counts:
    """What has been played, and how far it was from a fresh run at worst."""

    sequences: int = 0
    steps: int = 0
    interrupts: int = 0
    compared: int = 0
    rounded_otherwise: int = 0
    worst: float = 0.0
    worst_of_codes: float = 0.0


@dataclass
class Feed:
    """Ids that were fed together, and how: for their hidden states or for logits."""

    ids: mx.array
    scored: bool


@dataclass
class Recording:
    """A model that remembers what its latest caches were fed, and the logits it gave."""

    inner: Any
    # An int is a number of positions cut away.
    history: list[Feed | int] = field(default_factory=list)
    logits_at: dict[int, mx.array] = field(default_factory=dict)
    position: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def make_cache(self, form: CacheConfig) -> list[Cache]:
        self.history, self.logits_at, self.position = [], {}, 0
        caches: list[Cache] = self.inner.make_cache(form)
        return caches

    def model(self, ids: mx.array, caches: Sequence[Cache]) -> mx.array:
        self._begin(caches)
        hidden: mx.array = self.inner.model(ids, caches)
        self._end(Feed(ids, False))
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        found: mx.array = self.inner.logits(hidden)
        self.logits_at[self.position] = found[0, -1]
        return found

    def next_token_logits(self, ids: mx.array, caches: Sequence[Cache]) -> NextTokenLogits:
        self._begin(caches)
        after: NextTokenLogits = self.inner.next_token_logits(ids, caches)
        self._end(Feed(ids, True))
        self.logits_at[self.position] = after.values
        return after

    def _begin(self, caches: Sequence[Cache]) -> None:
        if caches[0].offset < self.position:
            self.history.append(self.position - caches[0].offset)
        self.position = caches[0].offset

    def _end(self, fed: Feed) -> None:
        self.history.append(fed)
        self.position += fed.ids.shape[1]


@contextmanager
def interrupt_after(opcodes: int) -> Iterator[None]:
    """Raise KeyboardInterrupt before the n-th bytecode that the package executes from now on."""
    left = opcodes

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if event == "call":
            place = frame.f_code.co_filename
            # An interrupt waits for the end of a guarded call.
            if not place.startswith(PACKAGE) or place == rust_panics.__file__:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class Play:
    """One conversation in one form of cache."""

    def __init__(
        self, loaded: LoadedModel, form: CacheConfig, seed: int, counts: Counts, folder: Path
    ) -> None:
        self.random = random.Random(seed)
        self.form, self.counts, self.folder = form, counts, folder
        self.model = Recording(loaded.model)
        self.loaded = replace(loaded, model=self.model)
        system = self.random.choice([None, "be brief"])
        self.talk = Conversation(self.loaded, system=system, form=form)
        self.undone: list[str] = []
        self.said: list[list[int]] = []
        self.asked = 0

    def play(self, steps: int) -> None:
        for _ in range(steps):
            [kind] = self.random.choices(list(STEPS), list(STEPS.values()))
            getattr(self, f"_{kind}")()
            self.counts.steps += 1
            self._require_only_what_was_said()
        # What the next turn makes of it.
        self._answer(
            self.talk.ask(self._question(), SamplingOptions(temperature=0, max_tokens=1)), "all"
        )
        self.counts.sequences += 1

    def interrupt(self, pieces: Iterable[Piece]) -> None:
        """Hear `pieces` until an interrupt somewhere."""
        with interrupt_after(int(np.exp(self.random.uniform(0, np.log(2e4))))):
            deque(pieces, maxlen=0)

    def _ask(self) -> None:
        self._answer(self.talk.ask(self._question(), *self._settings()))

    def _retry(self) -> None:
        if self.talk.last_question is not None:
            self._answer(self.talk.retry(*self._settings()))

    def _undo(self) -> None:
        text = self.talk.last_question
        if self.talk.undo():
            assert text is not None
            self.undone.append(text)

    def _think(self) -> None:
        self.talk.think = not self.talk.think

    def _system(self) -> None:
        self.talk.system = self.random.choice([None, "be brief", "be long"])

    def _load(self) -> None:
        """Go on from the first of the messages."""
        if self.talk.messages:
            self.talk.load(self.talk.messages[: self.random.randrange(len(self.talk.messages)) + 1])

    def _reset(self) -> None:
        self.talk.reset()

    def _disk(self) -> None:
        """Save what is held, and go on from the file."""
        prefix = self.talk._prefix
        if not prefix.tokens:
            return
        path = self.folder / "prompt"
        save_prompt_cache(path, prefix, MADE_WITH)
        saved = load_prompt_cache(path, self.loaded.folder.config, self.form, mx.float32, MADE_WITH)
        kept = self.model.history, self.model.logits_at, self.model.position
        resumed = CachedPrefix(self.loaded.model, self.form)
        resumed.restore(saved.tokens, saved.layers)
        assert resumed.tokens == prefix.tokens
        self.talk._prefix = resumed
        self.model.history, self.model.logits_at, self.model.position = kept

    def _question(self) -> str:
        self.asked += 1
        text = "".join(self.random.choices(LETTERS, k=self.random.choice([1, 8, 30, 70])))
        return f"<{self.asked}>{text}"

    def _settings(self) -> tuple[Any, ...]:
        stops = self.random.choice([(), (), tuple("aeiourst"), ("\x00", "qq")])
        options = SamplingOptions(
            max_tokens=self.random.choice([1, 2, 4, 7]),
            stop=stops,
            temperature=self.random.choice([0.0, 0.9]),
            repetition_penalty=self.random.choice([1.0, 1.3]),
            seed=self.random.randrange(1000),
        )
        return options, self.random.choice([16, 64, 512])

    def _answer(self, pieces: Generator[Piece, None, None], end: str | None = None) -> None:
        self.model.logits_at = {}
        end = end or self.random.choices(["all", "interrupt", "close"], [4, 4, 1])[0]
        try:
            if end == "interrupt":
                self.interrupt(pieces)
            elif end == "close":
                for _ in range(self.random.randrange(3)):
                    next(pieces, None)
            else:
                deque(pieces, maxlen=0)
        except KeyboardInterrupt:
            self.counts.interrupts += 1
        finally:
            pieces.close()
        if (result := self.talk.last_answer) is not None:
            self.said.append([*result.prompt_token_ids, *result.token_ids])
        self._compare()

    def _compare(self) -> None:
        tokens = self.talk._prefix.tokens
        found = {at: logits for at, logits in self.model.logits_at.items() if at <= len(tokens)}
        if not found:
            return
        mx.eval(list(found.values()))
        self.counts.compared += len(found)
        error = self._error(found, tokens, self.model.history)
        if self.form.quantized and error > TOLERANCE:
            self.counts.rounded_otherwise += 1
            self.counts.worst_of_codes = max(self.counts.worst_of_codes, error)
            assert error < TOLERANCE_OF_CODES, f"{error:.1e} of the largest logit"
            error = self._error(found, tokens, self.model.history, cut=True)
        self.counts.worst = max(self.counts.worst, error)
        assert error <= TOLERANCE, f"{error:.1e} of the largest logit"

    def _error(
        self,
        found: dict[int, mx.array],
        tokens: list[int],
        history: list[Feed | int],
        cut: bool = False,
    ) -> float:
        """How far logits are from a fresh cache's, at worst, in units of its largest logit.

        A fresh cache is fed only what is held now, a quantized one in the same chunks; with `cut`,
        what was cut away, too.
        """
        model = self.model.inner
        caches = model.make_cache(self.form)
        expected: dict[int, mx.array] = {}
        if not self.form.quantized:
            logits = model(mx.array([tokens]), caches)[0]
            expected = {at: logits[at - 1] for at in found}
        else:
            for fed in history if cut else _without_cuts(history):
                if isinstance(fed, int):
                    assert [layer.trim(fed) for layer in caches] == [fed] * len(caches)
                elif fed.scored:
                    logits = model.next_token_logits(fed.ids, caches).values
                    expected[caches[0].offset] = logits
                else:
                    logits = model.logits(model.model(fed.ids, caches)[:, -1:])[0, -1]
                    expected[caches[0].offset] = logits
        mx.eval([expected[at] for at in found])
        errors = []
        for at, logits in found.items():
            wanted = np.array(expected[at])
            errors.append(np.abs(np.array(logits) - wanted).max() / np.abs(wanted).max())
        return float(max(errors))

    def _require_only_what_was_said(self) -> None:
        tokens = self.talk._prefix.tokens
        text = self.loaded.folder.tokenizer.decode(tokens)
        # The latest run may have ended before it touched the cache.
        assert not tokens or any(_begin_alike(tokens, said) for said in self.said)
        for question in self.undone:
            assert question not in text


def layers_of(prefix: CachedPrefix) -> Sequence[Cache]:
    """The caches of its layers, after an interrupt brought back to its tokens."""
    prefix.tokens  # noqa: B018
    return tuple(prefix._layers)


def _begin_alike(tokens: list[int], said: list[int]) -> bool:
    # One token more than was said may have been on its way to the reader.
    return tokens[: len(said)] == said[: len(tokens)] and len(tokens) <= len(said) + 1


def _without_cuts(history: list[Feed | int]) -> list[Feed]:
    kept: list[Feed] = []
    for fed in history:
        if not isinstance(fed, int):
            kept.append(fed)
            continue
        left = fed
        while left:
            last = kept.pop()
            length = last.ids.shape[1]
            if length > left:
                kept.append(Feed(last.ids[:, : length - left], last.scored))
            left = max(0, left - length)
    return kept
