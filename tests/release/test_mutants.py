"""How many faults were noticed is counted from what mutmut writes."""

from __future__ import annotations

import tomllib

import pytest

from tests.house.test_house import ROOT
from tests.release.mutants import noticed


@pytest.mark.parametrize(
    ("killed", "timeout", "survived", "no_tests", "share"),
    [(8, 1, 1, 0, 90.0), (0, 0, 0, 0, 0.0), (5, 0, 0, 5, 50.0)],
)
def test_share(killed: int, timeout: int, survived: int, no_tests: int, share: float) -> None:
    stats = {"killed": killed, "timeout": timeout, "survived": survived, "no_tests": no_tests}
    total = sum(stats.values())
    assert noticed({**stats, "segfault": 0, "total": total}) == share


def test_the_modules_and_tests_that_are_named_exist() -> None:
    """mutmut itself takes a name of nothing for no work to do."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["mutmut"]
    names = [*settings["only_mutate"], *settings["pytest_add_cli_args_test_selection"]]
    assert names and [name for name in names if not (ROOT / name).is_file()] == []
