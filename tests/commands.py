"""Runs commands as a shell does: in processes of their own, with streams as the test wants them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def refusal(done: subprocess.CompletedProcess[bytes], code: int) -> str:
    """The one line with which a command refused, and that it said nothing else."""
    lines = done.stderr.decode().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert (done.returncode, done.stdout, len(errors)) == (code, b"", 1), done
    assert "This is a bug" not in errors[0] and b"Traceback" not in done.stderr
    return errors[0]
