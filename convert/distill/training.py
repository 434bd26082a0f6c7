"""The training loop: seeded batches, validations at intervals, and a state that survives a kill.

Adam with bias correction ("Adam: A Method for Stochastic Optimization", arXiv 1412.6980); the rate
rises over the first steps and falls linearly to nothing. Rates are relative to the typical scale of
each matrix, so that one suits small weights and large ones.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from apertus_mlx.convert.distill import objective
from apertus_mlx.convert.distill.layered_step import LayeredStep
from apertus_mlx.convert.distill.student import CODES, Quantized, Trained, learning_modules
from apertus_mlx.convert.distill.teacher_cache import Batch, TeacherCache
from apertus_mlx.errors import UsageError
from apertus_mlx.model.apertus import Model
from apertus_mlx.system.whole_file import whole_file

WARMUP_SHARE = 0.05
# How often a run is judged and saved.
VALIDATIONS = 20
STATE_FILE = "state.safetensors"
BEST_FILE = "best.safetensors"


@dataclass(frozen=True, slots=True)
class Options:
    """How to distill."""

    trained: Trained = "weights"
    epochs: int = 1
    # Of scales, biases and norms.
    learning_rate: float = 1e-3
    # How much the text itself counts beside the teacher.
    text_share: float = 0.1
    # Tokens that the teacher names at each position; all others count as one.
    top_k: int = 64
    seed: int = 0
    # Validations without a better one after which a run ends; None: it goes on to the end, and the
    # last state is kept, or the first.
    patience: int | None = 8
    # How much faster codes move. At the default rate half a step, where a code changes, takes some
    # 25 batches that agree; changes on less evidence do harm.
    codes_factor: float = 20.0


@dataclass(frozen=True, slots=True)
class Validation:
    """Where a run stood: mean loss since the one before, and that on held-out windows, in nats."""

    step: int
    tokens: int
    # None before the first step.
    training_loss: float | None
    held_out_loss: float
    held_out_divergence: float


@dataclass(slots=True)
class _State:
    """The state of a run, besides its arrays."""

    step: int
    tokens: int
    # Sum of losses since the last validation.
    loss: float
    history: list[Validation]


class Training:
    """Trains `student` in place; its state lies in `folder`.

    `by_layers`: in steps that take longer and less memory (`layered_step`).
    """

    def __init__(
        self,
        student: Model,
        batches: TeacherCache,
        held_out: TeacherCache,
        options: Options,
        folder: Path,
        by_layers: bool = False,
    ) -> None:
        self._student = student
        self._batches = batches
        self._held_out = held_out
        self._options = options
        self._folder = folder
        self.steps = options.epochs * len(batches)
        self.tokens = options.epochs * batches.tokens
        self._interval = max(1, self.steps // VALIDATIONS)
        self._optimizer = _make_optimizer(options, self.steps)
        step = LayeredStep if by_layers else WholeStep
        self._step = step(student, self._optimizer, options.text_share)

    def run(self, progress: Callable[[int, float, Sequence[Validation]], None]) -> list[Validation]:
        """Train to the end, from the last saved state if there is one, and take the best weights.

        `progress` is told tokens seen, the last loss and the validations so far.

        Raises:
            UsageError: a loss is not finite.
        """
        state = self._resume()
        if not state.history:
            state.history.append(self._validate(0, 0, None))
            self._save_best()
        while state.step < self.steps and not self._is_stale(state.history):
            batch = self._batches.batch(self._batch_index(state.step))
            loss = self._step.learn(batch)
            mx.eval(self._parameters(), self._optimizer.state)
            value = _finite(loss, state.step + 1)
            state.step, state.tokens = state.step + 1, state.tokens + batch.tokens.size
            state.loss += value
            if state.step % self._interval == 0 or state.step == self.steps:
                self._take_stock(state)
            progress(state.tokens, value, state.history)
        kept = _load(self._folder / BEST_FILE)
        assert kept is not None
        self._student.update(kept[0])
        return state.history

    def _is_stale(self, history: Sequence[Validation]) -> bool:
        patience = self._options.patience
        return (
            patience is not None
            and len(history) - 1 - history.index(best(history, self._options)) >= patience
        )

    def _take_stock(self, state: _State) -> None:
        """Validate the student, keep it if it is the best so far, and save where the run stands."""
        steps = state.step - state.history[-1].step
        state.history.append(self._validate(state.step, state.tokens, state.loss / steps))
        state.loss = 0.0
        if self._is_best(state):
            self._save_best()
        arrays = {"student": self._parameters(), "optimizer": self._optimizer.state}
        _save(self._folder / STATE_FILE, arrays, {"state": json.dumps(asdict(state))})

    def _is_best(self, state: _State) -> bool:
        """Whether the weights as they are now would be kept."""
        if self._options.patience is None and state.step < self.steps:
            return False
        return state.history[-1] == best(state.history, self._options)

    def _validate(self, step: int, tokens: int, training_loss: float | None) -> Validation:
        losses, divergences, count = 0.0, 0.0, 0
        for index in range(len(self._held_out)):
            batch = self._held_out.batch(index)
            loss, divergence = self._step.judge(batch)
            losses += _finite(loss, step) * batch.tokens.size
            divergences += _finite(divergence, step) * batch.tokens.size
            count += batch.tokens.size
        return Validation(step, tokens, training_loss, losses / count, divergences / count)

    def _batch_index(self, step: int) -> int:
        epoch, position = divmod(step, len(self._batches))
        order = list(range(len(self._batches)))
        random.Random(f"{self._options.seed}:{epoch}").shuffle(order)
        return order[position]

    def _resume(self) -> _State:
        saved, kept = (_load(self._folder / name) for name in (STATE_FILE, BEST_FILE))
        if saved is None or kept is None:
            return _State(0, 0, 0.0, [])
        arrays, metadata = saved
        # Another version may have named its parameters otherwise.
        if _names(arrays["student"]) != _names(self._parameters()):
            return _State(0, 0, 0.0, [])
        self._student.update(arrays["student"])
        self._optimizer.state = arrays["optimizer"]
        values = json.loads(metadata["state"])
        history = [Validation(**validation) for validation in values.pop("history")]
        return _State(**values, history=history)

    def _parameters(self) -> Any:
        return nn.Module.trainable_parameters(self._student)

    def _save_best(self) -> None:
        _save(self._folder / BEST_FILE, self._parameters(), {})


class WholeStep:
    """Steps of `optimizer` on all of `student` at once."""

    def __init__(
        self, student: Model, optimizer: optimizers.MultiOptimizer, text_share: float
    ) -> None:
        self._student = student
        self._optimizer = optimizer
        self._text_share = text_share
        self._gradient = nn.value_and_grad(student, _batch_loss)

    def judge(self, batch: Batch) -> tuple[mx.array, mx.array]:
        """The loss on a batch, and the divergence in it."""
        return _batch_loss(self._student, batch, self._text_share)

    def learn(self, batch: Batch) -> mx.array:
        """Learn from a batch; the loss on it before."""
        loss: mx.array
        (loss, _), gradients = self._gradient(self._student, batch, self._text_share)
        self._optimizer.update(self._student, gradients)
        for _, module in learning_modules(self._student):
            if isinstance(module, Quantized):
                module.keep_in_range()
        return loss


def codes_reach(options: Options, steps: int) -> float:
    """How far codes can move in so many batches, in steps of a code, if all of them agree.

    Adam moves a number by its rate at most, but for gradients that are mostly nothing. Below half
    a step no code changes.
    """
    return options.codes_factor * options.learning_rate * (steps / 2 + 1)


def _make_optimizer(options: Options, steps: int) -> optimizers.MultiOptimizer:
    def adam(peak: float) -> optimizers.Optimizer:
        warmup = max(1, round(WARMUP_SHARE * steps))
        rate = optimizers.join_schedules(
            [
                optimizers.linear_schedule(peak / warmup, peak, warmup),
                optimizers.linear_schedule(peak, 0.0, max(1, steps - warmup)),
            ],
            [warmup],
        )
        return optimizers.Adam(rate, bias_correction=True)

    return optimizers.MultiOptimizer(
        [adam(options.codes_factor * options.learning_rate), adam(options.learning_rate)],
        [lambda path, _: path.endswith(CODES)],
    )


def _batch_loss(student: Model, batch: Batch, text_share: float) -> tuple[mx.array, mx.array]:
    """The loss on a batch, and the divergence in it."""
    return objective.loss(
        student(batch.tokens).flatten(0, 1),
        batch.likeliest.flatten(0, 1),
        batch.shares.flatten(0, 1),
        batch.following,
        text_share,
    )


def _finite(loss: mx.array, step: int) -> float:
    value = float(np.array(loss))
    if not math.isfinite(value):
        raise UsageError(f"step {step}: the loss is not finite; lower --learning-rate")
    return value


def best(history: Sequence[Validation], options: Options) -> Validation:
    """The validation whose weights are kept: the closest to the teacher on held-out windows.

    Of a run that goes on to the end it is the first or the last: on few windows a state on the way,
    while the rate is still high, can seem the closest by chance.
    """
    among = history if options.patience is not None else (history[0], history[-1])
    return min(among, key=lambda validation: validation.held_out_divergence)


def text_note(options: Options, history: Sequence[Validation]) -> str | None:
    """What to say where the text's share of the loss kept a student from its teacher.

    That is where the loss on held-out windows fell, but not the divergence in it.
    """
    first, lowest = history[0], min(each.held_out_loss for each in history)
    if not options.text_share or best(history, options) != first or lowest >= first.held_out_loss:
        return None
    return (
        f"--text-share {options.text_share:g}: the student followed the text and came no nearer "
        "its teacher; nothing was changed; --text-share 0 follows the teacher alone"
    )


def _names(tree: Any) -> set[str]:
    return set(dict(tree_flatten(tree)))


def _save(path: Path, arrays: Mapping[str, Any], metadata: dict[str, str]) -> None:
    """Write a tree of arrays; the file is there complete or not at all."""
    with whole_file(path) as beside:
        mx.save_safetensors(str(beside), dict(tree_flatten(arrays)), metadata)


def _load(path: Path) -> tuple[dict[str, Any], dict[str, str]] | None:
    """A tree of arrays and its metadata; None where there is no whole file."""
    if not path.exists():
        return None
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
    except RuntimeError:
        return None
    arrays, metadata = loaded
    return tree_unflatten(list(arrays.items())), metadata
