"""A training step by MLX with NumPy's products beside one by PyTorch, on a CPU.

    python -m benchmarks.witness.engines [--size 5M] [--rows 8] [--steps 3]

Both train the same geometry in float32 with AdamW and clipped gradients, each in a process of its
own. Seconds of CPU count where other programs use the machine. Needs the extra `parity`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.witness.geometry import SIZES, Size
from benchmarks.witness.training import WINDOW, Plan, Trainer

ENGINES = ("mlx", "torch")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=[size.name for size in SIZES], default="5M")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine is None:
        print("| engine | seconds | of CPU |\n|---|---|---|", flush=True)
        for engine in ENGINES:
            command = [sys.executable, "-m", "benchmarks.witness.engines", "--engine", engine]
            subprocess.run([*command, *sys.argv[1:]], check=True)
        return
    [size] = [size for size in SIZES if size.name == given.size]
    step = {"mlx": with_mlx, "torch": with_torch}[given.engine](size, given.rows)
    step()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(given.steps):
        step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"| {given.engine} | {wall / given.steps:.2f} | {cpu / given.steps:.2f} |", flush=True)


def with_mlx(size: Size, rows: int) -> Callable[[], None]:
    """A step as the recipe does it."""
    ids = np.random.default_rng(0).integers(0, size.vocab_size, 1 << 17, np.uint16)
    return Trainer(Plan(size, "", 1 << 20, rows), ids, Path("none")).step


def with_torch(size: Size, rows: int) -> Callable[[], None]:
    """The same by PyTorch and transformers."""
    import torch
    from transformers import ApertusConfig, ApertusForCausalLM

    foreign = ("architectures", "model_type", "rope_scaling", "rope_theta", "torch_dtype")
    settings = {key: value for key, value in size.config.items() if key not in foreign}
    model = ApertusForCausalLM(ApertusConfig(**settings, dtype=torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, size.vocab_size, (rows, WINDOW + 1))

    def step() -> None:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, size.vocab_size), ids[:, 1:].reshape(-1)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
