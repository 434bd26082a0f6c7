"""How a task is timed: one way for every implementation, from token ids to the token read."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from typing import Any, Protocol

import mlx.core as mx

from apertus_mlx.measure.bench.workload import Task, random_prompt


class Engine(Protocol):
    """An implementation with a model loaded."""

    def make_cache(self) -> list[Any]:
        """An empty cache for each layer."""

    def read(self, prompt: list[int], cache: list[Any]) -> None:
        """Write `prompt` to the cache."""

    def tokens(self, prompt: list[int], cache: list[Any]) -> Generator[int, None, None]:
        """Read `prompt`, then decode greedily without an end, each token read as it is drawn."""

    def rewind(self, cache: list[Any], positions: int) -> bool:
        """Forget the last positions; False, and no change, where that is impossible."""


class Stopwatch:
    """Times tasks on one engine.

    A rate of decoding leaves out the first token, which belongs to the prompt. Between two of one
    depth the cache is rewound, not read anew, where its form allows it.
    """

    def __init__(self, engine: Engine, vocab_size: int, new_tokens: int, seed: int) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._new_tokens = new_tokens
        self._seed = seed
        self._cache: list[Any] = []
        self._depth: int | None = None

    def seconds(self, task: Task) -> float:
        """Seconds that `task` takes."""
        prompt = random_prompt(max(task.tokens, 1), self._vocab_size, self._seed)
        if task.kind == "prefill":
            self._cache, self._depth = [], None
            cache, start, steps = self._engine.make_cache(), prompt, 0
        else:
            cache, start, steps = self._read_up_to(prompt[:-1]), prompt[-1:], self._new_tokens
        begun = time.perf_counter()
        with closing(self._engine.tokens(start, cache)) as tokens:
            next(tokens)
            if task.kind == "decode":
                begun = time.perf_counter()
            for _ in range(steps):
                next(tokens)
            elapsed = time.perf_counter() - begun
        # What was started ahead must not run into the next task.
        mx.eval([layer.state for layer in cache])
        return elapsed

    def _read_up_to(self, prompt: list[int]) -> list[Any]:
        """A cache that holds exactly `prompt`."""
        depth = len(prompt)
        if self._depth == depth:
            beyond = self._cache[0].offset - depth
            if self._engine.rewind(self._cache, beyond):
                return self._cache
        self._cache, self._depth = [], None
        self._cache = self._engine.make_cache()
        if prompt:
            self._engine.read(prompt, self._cache)
        self._depth = depth
        return self._cache
