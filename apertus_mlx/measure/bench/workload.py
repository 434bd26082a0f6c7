"""What is measured: lengths, depths, rounds, and the tokens that are read. Imports no MLX."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from apertus_mlx.errors import UsageError

MOST_TOKENS = 2**24


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to time: reading a prompt of `tokens`, or decoding behind so many."""

    kind: Literal["prefill", "decode"]
    tokens: int

    def __str__(self) -> str:
        return f"prefill {self.tokens}" if self.kind == "prefill" else f"decode at {self.tokens}"


@dataclass(frozen=True, slots=True)
class Workload:
    """A whole measurement; `new_tokens` are timed at each depth, everything `rounds` times."""

    prompt_tokens: tuple[int, ...]
    depths: tuple[int, ...]
    new_tokens: int
    rounds: int
    seed: int

    @property
    def tasks(self) -> list[Task]:
        """All tasks, in the order in which they are timed."""
        return [
            *(Task("prefill", count) for count in self.prompt_tokens),
            *(Task("decode", depth) for depth in self.depths),
        ]

    @property
    def context(self) -> int:
        """The most positions that a task uses."""
        return max(self.positions(task) for task in self.tasks)

    def positions(self, task: Task) -> int:
        """Positions that `task` uses: one token more than is timed is already under way."""
        return max(task.tokens, 1) + 1 + (self.new_tokens if task.kind == "decode" else 0)

    def timed_tokens(self, task: Task) -> int:
        """Tokens by which the rate of `task` is counted."""
        return task.tokens if task.kind == "prefill" else self.new_tokens


def make_workload(
    prompt_tokens: str | None,
    depths: str | None,
    new_tokens: int,
    rounds: int,
    seed: int,
    context_length: int,
) -> Workload:
    """What the options ask for; None stands for what suits the model's context.

    Raises:
        UsageError: a value outside its range, beyond the context, or nothing to measure.
    """
    room = context_length - new_tokens - 1
    if room < 1:
        raise UsageError(
            f"--new-tokens {new_tokens}: the model's context is {context_length}; give fewer"
        )
    workload = Workload(
        _counts("--prompt-tokens", prompt_tokens, 1, (128, 512, 2048), context_length - 1),
        _counts("--depths", depths, 0, (0, 1024, 4096), room),
        new_tokens,
        rounds,
        seed,
    )
    if not workload.tasks:
        raise UsageError("--prompt-tokens and --depths are both empty: nothing to measure")
    return workload


def random_prompt(count: int, vocab_size: int, seed: int) -> list[int]:
    """`count` token ids from all over the vocabulary; the same wherever they are asked for."""
    draw = random.Random(seed)
    return [draw.randrange(vocab_size) for _ in range(count)]


def _counts(
    option: str, text: str | None, least: int, usual: tuple[int, ...], most: int
) -> tuple[int, ...]:
    """Counts as `128,512`, ascending, each once; an empty text is none at all."""
    if text is None:
        return tuple(sorted({min(count, most) for count in usual}))
    counts = set()
    for part in text.split(",") if text.strip() else ():
        word = part.strip()
        if not (word.isascii() and word.isdigit()) or not least <= int(word[:9]) <= MOST_TOKENS:
            raise UsageError(f"{option} {text[:40]!r}: expected numbers from {least}, as 128,512")
        if int(word) > most:
            raise UsageError(
                f"{option} {word}: at most {most} fit the model's context beside the new tokens"
            )
        counts.add(int(word))
    return tuple(sorted(counts))
