"""Training that goes on after a kill: the same steps on the same windows, whenever it stopped.

A plan is written before the first step and holds all that the result depends on. Weights and the
optimizer's state are saved together, beside the old ones, and then renamed.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from apertus_mlx.backend.hardware import has_gpu
from benchmarks.witness.geometry import Size
from benchmarks.witness.network import new_model
from benchmarks.witness.tokens import Ids

SEED = 2_027
WINDOW = 256
# Of the widest model; narrower ones learn faster.
RATE, RATE_WIDTH = 2e-3, 512
WARMUP_SHARE, WEIGHT_DECAY = 0.02, 0.1
# Seconds between saves, and steps between lines of progress.
SAVE_SECONDS, TOLD_STEPS = 60.0, 20
State = dict[str, mx.array]


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the weights depend on.

    Attributes:
        ids_sha256: of the training text's ids.
        rows: windows in a batch.
    """

    size: Size
    ids_sha256: str
    steps: int
    rows: int
    window: int = WINDOW
    rate: float = RATE
    seed: int = SEED

    @property
    def tokens(self) -> int:
        """How many it is trained on."""
        return self.steps * self.rows * self.window

    def write(self, path: Path) -> None:
        """Beside, then renamed."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")
        partial.replace(path)


def read_plan(path: Path) -> Plan:
    """What `Plan.write` has written."""
    values = json.loads(path.read_text("utf-8"))
    return Plan(**{**values, "size": Size(**values["size"])})


class Trainer:
    """A model in training, from random weights or from what `folder` has saved."""

    def __init__(self, plan: Plan, ids: Ids, folder: Path) -> None:
        self.plan, self.folder, self.done = plan, folder, 0
        self.losses: list[float] = []
        self._ids = ids
        self.model, self._loss = new_model(plan.size, plan.seed)
        self._optimizer = optimizers.AdamW(
            self._rate, betas=[0.9, 0.95], weight_decay=WEIGHT_DECAY, bias_correction=True
        )
        self._optimizer.init(self.model.trainable_parameters())
        self._gradient = nn.value_and_grad(self.model, self._loss)
        self._advance: Callable[[mx.array], mx.array] = self._update
        if has_gpu():
            state = [self.model.state, self._optimizer.state]
            self._advance = mx.compile(self._update, inputs=state, outputs=state)
        self._load()

    def step(self) -> None:
        """One batch."""
        loss = self._advance(mx.array(self._batch(self.done)))
        mx.eval(self.model.parameters(), self._optimizer.state, loss)
        self.losses.append(loss.item())
        self.done += 1

    def run(self, held_out: np.ndarray) -> None:
        """All steps that are left, with saves, and a line on stderr now and then."""
        began = saved = time.monotonic()
        first = self.done
        if first:
            print(f"goes on after step {first:,}", file=sys.stderr, flush=True)
        while self.done < self.plan.steps:
            self.step()
            now = time.monotonic()
            if self.done % TOLD_STEPS == 0:
                speed = (self.done - first) * self.plan.rows * self.plan.window / (now - began)
                loss = float(np.mean(self.losses[-TOLD_STEPS:]))
                print(
                    f"step {self.done:,} of {self.plan.steps:,}, loss {loss:.4f}, "
                    f"{speed:,.0f} tokens/s",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            if now - saved > SAVE_SECONDS or self.done == self.plan.steps:
                self.save()
                print(
                    f"saved; held-out loss {self.held_out_loss(held_out):.4f}",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                saved = time.monotonic()

    def held_out_loss(self, windows: np.ndarray) -> float:
        """Mean over `windows` `[count, length + 1]`."""
        parts = [windows[i : i + self.plan.rows] for i in range(0, len(windows), self.plan.rows)]
        sums = [
            self._loss(self.model, mx.array(part), learns=False).item() * len(part)
            for part in parts
        ]
        return float(sum(sums) / len(windows))

    def save(self) -> None:
        """Write what is needed to go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial, path = (self.folder / f"{n}.safetensors" for n in ("partial", "state"))
        arrays = {
            f"{kind}.{name}": array
            for kind, tree in (("model", self.model.parameters()),
                               ("optimizer", self._optimizer.state))
            for name, array in tree_flatten(tree)
        }  # fmt: skip
        metadata = {"step": str(self.done), "losses": json.dumps(self.losses)}
        mx.save_safetensors(str(partial), arrays, metadata)
        partial.replace(path)

    def _load(self) -> None:
        path = self.folder / "state.safetensors"
        if not path.exists():
            return
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        trees: dict[str, list[tuple[str, mx.array]]] = {"model": [], "optimizer": []}
        for name, array in arrays.items():
            kind, _, rest = name.partition(".")
            trees[kind].append((rest, array))
        self.model.update(tree_unflatten(trees["model"]))
        saved = dict(trees["optimizer"])
        # In place, since a compiled step holds on to it; what holds no arrays was not saved.
        self._optimizer.state.update(
            tree_map_with_path(lambda name, _: saved[name], self._optimizer.state)
        )
        self.done, self.losses = int(metadata["step"]), json.loads(metadata["losses"])

    def _update(self, batch: mx.array) -> mx.array:
        loss, gradients = self._gradient(self.model, batch)
        gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
        self._optimizer.update(self.model, gradients)
        return loss

    def _batch(self, step: int) -> np.ndarray:
        """Windows `[rows, window + 1]` of a step: all of the text, each time in a new order."""
        count = (len(self._ids) - 1) // self.plan.window
        chosen = []
        for number in range(step * self.plan.rows, (step + 1) * self.plan.rows):
            epoch, place = divmod(number, count)
            chosen.append(self._order(epoch, count)[place])
        starts = np.array(chosen)[:, None] * self.plan.window
        return self._ids[starts + np.arange(self.plan.window + 1)].astype(np.int32)

    def _order(self, epoch: int, count: int) -> np.ndarray:
        if getattr(self, "_ordered", None) != epoch:
            self._ordered = epoch
            self._places = np.random.default_rng([self.plan.seed, epoch]).permutation(count)
        return self._places

    def _rate(self, step: mx.array) -> mx.array:
        """Up to the peak in a few steps, then a cosine down to a tenth of it."""
        peak = self.plan.rate * math.sqrt(RATE_WIDTH / self.plan.size.hidden)
        warm = max(self.plan.steps * WARMUP_SHARE, 1)
        down = 0.55 + 0.45 * mx.cos(math.pi * step / self.plan.steps)
        return peak * mx.minimum((step + 1) / warm, down)
