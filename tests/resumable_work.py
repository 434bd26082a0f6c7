"""The kinds of work that can go on after a kill, each small enough to be done many times."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx

from apertus_mlx.convert.calibration import calibrated, own_text, tuning
from apertus_mlx.convert.distill.run import Observer, distill
from apertus_mlx.convert.distill.run import prepare as prepare_distillation
from apertus_mlx.convert.distill.training import Options
from apertus_mlx.convert.evaluation import little_text
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request, Target
from apertus_mlx.convert.write.keep import Keep
from apertus_mlx.quant.spec import QuantSpec
from tests.builders import config_4x, write_checkpoint

TEXT = "\n\n".join(f"Line {n} has {n * n} birds, and the sea is calm today." for n in range(20))
REQUESTS = {
    "plain": Request(QuantSpec(4, 64)),
    "gptq": Request(QuantSpec(2, 32), method="gptq", smooth=True, rotate=True),
    "tuned": Request(QuantSpec(2, 32), method="gptq", tune=True),
    "target": Request(target=Target(4.5, group_size=32), method="gptq"),
}
KINDS = (*REQUESTS, "distill")
# With which there is text enough to tune on, of which the original writes a part in two goes.
SMALL_STEPS = (
    (calibrated, "WINDOW_TOKENS", 64),
    (own_text, "TOGETHER", 4),
    (tuning, "CODES_LEARN_FROM", 1280),
    (tuning, "TUNING_TOKENS", 256),
    (tuning, "EPOCHS", (1, 1)),
)
# What is told how far things are: a word for the part of the work, and where in it.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """One conversion or distillation of a small model."""

    kind: str
    source: Path
    text: Path
    student: Path

    def run(self, target: Path, resume: bool = False, progress: Progress = lambda _: None) -> None:
        """Do it, or go on with it; what is reached is saved at once."""
        with ExitStack() as stack:
            stack.enter_context(patch.object(Keep, "least_s", 0.0))
            for module, name, value in SMALL_STEPS if self.kind == "tuned" else ():
                stack.enter_context(patch.object(module, name, value))
            self._run(target, resume, progress)

    def _run(self, target: Path, resume: bool, progress: Progress) -> None:
        if self.kind == "distill":
            observer = Observer(
                lambda done, _: progress(f"asking {done}"),
                lambda done, *_: progress(f"learning {done}"),
                lambda done, _: progress(f"judging {done}"),
            )
            job = prepare_distillation(
                self.source, self.student, "source", Options(epochs=2), [self.text], 1024, 32
            )
            distill(job, target, resume, observer)
            return
        # The target's text is little, and judged; of the other kind it is enough.
        enough = 1 if self.kind in ("gptq", "tuned") else little_text.ENOUGH_TOKENS
        with patch.object(little_text, "ENOUGH_TOKENS", enough):
            conversion = prepare(
                self.source, REQUESTS[self.kind], "source", max_shard_bytes=60_000,
                calibration_texts=[self.text], target=target, resume=resume,
                progress=lambda _, done, __: progress(f"measuring {done}"),
            )  # fmt: skip
        convert(
            conversion, target, resume, lambda done: progress(f"writing {done}"),
            lambda _, done, __: progress(f"calibrating {done}"),
        )  # fmt: skip


def make_work(kind: str, folder: Path) -> Work:
    """A model, a text and, for distillation, a student, all in `folder`."""
    config = config_4x(vocab_size=352)
    source = folder / "source"
    if not source.exists():
        write_checkpoint(source, config, dtype=mx.bfloat16)
        (folder / "en.txt").write_text(TEXT)
    student = folder / "student"
    if kind == "distill" and not student.exists():
        convert(prepare(source, Request(QuantSpec(2, 32)), "source"), student)
    return Work(kind, source, folder / "en.txt", student)
