"""The answers that are being written: rows of one batch, what each tells, and which must end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from apertus_mlx.errors import ApertusError
from apertus_mlx.generation.batch import Batch, Event, Row
from apertus_mlx.generation.guessed_steps import GuessedSteps
from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.generation.prefix_trie import PrefixTrie
from apertus_mlx.generation.speculate import Speculation
from apertus_mlx.server.admission import MemoryBudget
from apertus_mlx.server.errors import in_engine
from apertus_mlx.server.jobs import Choice, Job
from apertus_mlx.server.metrics import Metrics
from apertus_mlx.server.slots import SlotFolder
from apertus_mlx.system.foreign_errors import out_of_memory

_log = logging.getLogger(__name__)

# After so many computations in a row of which nothing has come, the process is of no more use.
MOST_FAULTS = 3


class Running:
    """All answers that are being written, or whose prompts are being read, on a loaded model."""

    def __init__(
        self,
        loaded: LoadedModel,
        budget: MemoryBudget,
        metrics: Metrics,
        idle_prefixes: int,
        slots: SlotFolder | None = None,
    ) -> None:
        """Begin with none; up to `idle_prefixes` caches are kept, where memory allows it."""
        self._slots = slots
        self._loaded, self._budget, self._metrics = loaded, budget, metrics
        self._most_prefixes = idle_prefixes
        self._choices: dict[Row, Choice] = {}
        self._left_bytes = budget.left_bytes([])  # for what is kept for later
        self._batch = self._new_batch()
        self._drafts = Speculation()
        self._faults = 0
        self._fault: Exception | None = None

    def __len__(self) -> int:
        return len(self._choices)

    @property
    def jobs(self) -> list[Job]:
        """The job of each answer."""
        return [choice.job for choice in list(self._choices.values())]

    @property
    def positions(self) -> list[int]:
        """The most positions that each may come to hold."""
        return [job.task.positions for job in self.jobs]

    @property
    def prefixes(self) -> PrefixTrie:
        """What answers that have ended have left for later ones."""
        return self._batch.prefixes

    @property
    def drafts(self) -> dict[str, int | str | None] | None:
        """What the draft was good for in all answers so far; None without a draft.

        As in `Speculation`: `off` is why it guesses no more now.
        """
        drafting = self._loaded.drafting
        if drafting is None:
            return None
        return {
            "drafted": self._drafts.drafted,
            "accepted": self._drafts.accepted,
            "off": drafting.draft.ended or drafting.pace.off,
            "row_costs": drafting.pace.row_costs,
        }

    def has_room(self, job: Job) -> bool:
        """Whether another answer, of this job, fits into memory beside those that run."""
        return not self._choices or self._budget.fits([*self.positions, job.task.positions])

    def begin(self, job: Job) -> None:
        """Begin the next answer of a job.

        Raises:
            UsageError: a grammar is too complex.
        """
        form, key = self._budget.plan.form, job.task.cache_key
        if self._slots is not None and key is not None:
            self._slots.bring(key, form, self._batch)
        choice = Choice(job, self._loaded, form)
        self._choices[choice.row] = choice
        self._batch.join(choice.row)
        self._left_bytes = self._budget.left_bytes(self.positions)
        if self.prefixes.nbytes > self._left_bytes:
            self._batch.reuse(choice.row, take=True)
            self.prefixes.shrink(self._left_bytes)

    def turn(self) -> None:
        """A token of each answer, then a chunk of one prompt.

        Raises:
            ApertusError: nothing works any more.
        """
        try:
            for compute in (self._batch.step, self._batch.read):
                self.leave_cancelled()
                self._tell(compute)
            self.prefixes.shrink(self._left_bytes)
        except Exception as error:  # noqa: BLE001 - nobody knows whose it is: all end
            for job in self.jobs:
                fail(job, error, self._metrics)
            self.leave_cancelled()
            self._batch = self._new_batch()
            self._fault = error
            self._faults += 1
        if self._faults >= MOST_FAULTS:
            raise ApertusError(
                f"{self._faults} computations in a row have failed, the last with "
                f"{type(self._fault).__name__}: {self._fault}; start the server again"
            )

    def save_slots(self) -> None:
        """Bring to the disk what slots keep, where there is a folder for it."""
        if self._slots is not None:
            self._slots.save(self._batch)

    def leave_cancelled(self) -> None:
        """Let go of the answers of cancelled jobs."""
        for row, choice in list(self._choices.items()):
            if choice.job.cancelled:
                if choice.job.finish != "error":
                    choice.job.finish = "cancelled"
                self._end(row)

    def _new_batch(self) -> Batch:
        decode = self._loaded.folder.tokenizer.decode
        prefixes = PrefixTrie(
            self._budget.left_bytes([]),
            lambda token: decode([token], skip_special=False),
            self._most_prefixes,
        )
        model, drafting = self._loaded.model, self._loaded.drafting
        stop_ids = self._loaded.folder.stop_ids
        guessed = None if drafting is None else GuessedSteps(model, drafting, stop_ids)
        return Batch(model, prefixes, self._budget.plan.prefill_step, guessed=guessed)

    def _tell(self, compute: Callable[[], Sequence[Event]]) -> None:
        """Have the batch compute, and each answer tell what has come of it."""
        faults = self._batch.faults
        events = compute()
        for event in events:
            choice = self._choices.get(event.row)
            if choice is None or choice.job.cancelled:
                continue
            try:
                if event.error is not None:
                    raise event.error
                if event.token is not None and event.logits is not None:
                    answer = choice.take(event.token, event.logits)
                    if answer is not None:
                        self._metrics.answered(answer)
                        if (found := answer.speculation) is not None:
                            self._drafts.drafted += found.drafted
                            self._drafts.accepted += found.accepted
                        self._end(event.row)
            except Exception as error:  # noqa: BLE001 - it is this job's end, not the engine's
                fail(choice.job, error, self._metrics)
        self._count_faults(events, self._batch.faults > faults)

    def _count_faults(self, events: Sequence[Event], failed: bool) -> None:
        """Count what failed with no token in between: one fault ends a row, not the process."""
        lost = [event.error for event in events if event.error is not None]
        if any(event.token is not None for event in events):
            self._faults = 0
        elif lost and failed and not out_of_memory(lost[0]):
            self._fault = lost[0]
            self._faults += 1

    def _end(self, row: Row) -> None:
        """Let go of an answer, whose cache is kept for others."""
        job = self._choices.pop(row).job
        self._batch.leave(row)
        self._left_bytes = self._budget.left_bytes(self.positions)
        if job.close(1):
            self._metrics.ended(job, job.finish)


def fail(job: Job, error: Exception, metrics: Metrics) -> None:
    """End a job by an error; its answers leave before the next step."""
    told = in_engine(error)
    if told.status == 500:
        _log.error("a request failed: %s: %s", type(error).__name__, error, exc_info=error)
        metrics.faults.inc()
    job.fail(told)
