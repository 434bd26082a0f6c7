"""Who has only README comes by copying from nothing to answers, a converted folder and a server.

The files of the repository, an empty home, and what pip installs. Left out are blocks
that need the Hub or run the tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.docs.pages import blocks, read, shown
from tests.docs.typing_in import alike
from tests.house.test_packages import unpacked_sdist

__all__ = ["unpacked_sdist"]  # a fixture
DONE = "--- done"
LEFT_OUT = ("swiss-ai/", "pytest")
HEALTH = "http://127.0.0.1:8080/health"


class Terminal:
    """A shell in a folder, without this environment but for what finds programs and an index."""

    def __init__(self, folder: Path, home: Path) -> None:
        kept = ("PATH", "LANG", "TMPDIR", "PIP_", "SSL_")
        environment = {name: value for name, value in os.environ.items() if name.startswith(kept)}
        self._errors = home / f"{id(self)}.txt"
        self._process = subprocess.Popen(
            ["/bin/bash"], cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
            env={**environment, "HOME": str(home)},
        )  # fmt: skip

    def type(self, line: str, typed: str = "") -> str:
        """What a line prints on stdout; it has to end well."""
        stdin = f"<<'{DONE}'\n{typed}{DONE}" if typed else "</dev/null"
        self.start(f"{{ {line}; }} 2>{self._errors} {stdin}\nprintf '\\n{DONE} %s\\n' $?")
        printed = ""
        for each in self.lines():
            if each.startswith(DONE):
                assert each.split()[-1] == "0", (line, printed, self._errors.read_text("utf-8"))
                return printed[:-1]
            printed += each
        raise AssertionError(f"{line}: ended the shell")

    def start(self, line: str) -> None:
        """Type a line, and do not wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def lines(self) -> Iterator[str]:
        """What comes on stdout and stderr, as it comes."""
        assert self._process.stdout is not None
        # Not `yield from`, which would close the stream with the generator.
        for line in self._process.stdout:  # noqa: UP028
            yield line

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait(60)


@contextmanager
def terminal(folder: Path, home: Path) -> Iterator[Terminal]:
    shell = Terminal(folder, home)
    try:
        yield shell
    finally:
        shell.close()


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_copying_is_enough(unpacked_sdist: Path, tmp_path: Path) -> None:
    checkout, home = unpacked_sdist, tmp_path
    answers = []
    with terminal(checkout, home) as shell, terminal(checkout, home) as other:
        for block in blocks(read("README.md")):
            if block.file is not None:
                (checkout / block.file).write_text(block.text, "utf-8")
            if block.kind not in ("sh", "console") or any(each in block.text for each in LEFT_OUT):
                continue
            for each in shown(block):
                if each.line.endswith("apertus-mlx serve"):
                    other.start(f". .venv/bin/activate\n{each.line}")
                    next(line for line in other.lines() if line.startswith("serving "))
                    shell.type(f"curl -sf --retry 60 --retry-delay 1 --retry-all-errors {HEALTH}")
                    continue
                printed = shell.type(each.line, each.typed)
                if each.output is not None:
                    # pip tells what it does on stdout.
                    assert alike(f"...\n{each.output}", printed), (each, printed)
                if each.line.startswith("curl "):
                    answers.append(json.loads(printed)["choices"][0]["message"]["content"])
    assert answers == ["The capital of France is Paris."]
    assert (checkout / "apertus-demo-MLX-4bit" / "model.safetensors").is_file()
