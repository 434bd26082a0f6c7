"""Runs tasks of lm-eval on several models, one after the other."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partialmethod
from io import StringIO
from pathlib import Path
from typing import Any

from apertus_mlx.errors import ApertusError, NotFoundError, RejectedError, UsageError
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.measure.tasks.card_tasks import Chosen, choose
from apertus_mlx.measure.tasks.opened import open_model
from apertus_mlx.measure.tasks.options import TaskOptions
from apertus_mlx.measure.tasks.own_tasks import own_tasks

# Half of the interval that holds 95 % of a normal distribution, in standard errors.
Z95 = 1.96
# Draws for the error of a figure that is no mean.
BOOTSTRAP_DRAWS = 1000

# Told a stage, how many requests are answered, and how many there are.
OnRequests = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of one task.

    Attributes:
        task: its name, or its group's.
        metric: such as `acc`, with the name of the filter where that is not `none`.
        value: the figure.
        error: its standard error; None where there is none.
        questions: how many were asked.
    """

    task: str
    metric: str
    value: float
    error: float | None
    questions: int | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its 95 % confidence interval: Wilson's for a share of questions, else the normal one.

        The normal interval of a share that is 0 or 1 would be empty.
        """
        if self.error is None:
            return None
        count, share = self.questions or 0, self.value
        if count > 1 and math.isclose(
            self.error**2 * (count - 1), share * (1 - share), abs_tol=1e-9
        ):
            middle = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
            spread = share * (1 - share) / count + Z95**2 / (4 * count**2)
            half = Z95 * math.sqrt(spread) / (1 + Z95**2 / count)
            return max(0.0, middle - half), min(1.0, middle + half)
        return self.value - Z95 * self.error, self.value + Z95 * self.error


@dataclass(frozen=True, slots=True)
class ModelScores:
    """What one model reached, and the bytes of its checkpoint."""

    weight_bytes: int
    scores: tuple[Score, ...]

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        rows = [
            {**asdict(score), "interval_95": score.interval and list(score.interval)}
            for score in self.scores
        ]
        return {"weight_bytes": self.weight_bytes, "scores": rows}


def find_tasks(names: Sequence[str], offline: bool) -> Chosen:
    """Find tasks and their data sets, before any model is loaded.

    Raises:
        UsageError: lm-eval is missing, or there is no such task.
        NotFoundError: a data set cannot be had.
    """
    if offline:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with quiet():
        # To read the names of all of lm-eval's tasks takes it seconds; ours need none of them.
        manager = _task_manager(include_defaults=not set(names) <= own_tasks().keys())
        chosen = choose(names, manager.all_tasks, own_tasks())
        chosen.manager = manager
        # Why tasks cannot be had, by name.
        missing: dict[str, str] = {}
        for task in chosen.tasks:
            name = task if isinstance(task, str) else str(task.get("task"))
            try:
                load = getattr(manager, "load", None) or manager.load_task_or_group
                load([task])
            except Exception as error:  # noqa: BLE001 - whatever its data set's reader raises
                missing[name] = " ".join(str(error).split())[:200] or type(error).__name__
                # Without a network the next one may take minutes, too.
                if not offline:
                    break
    if missing:
        reason = next(iter(missing.values()))
        way_out = "; leave out --offline to download it" if offline else ""
        raise NotFoundError(f"--tasks {', '.join(missing)}: cannot be loaded: {reason}{way_out}")
    return chosen


def run_tasks(
    directory: Path,
    chosen: Chosen,
    options: TaskOptions,
    settings: RunOptions,
    answers: Path | None = None,
    progress: OnRequests | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> ModelScores:
    """Put tasks to the model in `directory`; `answers` is a file that keeps its answers.

    Raises:
        ApertusError: the model cannot be loaded, or a task asks for what is not implemented.
    """
    from lm_eval import simple_evaluate

    from apertus_mlx.measure.tasks.peer import ApertusLM

    with open_model(directory, settings, options.context, on_bytes) as model:
        if options.chat:
            model.loaded.folder.require_template()
        adapter = ApertusLM(
            model,
            think=options.think,
            max_thought_tokens=options.max_thought_tokens,
            batch_size=options.batch_size,
            answers=answers,
            on_requests=progress,
        )
        try:
            with quiet():
                found = simple_evaluate(
                    model=adapter,
                    # A task changes what it is given.
                    tasks=[task if isinstance(task, str) else dict(task) for task in chosen.tasks],
                    num_fewshot=options.few_shot,
                    limit=options.limit,
                    bootstrap_iters=BOOTSTRAP_DRAWS,
                    log_samples=False,
                    system_instruction=options.system,
                    apply_chat_template=options.chat,
                    fewshot_as_multiturn=options.chat,
                    task_manager=chosen.manager,
                    torch_random_seed=None,
                )
        except ApertusError:
            raise
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise RejectedError(f"--tasks: lm-eval refuses: {reason}") from None
        return ModelScores(model.weight_bytes, tuple(scores(found)))


def scores(found: Mapping[str, Any]) -> Iterator[Score]:
    """The figures in what lm-eval returns."""
    for task, values in found["results"].items():
        questions = found.get("n-samples", {}).get(task, {}).get("effective")
        if questions is None:
            members = found.get("group_subtasks", {}).get(task, ())
            counts = [found.get("n-samples", {}).get(each, {}).get("effective") for each in members]
            questions = sum(filter(None, counts)) or None
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            known = isinstance(error, int | float)
            yield Score(task, name, float(value), float(error) if known else None, questions)


def _task_manager(include_defaults: bool) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError("--tasks: needs lm-eval: pip install lm-eval") from None
    return TaskManager(include_defaults=include_defaults)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what lm-eval logs, prints on stdout and draws on stderr, and without its processes.

    It is no use to hide its bars by name: each of its modules has its own.
    """
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level, one_process = logger.level, os.environ.get("DISABLE_MULTIPROC")
    # As it stands in the class: what the class gives is bound to it.
    drawn = vars(tqdm)["__init__"]
    logger.setLevel(logging.ERROR)
    tqdm.__init__ = partialmethod(drawn, disable=True)
    # The commit of the folder in which one stands says nothing, and git complains of other folders.
    evaluator: Any = sys.modules.get("lm_eval.evaluator")
    asks_git = getattr(evaluator, "get_git_commit_hash", None)
    if asks_git is not None:
        evaluator.get_git_commit_hash = lambda: None
    # Its errors are estimated by forks of this process, which has a model in it.
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logger.setLevel(level)
        tqdm.__init__ = drawn
        if asks_git is not None:
            evaluator.get_git_commit_hash = asks_git
        if one_process is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = one_process
