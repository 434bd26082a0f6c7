"""Runs commands one after the other in one process, and notes which addresses Python asks for.

    python -P tests/watched_commands.py REPORT COMMANDS

COMMANDS is a JSON list of lists of arguments. REPORT becomes a JSON list with one object a command:
its arguments, its exit code, and what it asked for (audit events of sockets, as text).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

asked: list[str] = []


def note(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook for whatever names another machine."""
    match event, arguments:
        case ("socket.connect" | "socket.sendto" | "socket.sendmsg", (_, (host, port, *_))):
            asked.append(f"{event} {host} {port}")
        case ("socket.getaddrinfo", (host, port, *_)):
            asked.append(f"{event} {host} {port}")
        case ("socket.gethostbyname" | "socket.gethostbyaddr", (host, *_)):
            asked.append(f"{event} {host}")


def run(arguments: list[str]) -> int:
    """The exit code of a command."""
    from apertus_mlx.cli import main

    sys.argv = ["apertus-mlx", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    path, commands = sys.argv[1:]
    sys.addaudithook(note)
    report = []
    for arguments in json.loads(commands):
        asked.clear()
        code = run(arguments)
        report.append({"arguments": arguments, "code": code, "asked": list(asked)})
    Path(path).write_text(json.dumps(report))
