"""Runs commands as a shell does: in processes of their own, with streams as the test wants them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-P", "-m", "apertus_mlx"]


def command(
    *arguments: str | bytes | Path,
    redirect: str = "",
    stdin: bytes = b"",
    cwd: Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[bytes]:
    """Run `apertus-mlx` under `sh`, with redirections such as `>&-` or `2>/dev/full`."""
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {redirect}', "sh", *COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        timeout=120,
        check=False,
    )


def in_process(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    """The same in this process, for commands that neither signals nor redirections concern."""
    from apertus_mlx.cli import main

    given = ["apertus-mlx", *map(str, arguments)]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name, value in (("argv", given), ("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, value)
        with pytest.raises(SystemExit) as ended:
            main()
    said = []
    for stream in (out, err):
        stream.flush()
        said.append(stream.buffer.getvalue())  # type: ignore[attr-defined]
    assert isinstance(ended.value.code, int)
    return subprocess.CompletedProcess(given, ended.value.code, *said)


def refusal(done: subprocess.CompletedProcess[bytes], code: int) -> str:
    """The one line with which a command refused, and that it said nothing else."""
    lines = done.stderr.decode().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert (done.returncode, done.stdout, len(errors)) == (code, b"", 1), done
    assert "This is a bug" not in errors[0] and b"Traceback" not in done.stderr
    return errors[0]
