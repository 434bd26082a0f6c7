"""The random conversations of `cache_sequences`, many of them, also with real signals.

    python benchmarks/interrupted_chats.py COMPUTE SEQUENCES [FIRST_SEED]

Half of the sequences are interrupted between bytecodes, half by a signal at a random time. Prints
what was played and the largest difference from a fresh run, in units of its largest logit.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from apertus_mlx.generation.model_folder import open_folder
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.generation.run import Piece
from tests.builders import config_4x, write_checkpoint
from tests.cache_sequences import FORMS, Counts, Play

STEPS = 6
LONGEST_S = 0.05


class SignalledPlay(Play):
    """Interrupted by a timer, wherever the program is then."""

    def interrupt(self, pieces: Iterable[Piece]) -> None:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, LONGEST_S))
        try:
            deque(pieces, maxlen=0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def main(compute: str, sequences: int, first: int = 0) -> None:
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    counts = {"bytecode": Counts(), "signal": Counts()}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        config = config_4x(num_attention_heads=2, head_dim=32, max_position_embeddings=4096)
        model = write_checkpoint(Path(folder) / "model", config)
        loaded = open_folder(model).load(RunOptions(dtype="float32", compute=compute))  # type: ignore[arg-type]
        for seed in range(first, first + sequences):
            form = list(FORMS)[seed // 2 % len(FORMS)]
            kind = ("bytecode", "signal")[seed % 2]
            play = (Play, SignalledPlay)[seed % 2]
            try:
                play(loaded, FORMS[form], seed, counts[kind], Path(folder)).play(STEPS)
            except Exception as error:
                failures.append(f"{form}, {kind}, seed {seed}: {type(error).__name__} {error}")
                print(failures[-1], flush=True)
            if seed % 500 == 499:
                print(seed + 1 - first, counts, flush=True)
    print(compute, {kind: asdict(count) for kind, count in counts.items()})
    print(f"{len(failures)} failures")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
