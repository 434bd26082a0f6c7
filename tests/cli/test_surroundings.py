"""What a command finds around it: a folder that is gone, odd variables, too little memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from apertus_mlx.backend.cpu.threads import THREADS_VARIABLE, thread_count
from apertus_mlx.errors import UsageError
from tests.commands import COMMAND, command, refusal


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    done = subprocess.run(
        ["/bin/sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(folder), *COMMAND, "inspect"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert "current folder" in refusal(done, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("APERTUS_MLX_THREADS", "100000"),
        ("APERTUS_MLX_KERNELS", "off"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"),
    ],
)
def test_absurd_variables(name: str, value: str) -> None:
    line = refusal(command("generate", "x", **{name: value}), 2)
    assert line.startswith(f"error: {name}=")


def test_odd_terminals_do_no_harm() -> None:
    done = command("generate", "--help", COLUMNS="-9" * 20, LINES="x", TERM="\x1b[31m")
    assert (done.returncode, done.stderr) == (0, b"") and b"\x1b" not in done.stdout


@pytest.mark.parametrize("value", ["0", "-1", "x", "²", "1.5", "9" * 30, str(2**20)])
def test_counts_of_threads(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS_VARIABLE, value)
    with pytest.raises(UsageError, match=THREADS_VARIABLE):
        thread_count()
    monkeypatch.setenv(THREADS_VARIABLE, "1")
    assert thread_count() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit addresses")
def test_too_little_memory() -> None:
    """Refused before the libraries are loaded, which wait for ever where they do not fit."""
    size = 200 << 20
    done = subprocess.run(
        [*COMMAND, "generate", "x"],
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
        timeout=60,
        check=False,
    )
    assert "memory is limited to 200 MiB" in refusal(done, 5)
