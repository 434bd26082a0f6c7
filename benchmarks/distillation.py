"""What distillation wins back: a quantized model before and after, beside mlx-lm's plain rounding.

    python -m benchmarks.distillation [--bits 2 3] [--tokens 131072] [--epochs 2]

The embedded model teaches its own 2- and 3-bit forms, which `convert --method gptq` made (groups of
64, bfloat16 scales and biases). Documents are those of the model's recipe; calibration, training,
held-out and judged windows come from different seeds, and nothing else ever uses the last of them.
Every model is judged by the same float32 arithmetic, against the original. The bar is mlx-lm's
rounding with one bit more. Where other programs use the machine, OPENBLAS_NUM_THREADS=1 is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from apertus_mlx.checkpoint import layout
from apertus_mlx.convert.calibration.calibrated import Calibration
from apertus_mlx.convert.distill.run import Job, Observer, distill, make_job
from apertus_mlx.convert.distill.training import Options, Validation
from apertus_mlx.convert.evaluation.layerwise import Weights, head_path, hidden_states, open_weights
from apertus_mlx.convert.evaluation.texts import Sample, read_texts
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.quant import metrics
from apertus_mlx.quant.spec import QuantSpec
from recipes.demo.corpus import documents

EMBEDDED = model_dir()
GROUP_SIZE = 64
CALIBRATION_SEED, TRAINING_SEED, HELD_OUT_SEED, JUDGED_SEED = 5, 31_337, 77, 805_902_117
CALIBRATION_WINDOWS, HELD_OUT_WINDOWS, JUDGED_WINDOWS, WINDOW = 48, 16, 48, 256


def recipe(seed: int, count: int) -> Sample:
    """Windows of documents from the recipe of the embedded model, one document after the other."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    stream = documents(seed)
    ids: list[int] = []
    while len(ids) < count * WINDOW:
        for segment in next(stream):
            ids += tokenizer.encode(segment.text, add_special_tokens=False).ids
    return Sample(np.array(ids[: count * WINDOW]).reshape(count, WINDOW), "recipe", "", seed)


def stock(bits: int, folder: Path) -> Path:
    """What mlx-lm makes of the model."""
    from mlx_lm import convert as stock_convert

    target = folder / f"mlx-lm-{bits}-bits"
    if not target.exists():
        # It talks on stdout, where the table goes.
        with contextlib.redirect_stdout(sys.stderr):
            stock_convert(
                str(EMBEDDED), str(target), quantize=True, q_bits=bits, q_group_size=GROUP_SIZE
            )
    return target


def make_student(bits: int, folder: Path) -> Path:
    job = prepare(EMBEDDED, Request(QuantSpec(bits, GROUP_SIZE), method="gptq"), "apertus-demo")
    assert job.calibration is not None
    sample = recipe(CALIBRATION_SEED, CALIBRATION_WINDOWS)
    return convert(
        replace(job, calibration=Calibration(sample, job.calibration.judged)),
        folder / f"{bits}-bits",
    )


def make_lesson(student: Path, arguments: argparse.Namespace) -> Job:
    options = Options(
        trained=arguments.train,
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        text_share=arguments.text_share,
    )
    return make_job(
        EMBEDDED, student, "apertus-demo", options,
        recipe(TRAINING_SEED, arguments.tokens // WINDOW),
        recipe(HELD_OUT_SEED, HELD_OUT_WINDOWS).windows, read_texts(),
    )  # fmt: skip


def logits(weights: Weights, windows: np.ndarray) -> np.ndarray:
    hidden = hidden_states(weights, [windows])[0]
    return hidden.reshape(-1, hidden.shape[-1]) @ weights.matrix(head_path(weights.config)).T


def folder_logits(folder: Path, windows: np.ndarray) -> np.ndarray:
    with Reader(folder) as reader:
        return logits(open_weights(folder, reader), windows)


def tell(done: int, total: int, loss: float, history: Sequence[Validation]) -> None:
    if history[-1].tokens == done:
        print(
            f"{done:,} of {total:,} tokens, loss {loss:.4f}, held-out divergence "
            f"{history[-1].held_out_divergence:.4f}",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=Options().learning_rate)
    parser.add_argument("--text-share", type=float, default=0.0)
    parser.add_argument("--train", choices=["weights", "scales"], default="weights")
    arguments = parser.parse_args()
    judged = recipe(JUDGED_SEED, JUDGED_WINDOWS).windows
    unknown = np.full(judged.size, -1)
    silent = Observer(lambda *_: None, tell, lambda *_: None)
    with Reader(EMBEDDED) as reader, tempfile.TemporaryDirectory() as scratch:
        original = open_weights(EMBEDDED, reader)
        reference = logits(original, judged)

        def divergence(found: np.ndarray) -> float:
            return metrics.summarise(metrics.compare(reference, found, unknown)).kl_mean

        def rounded(bits: int) -> float:
            return divergence(folder_logits(stock(bits, Path(scratch)), judged))

        print("| bits | bytes | tokens | minutes | KL before | KL after | top-1 | mlx-lm rounding |"
              " with one bit more (bar) | reached |")  # fmt: skip
        print("|---" * 10 + "|", flush=True)
        for bits in arguments.bits:
            spec = QuantSpec(bits, GROUP_SIZE)
            matrices = layout.matrices(original.config)
            size = sum(spec.weight_bytes(m.rows, m.columns, 2) for m in matrices)
            student = make_student(bits, Path(scratch))
            before = divergence(folder_logits(student, judged))
            started = time.perf_counter()
            target = Path(scratch) / f"{bits}-bits-distilled"
            outcome = distill(make_lesson(student, arguments), target, observer=silent)
            minutes = (time.perf_counter() - started) / 60
            found = metrics.summarise(
                metrics.compare(reference, folder_logits(target, judged), unknown)
            )
            bar = rounded(bits + 1)
            print(
                f"| {bits} | {size:,} | {outcome.history[-1].tokens:,} | {minutes:.1f} | "
                f"{before:.5f} | {found.kl_mean:.5f} | {found.top1_agreement:.4f} | "
                f"{rounded(bits):.5f} | {bar:.5f} | {'yes' if found.kl_mean <= bar else 'no'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
