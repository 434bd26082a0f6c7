"""What a rank sends to the others for each token, counted at its connections (Linux).

    python -m benchmarks.rank_bytes [--ranks 2] [--vocab 131072]

The ranks run on this machine in float32, with two layers of 64 numbers, so that what the head adds
stands out. Prints as JSON the bytes that rank 0 sends for each token of an answer: where the most
likely one is taken, and where one is drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import sys
import tempfile
from collections import deque
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from apertus_mlx.backend.ranks import join
from apertus_mlx.generation.options import SamplingOptions
from apertus_mlx.generation.run import Generation
from tests.backend.rank_cases import PROMPT, load
from tests.builders import config_4x, write_checkpoint
from tests.ranks import ends, start

# Where the kernel's tcp_info has the bytes that the other end has.
_BYTES_ACKED = 120
DRAWS = {"most likely": 0.0, "drawn": 1.0}
# Of the same prompt, so that the difference is that of tokens alone.
SHORT, LONG = 8, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=131_072)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder is not None:
        found = measure(given.folder)
        if os.environ["MLX_RANK"] == "0":
            print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        heads = {"num_attention_heads": 2 * given.ranks, "num_key_value_heads": given.ranks}
        config = config_4x(vocab_size=given.vocab, head_dim=32, **heads)
        folder = write_checkpoint(Path(name) / "model", config)
        command = ["-m", "benchmarks.rank_bytes", "--folder", str(folder)]
        for code, out, err in ends(start(Path(name), [command] * given.ranks)):
            if code:
                sys.exit(err)
            print(out, end="")


def measure(folder: Path) -> dict[str, int]:
    join()
    loaded, found = load(folder), {}
    for name, temperature in DRAWS.items():
        sent = []
        for count in (SHORT, LONG):
            before = sent_bytes()
            options = SamplingOptions(max_tokens=count, temperature=temperature, top_p=1, seed=1)
            run = Generation(loaded, PROMPT, options)
            deque(run, maxlen=0)
            mx.synchronize()
            sent.append(sent_bytes() - before)
            if len(run.token_ids) != count:
                sys.exit("the answer has come to an end; take another --vocab")
        found[name] = round((sent[1] - sent[0]) / (LONG - SHORT))
    return found


def sent_bytes() -> int:
    """Of all connections of this process."""
    total = 0
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError), socket.socket(fileno=os.dup(int(path.name))) as end:
            told = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += struct.unpack_from("Q", told, _BYTES_ACKED)[0]
    return total


if __name__ == "__main__":
    main()
