"""The rules of style: lint, format and types, each file seen once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.test_house import MODULES, ROOT


def run(*command: str) -> str:
    """What a tool prints; fails where it finds fault."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_lint_and_format(command: list[str]) -> None:
    run("ruff", *command, ".")


def test_lint_sees_each_file_once() -> None:
    seen = [Path(line) for line in run("ruff", "check", "--show-files", ".").splitlines()]
    assert len(seen) == len({path.resolve() for path in seen})
    assert set(MODULES.values()) <= {path.resolve() for path in seen}


def test_types_hold_and_each_module_is_seen_once(tmp_path: Path) -> None:
    run("mypy", "--linecount-report", str(tmp_path))
    rows = [line.split() for line in (tmp_path / "linecount.txt").read_text().splitlines()]
    # Folders of data have no lines.
    assert sorted(row[-1] for row in rows[1:] if row[1] != "0") == sorted(MODULES)


def test_coverage_sees_each_file_once(tmp_path: Path) -> None:
    """One that was imported is not listed again under the name of the folder behind the link."""
    script, data = tmp_path / "script.py", tmp_path / "data"
    script.write_text("import apertus_mlx.convert.job, apertus_mlx.quant.spec\n")
    run("coverage", "run", "--data-file", str(data), "--source", str(ROOT), str(script))
    report = run("coverage", "report", "--data-file", str(data), "--include", "*/job.py,*/spec.py")
    names = [line.split()[0] for line in report.splitlines() if ".py" in line]
    measured = [name for name in names if name.endswith(("convert/job.py", "quant/spec.py"))]
    assert len(measured) == len({(ROOT / name).resolve() for name in measured}) == 2
