"""Kills, stops and delays ranks at random moments; none of the others may hang or answer wrongly.

    python -m benchmarks.rank_deaths --rounds 50

Two ranks on this machine answer a prompt. At a random moment after they have loaded one of them
gets SIGKILL; or SIGSTOP for good; or SIGSTOP and, a while later, SIGCONT. After the first two the
other one has to end by itself, with exit code 4 and a last line that names the rank. After the
third both have to end as if nothing had been, with the tokens of a run that nobody disturbed.
With `--serve` they are a server that writes an answer, or is about to.
Prints counts as JSON; ends with 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from threading import Timer

from tests.builders import config_4x, write_checkpoint
from tests.ranks import ends, start

# Seconds: the longest that a rank may take to see that another one is gone.
LIMIT_S = 30.0
KINDS = ("kill", "stop", "delay")
STOP_IDS = (2, 68, 72)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--pipeline", action="store_true", help="split by layers")
    parser.add_argument("--serve", action="store_true", help="disturb a server")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    counts: Counter[str] = Counter()
    slowest_s = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = config_4x(max_position_embeddings=65_536)
        model = str(write_checkpoint(folder / "model", config))
        split = ["--pipeline"] if arguments.pipeline else []
        if arguments.serve:
            pair: Answer = Server(folder, [model, *split], arguments.tokens)
        else:
            pair = Answer(folder, ["-m", model, *split], arguments.tokens)
        pair.start()
        expected = pair.answer()
        pair.end()
        for number in range(arguments.rounds):
            kind, rank = draw.choice(KINDS), draw.randrange(2)
            pair.start()
            time.sleep(draw.uniform(0, 1.5))
            fault, seconds = disturb(pair, kind, rank, expected)
            slowest_s = max(slowest_s, seconds)
            counts[kind if fault is None else f"{kind}: {fault}"] += 1
            print(f"{number}: {kind} of rank {rank}: {fault or 'held'}", file=sys.stderr)
    print(json.dumps({**counts, "slowest_s": round(slowest_s, 1)}))
    sys.exit(any(":" in each for each in counts))


class Answer:
    """Two ranks that answer a prompt."""

    def __init__(self, folder: Path, arguments: list[str], tokens: int) -> None:
        self._folder = folder
        self._command = [
            "-m", "apertus_mlx", "generate", "Hello", "--temp", "0", "--json", *arguments,
            "-n", str(tokens), *(f"--logit-bias={stop_id}=-100" for stop_id in STOP_IDS),
        ]  # fmt: skip
        self.processes: list[subprocess.Popen[str]] = []
        self.found: list[tuple[int, str, str]] = []

    def start(self) -> None:
        """Start them, and wait until they load.

        Until then they meet, for which MLX has a minute, and check that they are alike.
        """
        self.processes = start(self._folder, [self._command] * 2)
        self._read_until("computing on the CPU")

    def _read_until(self, words: str) -> str:
        assert self.processes[0].stderr is not None
        for line in self.processes[0].stderr:
            if words in line:
                return line
        raise SystemExit(f"the ranks did not start: {ends(self.processes)}")

    def answer(self) -> object:
        """The whole answer, once it is there; None if it went wrong."""
        self.found = ends(self.processes)
        if [code for code, _, _ in self.found] != [0, 0]:
            return None
        return json.loads(self.found[0][1])["token_ids"]

    def end(self) -> None:
        """End what has not ended by itself."""

    def is_over(self, rank: int) -> bool:
        """Whether the other rank may have ended well before `rank` was disturbed."""
        return self.processes[1 - rank].returncode == 0


class Server(Answer):
    """Two ranks that serve, one request to them, and its answer."""

    def __init__(self, folder: Path, arguments: list[str], tokens: int) -> None:
        super().__init__(folder, arguments, tokens)
        self._command = ["-m", "apertus_mlx", "serve", *arguments, "--port", "0"]
        self._body = json.dumps({
            "prompt": "Hello", "max_tokens": tokens, "temperature": 0,
            "logit_bias": dict.fromkeys(STOP_IDS, -100),
        })  # fmt: skip
        self._pool = ThreadPoolExecutor()

    def start(self) -> None:
        """Start them, and ask."""
        self.processes = start(self._folder, [self._command] * 2)
        found = re.search(r":(\d+)/v1", self._read_until("serving"))
        assert found is not None
        self._asked = self._pool.submit(self._ask, self.processes[0], int(found[1]))

    def _ask(self, first: subprocess.Popen[str], port: int) -> object:
        while first.poll() is None:
            try:
                connection = HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
                kind = {"Content-Type": "application/json"}
                connection.request("POST", "/v1/completions", self._body, kind)
                reply = connection.getresponse()
                read = reply.read()
            except (OSError, HTTPException):
                time.sleep(0.1)
                continue
            if reply.status == 200:
                return json.loads(read)["choices"][0]["text"]
        return None

    def answer(self) -> object:
        """The text; then the server ends."""
        found = self._asked.result()
        self.end()
        return found if [code for code, _, _ in self.found] == [0, 0] else None

    def end(self) -> None:
        """End the server, if it has not ended by itself."""
        if self.processes[0].poll() is None:
            self.processes[0].send_signal(signal.SIGTERM)
            self.found = ends(self.processes)

    def is_over(self, rank: int) -> bool:
        """A server does not end by itself."""
        return False


def disturb(pair: Answer, kind: str, rank: int, expected: object) -> tuple[str | None, float]:
    """Do it; returns what did not hold, and the seconds until the other rank had ended."""
    victim, other = pair.processes[rank], pair.processes[1 - rank]
    over = victim.poll() is not None
    began = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP) if not over else None
    if kind == "delay":
        time.sleep(2)
        os.kill(victim.pid, signal.SIGCONT) if not over else None
        watch = Timer(LIMIT_S, lambda: [each.kill() for each in pair.processes])
        watch.start()
        same = pair.answer() == expected
        watch.cancel()
        return None if same else "another answer, or none", time.monotonic() - began
    try:
        other.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        for each in pair.processes:
            each.kill()
        ends(pair.processes)
        return "hung", LIMIT_S
    seconds = time.monotonic() - began
    victim.kill()
    found = ends(pair.processes)
    code, out, err = found[1 - rank]
    if pair.is_over(rank):  # it had its whole answer before
        whole = rank == 0 or json.loads(out)["token_ids"] == expected
        return None if whole else "another answer", seconds
    named = f"rank {rank} (127.0.0.1)" in err.splitlines()[-1]
    return (None if code == 4 and named else f"exit code {code}, {err[-200:]!r}"), seconds


if __name__ == "__main__":
    main()
