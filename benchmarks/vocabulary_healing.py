"""What a cut vocabulary costs the embedded model, and what learning from the whole one wins back.

    python -m benchmarks.vocabulary_healing [--vocab 1024] [--bits 4] [--tokens 32768] [--epochs 1]

The embedded model is quantized whole, and cut and quantized; the cut one then learns from the whole
one in 16 bits. Documents are those of the model's recipe; training, held-out and judged windows
come from different seeds. KL is from the whole model, in nats at the borders that both
vocabularies have (`apertus_mlx.convert.vocabulary.matching`). Nats a byte are what the text
itself costs a model that reads it in its own tokens, so that they compare vocabularies.
Where other programs use the machine, OPENBLAS_NUM_THREADS=1 is faster.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apertus_mlx import convert_model
from apertus_mlx.convert.distill import resources
from apertus_mlx.convert.distill.run import Observer, distill, make_job
from apertus_mlx.convert.distill.training import Options, Validation
from apertus_mlx.convert.evaluation.layerwise import head_path, hidden_states, open_weights
from apertus_mlx.convert.evaluation.texts import Sample, Tokens, open_text, read_texts
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.vocabulary.matching import match
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.quant.arrays import Float32
from apertus_mlx.quant.metrics import compare, join, log_softmax
from recipes.demo.corpus import documents

WHOLE = model_dir()
TRAINING_SEED, HELD_OUT_SEED, JUDGED_SEED = 31_337, 77, 805_902_117
WINDOW, HELD_OUT_WINDOWS, JUDGED_WINDOWS = 256, 4, 32


def main() -> None:
    """Cut, heal, and print a line for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1 << 15)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--batch-tokens", type=int, default=512, help="more steps of fewer tokens")
    given = parser.parse_args()
    resources.BATCH_TOKENS = given.batch_tokens
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = convert_model(WHOLE, folder / "whole", bits=given.bits).output
        cut = convert_model(WHOLE, folder / "cut", bits=given.bits, vocab=given.vocab).output
        print(line("whole, 16 bits", WHOLE), flush=True)
        print(line(f"whole, {given.bits} bits", whole), flush=True)
        print(line(f"{given.vocab} tokens, {given.bits} bits", cut), flush=True)
        options = Options(epochs=given.epochs, learning_rate=given.learning_rate)
        began = time.process_time()
        seen = heal(cut, folder / "healed", options, given.tokens)
        print(line("healed", folder / "healed"))
        print(f"learned from {seen:,} tokens in {time.process_time() - began:.0f} s of the CPU")


def recipe(folder: Path, seed: int, count: int) -> Tokens:
    """Windows of documents from the recipe of the embedded model, in the tokens of `folder`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stream = documents(seed)
    ids: list[int] = []
    while len(ids) < count * WINDOW:
        for segment in next(stream):
            ids += tokenizer.encode(segment.text, add_special_tokens=False).ids
    return np.array(ids[: count * WINDOW]).reshape(count, WINDOW)


def heal(student: Path, target: Path, options: Options, tokens: int) -> int:
    """Let a cut model learn from the whole one; how many tokens it saw."""
    windows = recipe(student, TRAINING_SEED, tokens // WINDOW)
    sample = Sample(windows, "recipe", "", TRAINING_SEED)
    held_out = recipe(student, HELD_OUT_SEED, HELD_OUT_WINDOWS)
    # The receipt that a distillation writes is on the short texts in the package.
    job = make_job(WHOLE, student, "apertus-demo", options, sample, held_out, read_texts())
    silent = Observer(lambda *_: None, show, lambda *_: None)
    return distill(job, target, observer=silent).history[-1].tokens


def show(done: int, total: int, loss: float, history: Sequence[Validation]) -> None:
    held_out = history[-1].held_out_divergence
    print(f"\r{done:,}/{total:,} tokens, loss {loss:.4f}, held out {held_out:.4f}   ", end="",
          file=sys.stderr, flush=True)  # fmt: skip


def line(name: str, folder: Path) -> str:
    divergence, agreement, nats = judge(folder)
    return f"{name:20} KL {divergence:.4f} nats, top-1 {agreement:.1%}, {nats:.4f} nats a byte"


def judge(folder: Path) -> tuple[float, float, float]:
    """Divergence from the whole model at common borders, agreement, and nats a byte of text."""
    windows = recipe(folder, JUDGED_SEED, JUDGED_WINDOWS)
    matching = match(WHOLE, folder)
    found = logits(folder, windows)
    if matching is None:
        expected, places = logits(WHOLE, windows), np.indices(windows.shape).reshape(2, -1)
    else:
        reading = matching.read(windows)
        places = np.array(reading.borders)
        expected = logits(WHOLE, reading.whole)
    parts = []
    for window in range(len(windows)):
        tokens = places[1][places[0] == window]
        if matching is None:
            wanted = expected[window, tokens]
        else:
            wanted = matching.logits(expected[window, reading.places[window, tokens]])
        parts.append(compare(wanted, found[window, tokens], np.full(len(tokens), -1)))
    errors = join(parts)
    losses = -np.take_along_axis(
        log_softmax(found[:, :-1]), windows[:, 1:, None].astype(np.int64), axis=-1
    )
    tokenizer, _ = open_text(folder)
    size = sum(len(tokenizer.token_bytes(i)) for i in windows[:, 1:].ravel().tolist())
    return errors.divergence.mean(), errors.agrees.mean(), losses.sum() / size


def logits(folder: Path, windows: Tokens) -> Float32:
    with Reader(folder) as reader:
        weights = open_weights(folder, reader)
        head = weights.matrix(head_path(weights.config))
        [states] = hidden_states(weights, [windows])
        return np.asarray(states @ head.T)


if __name__ == "__main__":
    main()
