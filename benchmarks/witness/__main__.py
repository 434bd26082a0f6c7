"""Trains a witness: an Apertus of up to 27.5 M weights, to judge quantizers by.

    python -m benchmarks.witness FOLDER [--minutes M] [--size 27M] [--prepare]

Its text is that of manual pages, help and handbooks in more than 30 languages, from packages of
Debian 12 (`sources.py` has each with version, sum and licence); its tokens are the first ones of
the released tokenizer. The size is the largest of which a measured step says that it sees enough
tokens in the time: 8 minutes where MLX has a GPU, 30 without. FOLDER/model is the model, and
FOLDER/text/calibration and FOLDER/text/judged hold pages that it has not read:

    python -m benchmarks.quantizers --model FOLDER/model --text FOLDER/text

Start it again after a kill: packages, texts, tokens and training go on where they were. `--prepare`
stops before training, so that FOLDER (without `packages`) can go to a machine without a network.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from apertus_mlx.backend.hardware import has_gpu
from benchmarks.witness.geometry import SIZES, Size, choose, tokens_per_second
from benchmarks.witness.publishing import publish
from benchmarks.witness.sources import PACKAGES
from benchmarks.witness.tokens import Ids, fingerprint, prepare_tokens
from benchmarks.witness.training import WINDOW, Plan, Trainer, read_plan

MINUTES = {"gpu": 8.0, "cpu": 30.0}
ROWS = {"gpu": 64, "cpu": 8}
# More often a text is not read: it would be learnt by heart.
MOST_EPOCHS = 6
# Windows of each language that the held-out loss is measured on.
HELD_OUT_WINDOWS, JUDGED_WINDOWS = 1, 8


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, help="of training; default: 8, without a GPU 30")
    parser.add_argument("--size", choices=[size.name for size in SIZES], help="spares measuring")
    parser.add_argument("--prepare", action="store_true", help="text and tokens alone")
    given = parser.parse_args()
    folder: Path = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sizes = tuple(size for size in SIZES if given.size in (None, size.name))
    if given.prepare:
        print(prepare_tokens(folder, sizes[0].vocab_size))
        return
    target = folder / "model"
    if not target.exists():
        trainer = train(folder, plan_for(folder, sizes, given.minutes))
        finish(folder, trainer, target)
    print(target)


def plan_for(folder: Path, sizes: tuple[Size, ...], minutes: float | None) -> Plan:
    """The plan that is in `folder`, or a new one for the largest size that fits the time."""
    path = folder / "plan.json"
    if path.exists():
        return read_plan(path)
    device = "gpu" if has_gpu() else "cpu"
    rows = ROWS[device]
    seconds = 60 * (MINUTES[device] if minutes is None else minutes)

    def measure(size: Size) -> float:
        ids = np.random.default_rng(0).integers(0, size.vocab_size, 1 << 17, np.uint16)
        trainer = Trainer(Plan(size, "", 1 << 20, rows), ids, folder / "measured")
        return tokens_per_second(trainer.step, rows * WINDOW)

    size, speed = choose(sizes, seconds, measure)
    ids = training_ids(prepare_tokens(folder, size.vocab_size))
    tokens = min(speed * seconds, MOST_EPOCHS * len(ids))
    plan = Plan(size, fingerprint(ids), max(int(tokens / (rows * WINDOW)), 1), rows)
    plan.write(path)
    return plan


def train(folder: Path, plan: Plan) -> Trainer:
    """Follow the plan to its end."""
    tokens = prepare_tokens(folder, plan.size.vocab_size)
    ids = training_ids(tokens)
    if fingerprint(ids) != plan.ids_sha256:
        raise SystemExit(f"{folder / 'plan.json'}: is for another text than {tokens}; remove one")
    print(
        f"{plan.size.name}: {plan.size.weights:,} weights, {plan.tokens:,} tokens "
        f"({plan.tokens / len(ids):.2f} times the text)",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    trainer = Trainer(plan, ids, folder / "training")
    held_out = read_windows(tokens / "calibration.npz", plan.window, HELD_OUT_WINDOWS)
    trainer.run(np.concatenate(list(held_out.values())))
    return trainer


def finish(folder: Path, trainer: Trainer, target: Path) -> None:
    """Measure the loss of each language on judged pages, and write the model."""
    plan = trainer.plan
    tokens = folder / f"tokens-{plan.size.vocab_size}"
    judged = read_windows(tokens / "judged.npz", plan.window, JUDGED_WINDOWS)
    losses = {tag: round(trainer.held_out_loss(rows), 4) for tag, rows in judged.items()}
    receipt: dict[str, Any] = {
        "weights": plan.size.weights,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "training_text_sha256": plan.ids_sha256,
        "held_out_loss": losses,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "engine": f"MLX {mx.__version__}{', GPU' if has_gpu() else ', products by NumPy'}",
        "sources": [
            {"package": each.name, "version": each.version, "sha256": each.sha256,
             "what": each.what, "licence": each.licence}
            for each in PACKAGES
        ],
    }  # fmt: skip
    weights = dict(tree_flatten(trainer.model.parameters()))
    publish(target, plan.size.config, weights, tokens / "tokenizer.json", receipt)
    print(f"held-out loss by language: {losses}", file=sys.stderr, flush=True)
    shutil.rmtree(folder / "training", ignore_errors=True)


def training_ids(tokens: Path) -> Ids:
    """All documents' ids, one after the other."""
    ids: Ids = np.load(tokens / "training.npy", mmap_mode="r")
    return ids


def read_windows(path: Path, length: int, most: int) -> dict[str, np.ndarray]:
    """The first windows `[count, length + 1]` of each language that has one."""
    found = {}
    with np.load(path) as arrays:
        for tag in arrays.files:
            ids = arrays[tag].astype(np.int32)
            count = min((len(ids) - 1) // length, most)
            if count:
                starts = np.arange(count)[:, None] * length
                found[tag] = ids[starts + np.arange(length + 1)]
    return found


if __name__ == "__main__":
    main()
