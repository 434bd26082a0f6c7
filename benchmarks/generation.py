"""Fresh processes beside mlx-lm's: `--version`, load, first token, speed, peak memory.

    python -m benchmarks.generation MODEL_DIR [--json] [--rounds 3] [--prompt-tokens 32 256]
        [--peers ours "mlx-lm float32" mlx-lm transformers]

Each figure is the median over rounds in which all run, in turn, as fresh processes; a ratio is
the median of the rounds' ratios. `mlx-lm float32` is mlx-lm with the weights cast to float32,
which is what it would need to be right without a GPU; `mlx-lm` is what it does by itself.
Without a GPU that last one takes minutes for each process; `--peers` spares it. transformers
computes on a GPU of Nvidia's in bfloat16 where PyTorch has one, else in float32.
`apertus-mlx bench MODEL_DIR --against mlx-lm` measures speed when both are warm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apertus_mlx.cache import FULL_PRECISION
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.generation.memory_plan import plan_memory
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.measure.bench.sides import Settings, Side
from apertus_mlx.measure.bench.workload import Task
from apertus_mlx.memory.fit import MAX_BUFFER_CACHE_BYTES

# Name -> module of the side, and the type it is told to compute in.
PEERS = {
    "ours": ("apertus_mlx.measure.bench.ours", None),
    "mlx-lm float32": ("apertus_mlx.measure.bench.peer", "float32"),
    "mlx-lm": ("apertus_mlx.measure.bench.peer", None),
    "transformers": ("benchmarks.transformers_side", None),
}
USUAL = ["ours", "mlx-lm float32", "mlx-lm"]
FIGURES = {
    "cold_start_s": "cold start to first token",
    "load_s": "load",
    "prefill_tokens_per_s": "prefill",
    "decode_tokens_per_s": "decode without a prompt",
    "decode_behind_tokens_per_s": "decode behind the prompt",
    "peak_memory_bytes": "peak memory",
}


def main() -> None:
    """Run the peers in turn and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=USUAL)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    report = {"model": str(arguments.model), "version_s": time_version(arguments.rounds)}
    for prompt_tokens in arguments.prompt_tokens:
        report[f"prompt of {prompt_tokens}"] = measure(arguments, prompt_tokens)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, arguments.peers)


def measure(arguments: argparse.Namespace, prompt_tokens: int) -> dict[str, Any]:
    """Medians per peer, and the median ratio of each figure to ours."""
    rounds: list[dict[str, dict[str, float]]] = [{} for _ in range(arguments.rounds)]
    for number, found in enumerate(rounds, 1):
        for peer in arguments.peers:
            at = f"prompt of {prompt_tokens} tokens, round {number} of {len(rounds)}: {peer}"
            print(at, file=sys.stderr, flush=True)
            found[peer] = start(peer, arguments.model, prompt_tokens, arguments.new_tokens)
    result: dict[str, Any] = {}
    for peer in arguments.peers:
        result[peer] = {
            figure: statistics.median(r[peer][figure] for r in rounds) for figure in FIGURES
        }
        result[peer]["ratio_to_ours"] = {
            figure: statistics.median(r[peer][figure] / r["ours"][figure] for r in rounds)
            for figure in FIGURES
        }
    return result


def start(peer: str, model: Path, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """The figures of one fresh process of `peer`; its cold start counts from starting it."""
    module, dtype = PEERS[peer]
    inventory = take_inventory(model)
    settings = Settings(
        directory=str(model),
        vocab_size=inventory.config.vocab_size,
        new_tokens=new_tokens,
        seed=0,
        dtype=dtype,
        compute="auto",
        precision="auto",
        form=asdict(FULL_PRECISION),
        prefill_step=plan_memory(inventory, RunOptions(), prompt_tokens + new_tokens).prefill_step,
        buffer_cache_bytes=MAX_BUFFER_CACHE_BYTES,
        wired_bytes=0,
    )
    with closing(Side(peer, [sys.executable, "-m", module], settings)) as side:
        prefill_s = side.seconds(Task("prefill", prompt_tokens))
        decode_s = side.seconds(Task("decode", 0))
        behind_s = side.seconds(Task("decode", prompt_tokens))
        return {
            "cold_start_s": side.start_s + prefill_s,
            "load_s": side.ready.load_s,
            "prefill_tokens_per_s": prompt_tokens / prefill_s,
            "decode_tokens_per_s": new_tokens / decode_s,
            "decode_behind_tokens_per_s": new_tokens / behind_s,
            "peak_memory_bytes": side.peak_memory_bytes,
        }


def time_version(rounds: int) -> dict[str, float]:
    """Seconds for `--version`, ours and mlx-lm's, in turn."""

    def once(module: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, check=True)
        return time.perf_counter() - started

    pairs = [(once("apertus_mlx"), once("mlx_lm")) for _ in range(rounds + 1)][1:]
    return {
        "ours": statistics.median(ours for ours, _ in pairs),
        "mlx-lm": statistics.median(theirs for _, theirs in pairs),
        "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
    }


def print_report(report: dict[str, Any], peers: list[str]) -> None:
    """The report as aligned text."""
    version = report.pop("version_s")
    print(f"model: {report.pop('model')}")
    print(f"--version: {version['ours']:.3f} s, mlx-lm {version['mlx-lm']:.3f} s, "
          f"ratio {version['ratio']:.3f}")  # fmt: skip
    for title, rows in report.items():
        print(f"\n{title} tokens")
        for figure, label in FIGURES.items():
            cells = [f"{peer} {_shown(figure, rows[peer])}" for peer in peers]
            print(f"  {label}: " + "; ".join(cells))


def _shown(figure: str, row: dict[str, Any]) -> str:
    value = row[figure]
    unit = {"cold_start_s": "s", "load_s": "s", "peak_memory_bytes": "MB"}.get(figure, "tokens/s")
    value = value / 1e6 if unit == "MB" else value
    return f"{value:.4g} {unit} ({row['ratio_to_ours'][figure]:.3g}x)"


if __name__ == "__main__":
    main()
