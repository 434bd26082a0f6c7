"""Throughput and time to the first token of servers beside each other: ours and mlx-lm's.

    python -m benchmarks.serve_peers MODEL_DIR [--clients 1 4 16] [--rounds 3] [--json]

MODEL_DIR is a checkpoint with float weights, such as `benchmarks.make_checkpoint tiny` makes. They
are cast to float32 once, and both servers load that copy and compute in float32 on MLX; a third one
is ours on the CPU path, whose line is named onnxruntime. Each client streams completions of its own
prompts, greedily, one after the other. In each round the servers take turns at each number of
clients; a figure is the median over rounds, a ratio the median of the rounds' ratios. Both MLX
servers may decode as many rows as there are clients.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx

from apertus_mlx.backend.hardware import has_gpu
from tests.server.process import Process

OURS, THEIRS, CPU = "ours", "mlx-lm", "onnxruntime"
Figures = tuple[float, float]  # tokens in a second, seconds to the first token


def main() -> None:
    """Measure, and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=3, help="of each client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found: dict[int, dict[str, list[Figures]]] = {
        clients: {OURS: [], THEIRS: [], CPU: []} for clients in given.clients
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_float32(given.model, folder)
        bases = start(stack, folder, max(given.clients))
        for base in bases.values():
            asyncio.run(measure(base, 1, 1, given.prompt_tokens, given.max_tokens, -1))
        for turn in range(given.rounds):
            for clients in given.clients:
                for name in sorted(bases, reverse=bool(turn % 2)):
                    figures = asyncio.run(
                        measure(
                            bases[name], clients, given.requests, given.prompt_tokens,
                            given.max_tokens, turn,
                        )
                    )  # fmt: skip
                    found[clients][name].append(figures)
                    note = f"round {turn + 1}, {clients} clients, {name}: {figures[0]:.1f} tokens/s"
                    print(f"{note}, first after {figures[1]:.3f} s", file=sys.stderr, flush=True)
    rows = [row(clients, name, each) for clients, each in found.items() for name in each]
    device = "the GPU" if has_gpu() else "the CPU"
    if given.json:
        print(json.dumps({"device": f"MLX on {device}", "rows": rows}, indent=2))
        return
    print(f"MLX on {device}, float32. A ratio is beside mlx-lm: above 1 is faster, and sooner.\n")
    print("| clients | server | tokens/s | ratio | first token, s | ratio |")
    print("|---|---|---|---|---|---|")
    for each in rows:
        print(
            f"| {each['clients']} | {each['server']} | {each['tokens_per_s']:.1f} | "
            f"{each['rate_ratio']:.2f} | {each['first_s']:.3f} | {each['first_ratio']:.2f} |"
        )


def row(clients: int, name: str, found: dict[str, list[Figures]]) -> dict[str, Any]:
    """A line of the table: medians over rounds, and of the ratios to mlx-lm of each round."""
    pairs = list(zip(found[name], found[THEIRS], strict=True))
    return {
        "clients": clients,
        "server": name,
        "tokens_per_s": statistics.median(rate for rate, _ in found[name]),
        "rate_ratio": statistics.median(own[0] / other[0] for own, other in pairs),
        "first_s": statistics.median(first for _, first in found[name]),
        "first_ratio": statistics.median(other[1] / own[1] for own, other in pairs),
    }


def write_float32(source: Path, target: Path) -> None:
    """A copy of a checkpoint with all floats in float32; codes stay what they are."""
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            weights = mx.load(str(path))
            assert isinstance(weights, dict)
            cast = {
                name: each.astype(mx.float32) if mx.issubdtype(each.dtype, mx.floating) else each
                for name, each in weights.items()
            }
            mx.save_safetensors(str(target / path.name), cast, {"format": "pt"})
        elif path.name != "config.json":
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text("utf-8"))
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")}
    (target / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))


def start(stack: ExitStack, folder: Path, rows: int) -> dict[str, str]:
    """All servers, which end with `stack`; returns their base URLs by name."""
    bases = {}
    for name, how in ((OURS, ["mlx", "--dtype", "float32"]), (CPU, ["cpu"])):
        queue = ["--parallel", str(rows), "--max-queue", str(4 * rows)]
        process = Process(str(folder), "--compute", *how, *queue)
        stack.callback(process.end)
        bases[name] = process.base
    port = free_port()
    options = ["--port", port, "--decode-concurrency", rows, "--prompt-concurrency", rows]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", folder, *options]
    theirs = subprocess.Popen(
        [str(each) for each in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    stack.callback(theirs.wait, 60)
    stack.callback(theirs.terminate)
    bases[THEIRS] = f"http://127.0.0.1:{port}/v1"
    for base in bases.values():
        wait_for(base)
    return bases


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(base: str) -> None:
    """Until a server generates."""
    for _ in range(600):
        try:
            body = {"prompt": "a", "max_tokens": 1}
            if httpx.post(f"{base}/completions", json=body, timeout=60).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"{base} does not answer")


async def measure(
    base: str, clients: int, requests: int, prompt_tokens: int, max_tokens: int, turn: int
) -> Figures:
    """Tokens that all clients get in a second, and the median time to a first one."""
    firsts: list[float] = []

    async def client(number: int, http: httpx.AsyncClient) -> int:
        made = 0
        for each in range(requests):
            chance = random.Random(f"{turn} {clients} {number} {each}")
            made += await ask(http, prompt(chance, prompt_tokens), max_tokens, firsts)
        return made

    async with httpx.AsyncClient(base_url=base, timeout=600) as http:
        started = time.perf_counter()
        made = await asyncio.gather(*(client(number, http) for number in range(clients)))
        seconds = time.perf_counter() - started
    return sum(made) / seconds, statistics.median(firsts)


def prompt(chance: random.Random, tokens: int) -> str:
    """A text of about so many tokens, which begins like no other."""
    words = ("the", "city", "of", "Bern", "is", "old", "and", "river", "stone", "bridge")
    return " ".join([str(chance.random()), *(chance.choice(words) for _ in range(tokens))])


async def ask(http: httpx.AsyncClient, text: str, max_tokens: int, firsts: list[float]) -> int:
    """Stream one completion; notes the time to its first text, and returns its tokens."""
    body = {"prompt": text, "max_tokens": max_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    started, seen, made = time.perf_counter(), False, 0
    async with http.stream("POST", "/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if not seen and any(each.get("text") for each in event.get("choices", ())):
                seen = True
                firsts.append(time.perf_counter() - started)
            if event.get("usage"):
                made = event["usage"]["completion_tokens"]
    assert made, "no usage in the stream"
    return int(made)


if __name__ == "__main__":
    main()
