"""Many sequences at once: one decode step for all of them, and prompts read in between.

All but attention is computed for all rows together; each row attends to its own cache, in whatever
form and of whatever length (`cache/rows.py`). Nothing is copied when a row joins or leaves.

A row that decodes alone may have a draft guess for it; see `guessed_steps.py`.

What fails, fails one row: after an exception each row of the step is computed once more, alone and
from its tokens, since nobody knows what became of its cache.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from functools import partial

import mlx.core as mx

from apertus_mlx.backend.memory_limits import clear_pool
from apertus_mlx.cache import Cache, CacheConfig, expect, fork
from apertus_mlx.errors import ApertusError
from apertus_mlx.generation.decode import (
    CLEAR_INTERVAL,
    DEFAULT_PREFILL_STEP,
    chunk_sizes,
    prefill,
    read_chunk,
)
from apertus_mlx.generation.guessed_steps import GuessedSteps
from apertus_mlx.generation.prefix_trie import PrefixTrie
from apertus_mlx.generation.row import Row
from apertus_mlx.generation.row_steps import Event, advance
from apertus_mlx.model.language_model import LanguageModel, NextTokenLogits

__all__ = ["Batch", "Event", "Row"]

_log = logging.getLogger(__name__)

SHARED_PREFILL_STEP = 128


class Batch:
    """Rows of one model. Prompts are read a chunk at a time: the oldest, then the shortest.

    Whoever runs it calls `step` and `read` in turn, and `leave` for a row that has come to a stop
    id or is not wanted any more: then it is gone at once. Not for several threads at the same time.

    Args:
        model: an MLX model computes all rows together; another, one after the other.
        prefixes: what rows leave there is reused by others. None: nothing is.
        prefill_step: most tokens of a prompt that are read at a time.
        shared_step: the same while rows decode, which wait for it.
        guessed: steps of a row that decodes alone, with a draft. None: there is no draft.

    Attributes:
        running: rows that decode, in the order in which they began to.
        waiting: rows whose prompt is not read yet, in the order in which they joined.
        faults: how often something failed that concerned more than one row's rules.
    """

    def __init__(
        self,
        model: LanguageModel,
        prefixes: PrefixTrie | None = None,
        prefill_step: int = DEFAULT_PREFILL_STEP,
        shared_step: int = SHARED_PREFILL_STEP,
        guessed: GuessedSteps | None = None,
    ) -> None:
        self.model = model
        self.prefixes = PrefixTrie(0) if prefixes is None else prefixes
        self.prefill_step = prefill_step
        self.shared_step = min(shared_step, prefill_step)
        self.running: list[Row] = []
        self.waiting: deque[Row] = deque()
        self.faults = 0
        self._guessed = guessed
        self._steps = self._chunks = 0

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def join(self, row: Row) -> None:
        """Take a row in; its prompt is read between the steps of others."""
        self.waiting.append(row)

    def reuse(self, row: Row, take: bool = False) -> None:
        """Give a row, before its prompt is read, what others have computed of that.

        Reading does so itself. `take`: what is found is kept for nobody else.
        """
        if row.on_hidden is not None:
            return
        search = self.prefixes.take if take else self.prefixes.find
        if (hit := search(row.ids, row.form)) is not None:
            row.caches = hit.caches
            row.read = row.reused = hit.length

    def leave(self, row: Row) -> None:
        """Let a row go, and keep what it computed for others; harmless if it is gone already."""
        if row in self.running:
            self.running.remove(row)
        elif row in self.waiting:
            self.waiting.remove(row)
        else:
            return
        self._keep_and_free(row)

    def turn(self) -> Iterator[Event]:
        """One decode step, then one chunk of a prompt."""
        yield from self.step()
        yield from self.read()

    def step(self) -> list[Event]:
        """Hand out one token of each running row, or more of one, and compute what follows."""
        if not self.running:
            return []
        if len(self.running) == 1 and self._guessed is not None:
            events = self._step_alone(self.running[0], self._guessed)
        else:
            events = self._plain_step(self.running[:])
        if self.running:
            self._start()
        self._steps += 1
        if self._steps % CLEAR_INTERVAL == 0:
            clear_pool()
        return events

    def _plain_step(self, rows: list[Row]) -> list[Event]:
        """Hand out one token of each row."""
        try:
            found = advance(self.model, rows)
        except Exception as error:  # noqa: BLE001 - whatever it is, others go on
            found = self._one_by_one(rows, error)
        return [self._hand_out(event) for event in found]

    def _step_alone(self, row: Row, guessed: GuessedSteps) -> list[Event]:
        """Hand out the next token of `row`, and those behind it that a draft guesses right."""
        ahead = guessed.ahead(row)
        if ahead == 0:
            started = time.perf_counter()
            events = self._plain_step([row])
            guessed.rested(row, time.perf_counter() - started)
            return events
        try:
            found = guessed.compute(row, ahead)
        except ApertusError as error:
            return [self._hand_out(Event(row, error=error))]
        except Exception as error:  # noqa: BLE001 - a plain step may do
            guessed.give_up(row)
            return [self._hand_out(event) for event in self._one_by_one([row], error)]
        events = []
        try:
            for token, logits in guessed.hand_out(found):
                events.append(Event(row, token, logits))
        except Exception as error:  # noqa: BLE001 - it is this row's
            return [*events, self._hand_out(Event(row, error=error))]
        if row.left == 0:
            self.leave(row)
        return events

    def read(self) -> list[Event]:
        """Read a chunk of a prompt; no event if all are read."""
        if not self.waiting:
            return []
        row = self._next_to_read()
        try:
            after = self._read_chunk(row)
            if after is not None:
                row.begin(after)
                mx.async_eval(row.token)
        except Exception as error:  # noqa: BLE001 - it is this row's
            self._note_fault(error)
            row.caches, row.read, row.reused = None, 0, 0
            if not row.retried:
                row.retried = True
                return [Event(row)]
            self.waiting.remove(row)
            return [Event(row, error=error)]
        if after is not None:
            self.waiting.remove(row)
            self.running.append(row)
        return [Event(row)]

    def _next_to_read(self) -> Row:
        """By turns the oldest and the one with least to read, so that none waits for a long one."""
        self._chunks += 1
        if self._chunks % 2:
            return self.waiting[0]
        return min(self.waiting, key=lambda row: row.prompt_tokens - row.read)

    def _read_chunk(self, row: Row) -> NextTokenLogits | None:
        """Read on in the prompt of `row`; the logits after it, if that was the end."""
        prompt = row.ids
        if row.caches is None:
            self.reuse(row)
        if row.caches is None:
            row.caches = self.new_caches(row.form)
        if row.read == row.reused:
            expect(row.caches, len(prompt) - row.read)
        ends = [*(place for place in row.boundaries if place > row.read), len(prompt)]
        step = self.shared_step if self.running else self.prefill_step
        size = chunk_sizes(ends[0] - row.read, step)[0]
        chunk = mx.array(prompt[row.read : row.read + size])[None]
        told = None if row.on_hidden is None else partial(row.on_hidden, row.read)
        logits = read_chunk(self.model, chunk, row.caches, row.read + size == len(prompt), told)
        row.read += size
        if row.read in row.boundaries:
            # It goes on in the fork: on other ranks, too, the caches kept are then written no more.
            kept, row.caches = row.caches, fork(row.caches)
            self.prefixes.keep(prompt[: row.read], row.form, kept, row.name)
        return None if logits is None else NextTokenLogits(logits)

    def new_caches(self, form: CacheConfig) -> list[Cache]:
        """Empty caches of all layers, as rows have them here."""
        caches = self.model.make_cache(form)
        if self._guessed is not None:
            self._guessed.prepare(caches)
        return caches

    def _hand_out(self, event: Event) -> Event:
        row = event.row
        if event.token is not None:
            try:
                row.hand_out(event.token)
            except Exception as error:  # noqa: BLE001 - it is this row's
                event = Event(row, error=error)
        if event.error is not None:
            self._drop(row)
        elif row.left == 0:
            self.leave(row)
        return event

    def _start(self) -> None:
        """Let the GPU begin with what was drawn last."""
        try:
            mx.async_eval([row.token for row in self.running])
        except Exception as error:  # noqa: BLE001
            # The next step meets it again, and finds out whose it is.
            self._note_fault(error)

    def _one_by_one(self, rows: list[Row], error: Exception) -> list[Event]:
        """Do the step that failed with `error` for each row alone."""
        self._note_fault(error)
        events = []
        if all(row.retried for row in rows):
            # Alone each went well: together they are too many.
            events.append(Event(rows.pop(), error=error))
            events[0].row.caches = None
        for row in rows:
            try:
                self._recompute(row)
                events += advance(self.model, [row])
                row.retried = True
            except Exception as own:  # noqa: BLE001 - it is this row's
                events.append(Event(row, error=own))
                row.caches = None
        return events

    def _recompute(self, row: Row) -> None:
        """Compute all that a running row has so far from its tokens."""
        row.caches = None  # the memory, before it is taken anew
        row.caches = self.new_caches(row.form)
        logits = prefill(self.model, row.ids, row.caches, self.prefill_step)
        row.begin(NextTokenLogits(logits))

    def _note_fault(self, error: Exception) -> None:
        """Count and log it, and give back what memory there is, in case that was missing."""
        self.faults += 1
        _log.error("a step failed: %s: %s", type(error).__name__, error)
        self.prefixes.clear()
        clear_pool()

    def _drop(self, row: Row) -> None:
        if row in self.running:
            self.running.remove(row)
        row.caches = None

    def _keep_and_free(self, row: Row) -> None:
        held, caches, row.caches = row.held, row.caches, None
        if caches is None or not held:
            return
        try:
            self.prefixes.keep(held, row.form, caches, row.name)
        except Exception as error:  # noqa: BLE001 - the row has gone; nobody waits for it
            self._note_fault(error)
