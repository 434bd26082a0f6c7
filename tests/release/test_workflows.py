"""Workflows and forms are sound YAML, their actions are pinned, their commands exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.docs.pages import pipelines
from tests.docs.parsing import check
from tests.house.test_house import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
# Modules that can be run, and that a check of ours can look for.
OURS = r"(?:apertus_mlx|benchmarks|recipes|tests)\b"
NAMES = [path.name for path in WORKFLOWS]


def read(name: str) -> dict[Any, Any]:
    parsed = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text("utf-8"))
    assert isinstance(parsed, dict)
    return parsed


def steps(name: str) -> Iterator[dict[str, Any]]:
    for job in read(name)["jobs"].values():
        yield from job["steps"]


def commands(script: str) -> Iterator[list[str]]:
    """What a script runs of ours: from `apertus-mlx` or `python -m` to the end of the command."""
    # Values of the environment are numbers or folders.
    text = re.sub(r"\$[A-Z_]+", "1", script.replace("\\\n", " "))
    program = rf"(?:\S*/)?(?:apertus-mlx\"? |python3? -m (?={OURS}))"
    for found in re.finditer(program + r"[^\n|;&)]*", text):
        line = re.sub(r"(\d?>>?|<) ?\S+", "", found[0])
        for stages in pipelines(line):
            yield from stages


@pytest.mark.parametrize("name", NAMES)
def test_what_a_workflow_consists_of(name: str) -> None:
    workflow = read(name)
    # `on` is a truth value to YAML 1.1.
    assert workflow.keys() == {"name", True, "permissions", "jobs"}
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        assert set(_as_list(job.get("needs"))) <= workflow["jobs"].keys()
    for step in steps(name):
        assert ("uses" in step) != ("run" in step), step
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
            if step["uses"].startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_workflows_exist(name: str) -> None:
    for step in steps(name):
        for words in commands(step.get("run", "")):
            check(words)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_an_event_is_pasted_into_a_script(name: str) -> None:
    """A branch may be called what a shell obeys; the environment holds such names."""
    for step in steps(name):
        assert "${{ github" not in step.get("run", ""), step


def test_only_a_tag_publishes_and_only_what_was_tried() -> None:
    workflow = read("release.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == "try" and workflow["jobs"]["try"]["needs"] == "build"
    assert not any("run" in step for step in publish["steps"])


def test_parity_tests_are_found() -> None:
    """The job finds them by their text, as here."""
    [script] = [step["run"] for step in read("ci.yml")["jobs"]["parity"]["steps"] if "run" in step]
    [pattern] = re.findall(r"grep -rlE '(.+?)'", script)
    assert (
        len([p for p in ROOT.glob("tests/**/test_*.py") if re.search(pattern, p.read_text())]) > 6
    )


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form(path: Any) -> None:
    form = yaml.safe_load(path.read_text("utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    fields = [each for each in form["body"] if each["type"] != "markdown"]
    assert all(each["type"] in ("input", "textarea") for each in fields)
    assert len({each["id"] for each in fields}) == len(fields)
    for each in fields:
        for line in re.findall(r"`(apertus-mlx [^`]+)`", each["attributes"].get("description", "")):
            check(line.split())


def _as_list(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
