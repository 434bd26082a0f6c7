"""Kills, stops and delays ranks at random moments; none of the others may hang or answer wrongly.

    python -m benchmarks.rank_deaths --rounds 50

Two ranks on this machine answer a prompt. At a random moment after they have loaded one of them
gets SIGKILL; or SIGSTOP for good; or SIGSTOP and, a while later, SIGCONT. After the first two the
other one has to end by itself, with exit code 4 and a last line that names the rank. After the
third both have to end as if nothing had been, with the tokens of a run that nobody disturbed.
Prints counts as JSON; ends with 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.builders import config_4x, write_checkpoint
from tests.ranks import ends, start

# Seconds: the longest that a rank may take to see that another one is gone.
LIMIT_S = 30.0
KINDS = ("kill", "stop", "delay")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--pipeline", action="store_true", help="split by layers")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    counts: Counter[str] = Counter()
    slowest_s = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = config_4x(max_position_embeddings=65_536)
        command = [
            "-m", "apertus_mlx", "generate", "Hello", "--temp", "0", "--json",
            "-m", str(write_checkpoint(folder / "model", config)), "-n", str(arguments.tokens),
            *(f"--logit-bias={stop_id}=-100" for stop_id in (2, 68, 72)),
            *(["--pipeline"] if arguments.pipeline else []),
        ]  # fmt: skip
        expected = answer(ends(start(folder, [command] * 2))[0][1])
        for number in range(arguments.rounds):
            kind, rank = draw.choice(KINDS), draw.randrange(2)
            processes = start(folder, [command] * 2)
            wait_for_weights(processes[0])
            time.sleep(draw.uniform(0, 1.5))
            fault, seconds = disturb(processes, kind, rank, expected)
            slowest_s = max(slowest_s, seconds)
            counts[kind if fault is None else f"{kind}: {fault}"] += 1
            print(f"{number}: {kind} of rank {rank}: {fault or 'held'}", file=sys.stderr)
    print(json.dumps({**counts, "slowest_s": round(slowest_s, 1)}))
    sys.exit(any(":" in each for each in counts))


def disturb(
    processes: list[subprocess.Popen[str]], kind: str, rank: int, expected: list[int]
) -> tuple[str | None, float]:
    """Do it; returns what did not hold, and the seconds until the other rank had ended."""
    victim, other = processes[rank], processes[1 - rank]
    over = victim.poll() is not None
    began = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP) if not over else None
    if kind == "delay":
        time.sleep(2)
        os.kill(victim.pid, signal.SIGCONT) if not over else None
    try:
        other.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        for each in processes:
            each.kill()
        ends(processes)
        return "hung", LIMIT_S
    seconds = time.monotonic() - began
    if kind == "stop":
        victim.kill()
    found = ends(processes)
    code, _, err = found[1 - rank]
    if kind == "delay":
        same = [each[0] for each in found] == [0, 0] and answer(found[0][1]) == expected
        return None if same else "another answer", seconds
    if code == 0:  # it had its whole answer before
        whole = rank == 0 or answer(found[0][1]) == expected
        return None if whole else "another answer", seconds
    named = f"rank {rank} (127.0.0.1)" in err.splitlines()[-1]
    return (None if code == 4 and named else f"exit code {code}, {err[-200:]!r}"), seconds


def wait_for_weights(process: subprocess.Popen[str]) -> None:
    """Until then the ranks meet, for which MLX has a minute, and check that they are alike."""
    assert process.stderr is not None
    while "computing on the CPU" not in process.stderr.readline():
        pass


def answer(report: str) -> list[int]:
    ids: list[int] = json.loads(report)["token_ids"]
    return ids


if __name__ == "__main__":
    main()
