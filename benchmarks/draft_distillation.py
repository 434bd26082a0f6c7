"""How often guesses of a smaller model are right before it learns from its target, and after.

    python -m benchmarks.draft_distillation [--questions 120] [--epochs 6]

The target is the embedded model; the student has its first and last layer alone, in 4 bits. The
target answers questions of its recipe at temperature 1, and teaches the student what it predicts
there. Judged is on answers to other questions, at temperature 1: a guess drawn with the same key
(over 16 keys), and the rejection rule (the sum of min(p, q), in float64).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer

from apertus_mlx.convert.distill.run import Observer, distill, make_job
from apertus_mlx.convert.distill.training import Options
from apertus_mlx.convert.evaluation.texts import Sample, read_texts
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.decode import draw_tokens
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.tools import convert_model
from benchmarks.distillation import tell
from recipes.demo.corpus import documents

TRAINING_SEED, VALIDATION_SEED, JUDGED_SEED = 31_337, 77, 805_902_117
LONGEST, WINDOW, KEYS = 32, 64, 16
KEPT_LAYERS = (0, 3)
# Tokens that end an answer of the recipe.
ENDS = (2, 68)


def prompts(seed: int) -> Iterator[list[int]]:
    """What comes before the first answer of each conversation."""
    tokenizer = Tokenizer.from_file(str(model_dir() / "tokenizer.json"))
    for document in documents(seed):
        if len(document) > 1:
            yield list(tokenizer.encode(document[0].text, add_special_tokens=False).ids)


def answered(model: LoadedModel, prompt: list[int], seed: int) -> list[int]:
    """The model's answer at temperature 1, with its end."""
    run = CachedPrefix(model.model).begin(prompt)
    params = SamplingParams(temperature=1.0, top_p=1.0, seed=seed)
    sampler = Sampler(params, prompt, model.folder.config.output_vocab_size)
    found = []
    for token in draw_tokens(run.step, run.read(), sampler, LONGEST):
        found.append(token)
        if token in ENDS:
            break
    return found


def conversations(model: LoadedModel, seed: int, count: int) -> list[tuple[list[int], list[int]]]:
    asked = islice(prompts(seed), count)
    return [(prompt, answered(model, prompt, at)) for at, prompt in enumerate(asked)]


def windows(talks: list[tuple[list[int], list[int]]]) -> np.ndarray:
    ids = [token for prompt, answer in talks for token in (*prompt, *answer)]
    return np.array(ids[: len(ids) // WINDOW * WINDOW]).reshape(-1, WINDOW)


def smaller(target: Path, out: Path) -> Path:
    """The model with two of its layers."""
    out.mkdir()
    for file in target.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": len(KEPT_LAYERS)}))
    weights = mx.load(str(target / "model.safetensors"))
    assert isinstance(weights, dict)
    kept = {}
    for name, array in weights.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in KEPT_LAYERS:
                continue
            parts[2] = str(KEPT_LAYERS.index(int(parts[2])))
        kept[".".join(parts)] = array
    mx.save_safetensors(str(out / "model.safetensors"), kept, {"format": "pt"})
    return out


def acceptance(
    model: LoadedModel, draft: LoadedModel, talks: list[tuple[list[int], list[int]]]
) -> tuple[float, float]:
    """Shares of guesses that are right on the tokens of answers: same key, rejection rule."""
    keys = mx.random.split(mx.random.key(1), KEYS)
    same, shared = [], []
    for prompt, answer in talks:
        ids = mx.array([[*prompt, *answer]])
        ours, theirs = (each.model(ids)[0, len(prompt) - 1 : -1] for each in (model, draft))
        drawn = [
            mx.stack([mx.random.categorical(row, key=key) for row in rows for key in keys])
            for rows in (ours, theirs)
        ]
        same.append(np.array(drawn[0] == drawn[1]))
        p, q = (np.exp(np.array(rows - mx.logsumexp(rows, -1, keepdims=True), np.float64))
                for rows in (ours, theirs))  # fmt: skip
        shared.append(np.minimum(p, q).sum(-1))
    return float(np.concatenate(same).mean()), float(np.concatenate(shared).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--judged", type=int, default=40, help="questions that are judged")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    started = time.process_time()
    options = RunOptions(compute="mlx", dtype="float32")
    target = open_folder(model_dir()).load(options)
    taught = conversations(target, TRAINING_SEED, arguments.questions)
    held_out = conversations(target, VALIDATION_SEED, max(4, arguments.questions // 10))
    judged = conversations(target, JUDGED_SEED, arguments.judged)
    print(f"answers after {time.process_time() - started:.0f} s", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        half = smaller(model_dir(), base / "half")
        student = base / "student"
        convert_model(half, student, bits=4, group_size=64)
        before = acceptance(target, open_folder(student).load(options), judged)
        sample = Sample(windows(taught), "answers", "", TRAINING_SEED)
        how = replace(
            Options(), epochs=arguments.epochs, learning_rate=arguments.learning_rate,
            text_share=0.0,
        )  # fmt: skip
        job = make_job(
            model_dir(), student, "apertus-demo", how, sample, windows(held_out), read_texts()
        )
        distilled = base / "distilled"
        distill(job, distilled, observer=Observer(lambda *_: None, tell, lambda *_: None))
        after = acceptance(target, open_folder(distilled).load(options), judged)
    learned, tokens = sample.windows.size, sum(len(answer) for _, answer in judged)
    seconds = time.process_time() - started
    print(f"{learned:,} tokens learned {arguments.epochs} times, {tokens} judged, {seconds:.0f} s")
    print("| | same key | rejection rule |\n|---|---|---|")
    for name, found in (("before", before), ("after", after)):
        print(f"| {name} | {found[0]:.3f} | {found[1]:.3f} |")


if __name__ == "__main__":
    main()
