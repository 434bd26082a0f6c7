"""Processes of this machine as ranks: what `mlx.launch` does, with the processes in hand."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(
    folder: Path, arguments: Sequence[Sequence[str]], **options: object
) -> list[subprocess.Popen[str]]:
    """Start `python ARGUMENTS`, of each rank its own; the hostfile is written to `folder`."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in arguments]
        ports = [each.getsockname()[1] for each in sockets]
    hosts = folder / f"hosts-{ports[0]}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    return [
        subprocess.Popen(
            [sys.executable, *each],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            **options,  # type: ignore[call-overload]
        )
        for rank, each in enumerate(arguments)
    ]


def ends(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each, without what MLX's engine says there."""
    found = []
    for process in processes:
        out, err = process.communicate()
        lines = [line for line in err.splitlines() if not line.startswith("[ring]")]
        found.append((process.returncode, out, "\n".join(lines)))
    return found
