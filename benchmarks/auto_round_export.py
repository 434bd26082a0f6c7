"""AutoRound's export for MLX, which runs in an environment of its own beside this package.

`quantizers` asks for it. AutoRound tunes on the windows that all methods calibrate on. Its defaults
are kept; but groups have a bias, as everywhere in MLX's format.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.neighbours.environments import ROOT, Environment, build

ENVIRONMENT = Environment("AutoRound alone", (), (("auto-round==0.16.1",),))
# Peak memory counts kilobytes on Linux, bytes on macOS.
_UNIT = 1 if sys.platform == "darwin" else 1024


def environment(folder: Path) -> Path:
    """The interpreter of AutoRound's environment, which is built if it is not there.

    Raises:
        SystemExit: pip cannot install it.
    """
    try:
        return build(ENVIRONMENT, folder)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None


def run(
    python: Path, model: Path, windows: np.ndarray, bits: int, group_size: int, place: Path
) -> tuple[Path, dict[str, float]]:
    """The folder in `place` that it has written for `model`, and what it cost.

    Raises:
        SystemExit: it failed; with its last words.
    """
    np.save(place / "windows.npy", windows)
    values = {
        "model": str(model), "bits": bits, "group_size": group_size, "place": str(place),
    }  # fmt: skip
    call = [str(python), "-m", "benchmarks.auto_round_export", json.dumps(values)]
    done = subprocess.run(
        call, cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"AutoRound failed\n{done.stderr[-2000:]}")
    cost: dict[str, float] = json.loads((place / "cost.json").read_text())
    return next((place / "made").rglob("config.json")).parent, cost


def main() -> None:
    """In that environment: what `run` describes in JSON."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given: dict[str, Any] = json.loads(sys.argv[1])
    place = Path(given["place"])
    windows = np.load(place / "windows.npy")
    model = AutoModelForCausalLM.from_pretrained(given["model"], torch_dtype=torch.bfloat16)
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
    wall, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        rounding = AutoRound(
            model, AutoTokenizer.from_pretrained(given["model"]), bits=given["bits"],
            group_size=given["group_size"], sym=False, device_map="cpu",
            dataset=[torch.from_numpy(window)[None] for window in windows.astype(np.int64)],
            seqlen=windows.shape[1], nsamples=len(windows),
        )  # fmt: skip
        rounding.quantize_and_save(str(place / "made"), format="mlx")
        os.chdir("/")
    grown_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT - before_bytes
    cost = {
        "wall_s": round(time.perf_counter() - wall, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "peak_growth_bytes": grown_bytes,
    }
    (place / "cost.json").write_text(json.dumps(cost))


if __name__ == "__main__":
    main()
