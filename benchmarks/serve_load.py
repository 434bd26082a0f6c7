"""Clients that talk to a server for a while: long and short prompts, calls, schemas, cancels.

    python -m benchmarks.serve_load [--seconds 600] [--clients 32] [--model FOLDER]

Starts `apertus-mlx serve` and reports how streams ended, the gaps between their events, and the
server's memory. Ends with 1 if a status or an end of a stream is none of the stated.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import httpx

STATED = {200, 429, 503}
TOOL = {"type": "function", "function": {"name": "now", "description": "The time"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip


class Counts:
    """What all clients have seen."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.tokens = 0
        self.gaps_s: list[float] = []
        self.first_s: list[float] = []


def request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A kind of request and its body."""
    kind = rng.choice(["short", "short", "long", "call", "schema", "cancel"])
    words = rng.choice([5, 20]) if kind != "long" else rng.choice([200, 800])
    text = " ".join(rng.choice(["the", "city", "of", "Bern", "is", "old"]) for _ in range(words))
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": text}], "stream": True,
        "max_tokens": rng.choice([8, 32, 128]), "seed": rng.randrange(2**31),
        "temperature": rng.choice([0, 0.8, 2]),
    }  # fmt: skip
    if kind == "call":
        body |= {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    if kind == "schema":
        form = {"name": "x", "schema": SCHEMA}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    return kind, body


async def client(number: int, base: str, until: float, counts: Counts) -> None:
    """Ask again and again."""
    rng = random.Random(number)
    async with httpx.AsyncClient(base_url=base, timeout=300) as http:
        while time.perf_counter() < until:
            kind, body = request(rng)
            leave_after = rng.randrange(1, 20) if kind == "cancel" else None
            started = time.perf_counter()
            async with http.stream("POST", "/chat/completions", json=body) as response:
                if response.status_code != 200:
                    counts.ends[f"status {response.status_code}"] += 1
                    await response.aread()
                    await asyncio.sleep(float(response.headers.get("retry-after", 1)))
                    continue
                end = await read(response, started, leave_after, counts)
            counts.ends[f"{kind}: {end}"] += 1


async def read(
    response: httpx.Response, started: float, leave_after: int | None, counts: Counts
) -> str:
    """Read a stream; returns how it ended."""
    last, seen = None, 0
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            return "done"
        event = json.loads(line[6:])
        if "error" in event:
            return f"error {event['error']['code']}"
        now = time.perf_counter()
        if last is None:
            counts.first_s.append(now - started)
        else:
            counts.gaps_s.append(now - last)
        last = now
        seen += 1
        counts.tokens += 1
        if leave_after is not None and seen >= leave_after:
            return "left"
    return "cut"


def memory_bytes(process: int) -> int:
    """The resident memory of a process."""
    done = subprocess.run(
        ["/bin/ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True, check=True
    )
    return 1024 * int(done.stdout)


async def watch(process: int, until: float, sizes: list[int]) -> None:
    """Note the memory, a few times a minute."""
    while time.perf_counter() < until:
        await asyncio.sleep(15)
        sizes.append(memory_bytes(process))


def share(values: list[float], part: float) -> float:
    """The value that `part` of all are below, in milliseconds."""
    return 1000 * sorted(values)[min(int(part * len(values)), len(values) - 1)] if values else 0.0


async def load(base: str, process: int, seconds: float, clients: int) -> int:
    """Run all clients and print what they saw; returns the exit code."""
    async with httpx.AsyncClient(base_url=base.removesuffix("/v1")) as http:
        while (await http.get("/health?deep=1")).status_code != 200:
            await asyncio.sleep(0.2)
    counts, sizes, until = Counts(), [], time.perf_counter() + seconds
    await asyncio.gather(
        watch(process, until, sizes),
        *(client(number, base, until, counts) for number in range(clients)),
    )
    for end, number in sorted(counts.ends.items()):
        print(f"{number:7} {end}")
    print(f"{counts.tokens / seconds:.0f} events a second in all")
    for name, values in (("first event", counts.first_s), ("gap", counts.gaps_s)):
        parts = ", ".join(f"{share(values, part):.0f} ms at {part:.0%}" for part in (0.5, 0.99, 1))
        print(f"{name}: {parts}")
    print("memory, MB, each 15 s:", *(f"{size / 1e6:.1f}" for size in sizes))
    wrong = [end for end in counts.ends if "cut" in end or "error" in end]
    wrong += [f"status {code}" for code in range(600)
              if code not in STATED and counts.ends[f"status {code}"]]  # fmt: skip
    return 1 if wrong else 0


def main() -> None:
    """Start a server and load it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--model")
    given = parser.parse_args()
    command = [sys.executable, "-P", "-m", "apertus_mlx", "serve", "--port", "0"]
    server = subprocess.Popen(
        [*command, *([given.model] if given.model else [])], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    try:
        base = ""
        while not base:
            line = server.stderr.readline()
            assert line, "the server has ended"
            base = (re.findall(r"at (http://\S+)", line) or [""])[0]
        reading = subprocess.Popen(["/bin/cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        code = asyncio.run(load(base, server.pid, given.seconds, given.clients))
    finally:
        server.terminate()
        server.wait(60)
    reading.wait(60)
    sys.exit(code)


if __name__ == "__main__":
    main()
