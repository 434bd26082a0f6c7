"""Generation side by side with mlx-lm: cold start, load, prefill, decode, peak memory.

    python -m tests.benchmarks.generation MODEL_DIR [--json] [--rounds 3] [--prompt-tokens 32 256]

Each figure is the median over rounds in which both run, in turn, as fresh processes; a ratio is
the median of the rounds' ratios. `mlx-lm float32` is mlx-lm with the weights cast to float32,
which is what it would need to be right without a GPU; `mlx-lm` is what it does by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PEERS = ("ours", "mlx-lm float32", "mlx-lm")
STARTED = "BENCHMARK_STARTED"
FIGURES = {
    "cold_start_s": "cold start to first token",
    "load_s": "load",
    "prefill_tokens_per_s": "prefill",
    "decode_tokens_per_s": "decode",
    "peak_rss_bytes": "peak resident memory",
}


def main() -> None:
    """Run the peers in turn and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run = run_ours if arguments.child == "ours" else run_mlx_lm
        print(json.dumps(run(arguments)))
        return
    report = {"model": str(arguments.model), "version_s": time_version(arguments.rounds)}
    for prompt_tokens in arguments.prompt_tokens:
        report[f"prompt of {prompt_tokens}"] = measure(arguments, prompt_tokens)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, arguments.peers)


def measure(arguments: argparse.Namespace, prompt_tokens: int) -> dict[str, Any]:
    """Medians per peer, and the median ratio of each figure to ours."""
    rounds = []
    for _ in range(arguments.rounds):
        rounds.append({peer: spawn(arguments, peer, prompt_tokens) for peer in arguments.peers})
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


def spawn(arguments: argparse.Namespace, peer: str, prompt_tokens: int) -> dict[str, float]:
    """One fresh process of `peer`."""
    command = [sys.executable, "-m", "tests.benchmarks.generation", str(arguments.model)]
    command += ["--child", peer, "--prompt-tokens", str(prompt_tokens)]
    command += ["--new-tokens", str(arguments.new_tokens)]
    environment = {**os.environ, STARTED: repr(time.time()), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{peer} failed:\n{run.stderr}")
    figures: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return figures


def prompt_ids(count: int) -> list[int]:
    """A fixed prompt of ordinary tokens."""
    return [1, *((i * 7919) % 60_000 + 2000 for i in range(count - 1))]


def run_ours(arguments: argparse.Namespace) -> dict[str, float]:
    """Load and generate with this package."""
    from apertus_mlx.generate import Generation, load_speaker
    from apertus_mlx.sampling import SamplingParams

    begun = time.time()
    speaker = load_speaker(arguments.model)
    loaded = time.time()
    prompt = prompt_ids(arguments.prompt_tokens[0])
    generation = Generation(speaker, prompt, SamplingParams(temperature=0), arguments.new_tokens)
    for _ in generation:
        pass
    result = generation.result
    first_s = result.time_to_first_token_s
    return figures(
        begun, loaded, loaded + first_s, len(prompt) / first_s, result.decode_tokens_per_s
    )


def run_mlx_lm(arguments: argparse.Namespace) -> dict[str, float]:
    """Load and generate with mlx-lm, by its own functions."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    begun = time.time()
    model, _ = load(str(arguments.model))[:2]
    if arguments.child == "mlx-lm float32":
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    loaded = time.time()
    prompt = prompt_ids(arguments.prompt_tokens[0])
    stamps = []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=arguments.new_tokens):
        int(token)
        stamps.append(time.time())
    decode_s = stamps[-1] - stamps[0]
    return figures(
        begun, loaded, stamps[0], len(prompt) / (stamps[0] - loaded), (len(stamps) - 1) / decode_s
    )


def figures(
    begun: float, loaded: float, first: float, prefill: float, decode: float
) -> dict[str, float]:
    """The child's report; cold start counts from when the parent started the process."""
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "cold_start_s": first - float(os.environ[STARTED]),
        "load_s": loaded - begun,
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
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
            cells = [f"{peer} {_shown(figure, rows[peer], figure)}" for peer in peers]
            print(f"  {label}: " + "; ".join(cells))


def _shown(figure: str, row: dict[str, Any], key: str) -> str:
    value = row[key]
    unit = {"cold_start_s": "s", "load_s": "s", "peak_rss_bytes": "MB"}.get(figure, "tokens/s")
    value = value / 1e6 if unit == "MB" else value
    return f"{value:.4g} {unit} ({row['ratio_to_ours'][key]:.3g}x)"


if __name__ == "__main__":
    main()
