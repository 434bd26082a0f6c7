"""The version stands in one place, and a tag is compared with all that names it."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from apertus_mlx import __version__
from tests.house.test_house import ROOT
from tests.release.check_tag import problems

CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-12-01\n"
CITATION = "title: x\nversion: 1.2.3\n"


def test_the_builder_reads_the_version_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert "version" not in project and "version" in project["dynamic"]
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "version"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == __version__


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


@pytest.mark.parametrize(
    ("tag", "version", "wrong"),
    [("v1.2.3", "1.2.3", 0), ("v1.2.4", "1.2.3", 1), ("1.2.3", "1.2.3", 1), ("v1.2.4", "1.2.4", 2)],
)
def test_a_tag(tag: str, version: str, wrong: int) -> None:
    assert len(problems(tag, version, CHANGELOG, CITATION)) == wrong


def test_a_section_without_a_date_is_none() -> None:
    assert problems("v1.2.3", "1.2.3", CHANGELOG.replace("-12-01", ""), CITATION)
