"""Clients that talk to a server for a while: long and short prompts, calls, schemas, cancels.

    python -m benchmarks.serve_load [--seconds 600] [--clients 32] [--model FOLDER]

Starts `apertus-mlx serve` and reports how streams ended, the gaps between their events, and the
server's memory. Ends with 1 unless

- all statuses and ends of streams are stated ones,
- memory grows by less than 1 MB a minute after warm-up, which is the first quarter of the run
  (asked of runs of five minutes or more: caches fill first),
- 99 of 100 gaps between the tokens of a running text are shorter than three chunks of a prompt
  take. What one takes is measured before and after: by how much it delays the next token of
  another answer.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import httpx

from tests.server.process import Process

STATED = {200, 429, 503}
MOST_GROWTH = 1e6  # bytes a minute
MOST_CHUNKS = 3
LONG_RUN_S = 290
READINGS = 6  # of prompts, to measure a chunk
WATCHED_EVERY_S = 5.0
# Kinds whose tokens come as they are made; a part of a call or of JSON may wait for another.
TEXTS = ("short", "long", "cancel")
WORDS = ("the", "city", "of", "Bern", "is", "old")
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
    text = " ".join(rng.choice(WORDS) for _ in range(words))
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": text}], "stream": True,
        "max_tokens": rng.choice([8, 32, 128]), "seed": rng.randrange(2**31),
        "temperature": rng.choice([0, 0.8]) if kind in TEXTS else rng.choice([0.8, 2]),
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
                end = await read(response, started, leave_after, counts, kind in TEXTS)
            counts.ends[f"{kind}: {end}"] += 1


async def read(
    response: httpx.Response,
    started: float,
    leave_after: int | None,
    counts: Counts,
    is_text: bool,
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
        elif is_text:
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
        await asyncio.sleep(WATCHED_EVERY_S)
        sizes.append(memory_bytes(process))


def share(values: list[float], part: float) -> float:
    """The value that `part` of all are below, in milliseconds."""
    return 1000 * sorted(values)[min(int(part * len(values)), len(values) - 1)] if values else 0.0


async def chunk_seconds(base: str) -> list[float]:
    """How long chunks of prompts delay the next token of an answer that is being written."""
    async with httpx.AsyncClient(base_url=base, timeout=300) as http:
        return await delays(http)


async def delays(http: httpx.AsyncClient) -> list[float]:
    """The same, by a client."""
    times: list[float] = []
    reading: list[tuple[float, float]] = []

    async def write() -> None:
        body = {"prompt": "The", "max_tokens": 1500, "temperature": 0, "stream": True,
                "logit_bias": {"2": -100, "68": -100, "72": -100}}  # fmt: skip
        async with http.stream("POST", "/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter())

    writing = asyncio.create_task(write())
    rng = random.Random()  # a prompt that was read before would not be read again
    while not times:
        await asyncio.sleep(0.1)
    for _ in range(READINGS):
        await asyncio.sleep(0.3)
        text = " ".join(rng.choice(WORDS) for _ in range(800))
        started = time.perf_counter()
        await http.post("/completions", json={"prompt": text, "max_tokens": 1})
        reading.append((started, time.perf_counter()))
    writing.cancel()
    inside, outside = [], []
    for before, after in itertools.pairwise(times):
        read = any(start < before and after < end for start, end in reading)
        (inside if read else outside).append(after - before)
    assert outside, "the other answer ended too soon"
    step = statistics.median(outside)
    # A prompt is made tokens of before its first chunk; until then steps go on alone.
    return [gap - step for gap in inside if gap > 2 * step] or [step]


def growth(sizes: list[int]) -> float:
    """Bytes a minute that memory grows by after warm-up: between the first and last third of it."""
    warm = sizes[len(sizes) // 4 :]
    third = max(len(warm) // 3, 1)
    minutes = WATCHED_EVERY_S * (len(warm) - third) / 60
    if not minutes:
        return 0.0
    return (statistics.median(warm[-third:]) - statistics.median(warm[:third])) / minutes


def faults(counts: Counts, sizes: list[int], chunk_s: float) -> list[str]:
    """What is not as it must be."""
    found = [end for end in counts.ends if "cut" in end or "error" in end]
    found += [f"status {code}" for code in range(600)
              if code not in STATED and counts.ends[f"status {code}"]]  # fmt: skip
    if len(sizes) * WATCHED_EVERY_S >= LONG_RUN_S and growth(sizes) > MOST_GROWTH:
        found.append(f"memory grows by {growth(sizes) / 1e6:.2f} MB a minute")
    if share(counts.gaps_s, 0.99) > 1000 * MOST_CHUNKS * chunk_s:
        found.append(f"gaps are longer than {MOST_CHUNKS} chunks of {1000 * chunk_s:.1f} ms")
    return found


async def load(base: str, process: int, seconds: float, clients: int) -> int:
    """Run all clients and print what they saw; returns the exit code."""
    async with httpx.AsyncClient(base_url=base.removesuffix("/v1")) as http:
        while (await http.get("/health?deep=1")).status_code != 200:
            await asyncio.sleep(0.2)
    before_s = await chunk_seconds(base)
    counts, sizes, until = Counts(), [], time.perf_counter() + seconds
    await asyncio.gather(
        watch(process, until, sizes),
        *(client(number, base, until, counts) for number in range(clients)),
    )
    # The machine may have become faster or slower meanwhile.
    chunk_s = statistics.median([*before_s, *await chunk_seconds(base)])
    for end, number in sorted(counts.ends.items()):
        print(f"{number:7} {end}")
    print(f"{counts.tokens / seconds:.0f} events a second in all")
    for name, values in (("first event", counts.first_s), ("gap in a text", counts.gaps_s)):
        parts = ", ".join(f"{share(values, part):.0f} ms at {part:.0%}" for part in (0.5, 0.99, 1))
        print(f"{name}: {parts}")
    print(f"a chunk of a prompt: {1000 * chunk_s:.1f} ms")
    print(f"memory, MB: {sizes[0] / 1e6:.1f} first, {sizes[-1] / 1e6:.1f} last, "
          f"{growth(sizes) / 1e6:+.2f} a minute after warm-up")  # fmt: skip
    found = faults(counts, sizes, chunk_s)
    for each in found:
        print(f"wrong: {each}")
    return 1 if found else 0


def main() -> None:
    """Start a server and load it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--model")
    parser.add_argument("--compute", default="auto", choices=["auto", "mlx", "cpu"])
    given = parser.parse_args()
    server = Process(*([given.model] if given.model else []), "--compute", given.compute)
    try:
        code = asyncio.run(load(server.base, server.pid, given.seconds, given.clients))
    finally:
        ended = server.end()
    sys.exit(code or ended)


if __name__ == "__main__":
    main()
