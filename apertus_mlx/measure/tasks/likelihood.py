"""How likely a model holds the last tokens of sequences, many sequences at a time.

Sequences that go on differently from the same tokens, as the choices of a question do, have these
tokens computed once. Others go through the model side by side.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from apertus_mlx.cache import FULL_PRECISION, Cache, expect, fork
from apertus_mlx.errors import RejectedError
from apertus_mlx.generation.decode import chunk_sizes, read_chunk
from apertus_mlx.measure.tasks.opened import OpenModel
from apertus_mlx.model.apertus import Model

# Positions whose logits are held at a time: 131,072 float32 numbers each.
LOGITS_STEP = 32


class Scored(NamedTuple):
    """A sequence of which the tokens from `start` (at least 1) on are to be judged."""

    ids: Sequence[int]
    start: int


class Likelihood(NamedTuple):
    """The natural logarithm of their probability, and whether greedy choice writes them."""

    log_probability: float
    greedy: bool


@dataclass(frozen=True, slots=True)
class _Pass:
    """One way through the model: what is fed, and what follows the last of it."""

    row: int
    inputs: Sequence[int]
    targets: Sequence[int]

    @property
    def known(self) -> int:
        """Inputs before the one that the first target follows."""
        return len(self.inputs) - len(self.targets)


def windows(ids: Sequence[int], start: int, most: int) -> Iterator[tuple[Sequence[int], int]]:
    """Inputs of at most `most` tokens, and how many of the tokens after them each one judges.

    Every token from `start` on is judged once, with as much before it as the last token of its
    window allows; the first tokens are left out where all do not fit.
    """
    done = start
    while done < len(ids):
        end = min(len(ids), done + most)
        yield ids[max(0, end - 1 - most) : end - 1], end - done
        done = end


def likelihoods(
    model: OpenModel, rows: Sequence[Scored], batch_size: int
) -> Iterator[tuple[int, Likelihood]]:
    """Judge `rows`; yields the number of a row and its likelihood as they become known.

    Raises:
        RejectedError: a logit is not finite.
    """
    together: dict[tuple[int, ...], list[_Pass]] = defaultdict(list)
    missing = [0] * len(rows)
    sums, greedy = [0.0] * len(rows), [True] * len(rows)
    for row, (ids, start) in enumerate(rows):
        if start >= len(ids):
            yield row, Likelihood(0.0, True)
        done = start
        for inputs, count in windows(ids, start, model.context):
            missing[row] += 1
            found = _Pass(row, inputs, ids[done : done + count])
            done += count
            together[tuple(inputs[: found.known + 1])].append(found)
    for found, value in _all(model, list(together.values()), batch_size):
        row = found.row
        sums[row] += value.log_probability
        greedy[row] &= value.greedy
        missing[row] -= 1
        if not missing[row]:
            yield row, Likelihood(sums[row], greedy[row])


def _all(
    model: OpenModel, groups: Sequence[list[_Pass]], batch_size: int
) -> Iterator[tuple[_Pass, Likelihood]]:
    # A padded row of a batch leaves nothing in a cache, whose form would matter.
    padded = isinstance(model.loaded.model, Model) and model.form == FULL_PRECISION
    alone = []
    for group in groups:
        first = group[0]
        if padded and len(group) == 1 and len(first.inputs) <= model.prefill_step:
            alone.append(first)
        else:
            yield from _from_one_start(model, group)
    alone.sort(key=lambda each: -len(each.inputs))
    for index in range(0, len(alone), batch_size):
        yield from _side_by_side(model, alone[index : index + batch_size])


def _from_one_start(model: OpenModel, group: Sequence[_Pass]) -> Iterator[tuple[_Pass, Likelihood]]:
    """Passes whose inputs are the same as far as the first token that is judged."""
    decoder, known = model.loaded.model, group[0].known
    start = decoder.make_cache(model.form)
    if known:
        expect(start, known)
        _read(model, group[0].inputs[:known], start)
    for number, found in enumerate(group, 1):
        caches = start if number == len(group) else fork(start)
        hidden = []
        tail, done = found.inputs[known:], 0
        for size in chunk_sizes(len(tail), model.prefill_step):
            hidden.append(decoder.model(mx.array([tail[done : done + size]]), caches))
            mx.eval(hidden[-1], [layer.state for layer in caches])
            done += size
        yield found, _judge(model, mx.concatenate(hidden, axis=1)[0], found.targets)
        mx.clear_cache()


def _read(model: OpenModel, ids: Sequence[int], caches: Sequence[Cache]) -> None:
    done = 0
    for size in chunk_sizes(len(ids), model.prefill_step):
        read_chunk(model.loaded.model, mx.array([ids[done : done + size]]), caches, wanted=False)
        done += size


def _side_by_side(model: OpenModel, batch: Sequence[_Pass]) -> Iterator[tuple[_Pass, Likelihood]]:
    """Passes of their own, padded at the end, which no token before it sees."""
    longest = max(len(each.inputs) for each in batch)
    rows = [[*each.inputs, *[0] * (longest - len(each.inputs))] for each in batch]
    hidden = model.loaded.model.model(mx.array(rows), None)
    mx.eval(hidden)
    for row, found in enumerate(batch):
        own = hidden[row, found.known : len(found.inputs)]
        yield found, _judge(model, own, found.targets)
    mx.clear_cache()


def _judge(model: OpenModel, hidden: mx.array, targets: Sequence[int]) -> Likelihood:
    """The likelihood of `targets`, each after its row of `hidden` `[targets, D]`."""
    total, greedy = 0.0, True
    for first in range(0, len(targets), LOGITS_STEP):
        part = hidden[first : first + LOGITS_STEP]
        logits = model.loaded.model.logits(part[None])[0].astype(mx.float32)
        wanted = mx.array(list(targets[first : first + LOGITS_STEP]))
        taken = mx.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        total += math.fsum((taken - mx.logsumexp(logits, axis=-1)).tolist())  # type: ignore[arg-type]
        greedy &= bool((logits.argmax(axis=-1) == wanted).all().item())
    if not math.isfinite(total):
        raise RejectedError(
            f"{model.loaded.folder.directory}: computes logits that are not finite; its weights "
            "are damaged or overflow in this type; try --dtype float32"
        )
    return Likelihood(total, greedy)
