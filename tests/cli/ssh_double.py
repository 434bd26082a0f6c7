"""What `ssh -tt HOST COMMAND` does, on this machine: the command gets a terminal of its own."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def write(folder: Path) -> None:
    path = folder / "ssh"
    path.write_text(f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} {__file__} "$@"\n')
    path.chmod(0o755)


def main(arguments: list[str]) -> None:
    command = ["/bin/bash", "-c", arguments[-1]]
    if "-tt" not in arguments:
        os.execv(command[0], command)  # noqa: S606
    child, terminal = pty.fork()
    if child == 0:
        os.execv(command[0], command)  # noqa: S606
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sources = [0, terminal]
    while True:
        ready, _, _ = select.select(sources, [], [])
        try:
            told = os.read(terminal, 65536) if terminal in ready else b"-"
        except OSError:  # nobody writes there any more
            told = b""
        if not told:
            break
        if terminal in ready:
            os.write(1, told)
        if 0 in ready:
            typed = os.read(0, 65536)
            os.write(terminal, typed)
            sources = sources if typed else [terminal]
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)


if __name__ == "__main__":
    main(sys.argv[1:])
