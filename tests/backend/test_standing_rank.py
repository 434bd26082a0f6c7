"""A rank that stands still ends the others, whatever call of MLX they wait in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders import config_4x, write_checkpoint
from tests.house.test_house import MODULES
from tests.ranks import ends, start

CASES = ["a prompt", pytest.param("the end of limits", marks=pytest.mark.nightly)]


@pytest.mark.parametrize("case", CASES)
def test_the_other_rank_ends(tmp_path: Path, case: str) -> None:
    model = write_checkpoint(tmp_path / "model", config_4x())
    command = ["-m", "tests.backend.standing_rank", case, str(model)]
    first, second = start(tmp_path, [command] * 2)
    [(code, _, err)] = ends([second])
    first.kill()
    ends([first])
    assert code == 4, err
    assert err == "error: rank 0 (127.0.0.1) has been silent for 1 s; all ranks end"


def test_calls_in_which_no_thread_runs_stand_in_one_place() -> None:
    rooms = ("backend", "cache", "cli", "generation", "model", "server")
    calls = ("mx.clear_cache(", "mx.set_cache_limit(")
    found = {
        name
        for name, path in MODULES.items()
        if name.startswith(tuple(f"apertus_mlx.{room}." for room in rooms))
        and any(call in path.read_text() for call in calls)
    }
    assert found == {"apertus_mlx.backend.memory_limits"}
