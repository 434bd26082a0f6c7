"""The verdict on kernels: where it holds, how it is kept, and what a damaged one is worth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.backend.metal import enabled, verdict
from apertus_mlx.errors import ResourceError
from apertus_mlx.system.user_folders import CACHE_VARIABLE
from tests.simulated_device import (
    MACHINE,
    accepted,
    make_verdict,
    run_doctor,
    singles,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    monkeypatch.delenv(enabled.SWITCH_VARIABLE, raising=False)
    return folder / verdict.FILE_NAME


def test_a_verdict_holds_for_its_machine_and_texts_alone(cache: Path) -> None:
    kernels = singles("good", "wrong")
    mine = make_verdict(kernels, compiled_step=True)
    assert verdict.find_verdict(MACHINE, kernels) is None
    assert verdict.store_verdict(mine) == cache
    assert [file.name for file in cache.parent.iterdir()] == [cache.name]
    assert verdict.find_verdict(MACHINE, kernels) == mine
    assert verdict.find_verdict(MACHINE, kernels[::-1]) == mine
    assert accepted(MACHINE, kernels) == {"place 0": kernels[0]}
    others = (
        {"chip": "Apple M4 Max"},
        {"system": "macOS 26.3 (25D10)"},
        {"mlx": "0.32.5"},
        {"package": "0.2.0"},
    )
    for change in others:
        assert accepted(replace(MACHINE, **change), kernels) == {}
    assert accepted(MACHINE, kernels[:1]) == {}
    other_text = (replace(kernels[0], source="y[0] = 0;"), kernels[1])
    assert accepted(MACHINE, other_text) == {}


def test_the_user_hears_why_kernels_went_off(caplog: pytest.LogCaptureFixture) -> None:
    kernels = singles("good")
    verdict.store_verdict(make_verdict(kernels))
    verdict.find_verdict(MACHINE, singles("other"))
    assert not caplog.messages
    verdict.find_verdict(replace(MACHINE, mlx="0.33.0"), kernels)
    assert "MLX 0.33.0" in caplog.text and "doctor --tune" in caplog.text


def test_a_verdict_replaces_the_one_before_and_no_other() -> None:
    first, second = singles("good"), singles("fine")
    verdict.store_verdict(make_verdict(first, tuned=False))
    verdict.store_verdict(make_verdict(second))
    assert accepted(MACHINE, first) == {}
    verdict.store_verdict(make_verdict(first))
    assert accepted(MACHINE, first) == {"place 0": first[0]}
    assert accepted(MACHINE, second) == {"place 0": second[0]}
    verdict.forget_verdicts()
    assert verdict.find_verdict(MACHINE, first) is None


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{", b'{"format": 1}', b'{"format": 0, "verdicts": []}', b"\xff\xfe",
        b'{"format": 1, "verdicts": {}}', b'{"format": 1, "verdicts": [{"tuned": true}]}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_no_verdict(
    content: bytes, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernels = singles("good")
    cache.write_bytes(content)
    assert accepted(MACHINE, kernels) == {}
    assert "kernels are off" in caplog.text
    verdict.store_verdict(make_verdict(kernels))
    assert accepted(MACHINE, kernels) == {"place 0": kernels[0]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tuned", 1), ("accepted", {"place 0": "place 0-good"}), ("accepted", [1]),
        ("rejected", {"x": None}), ("machine", {"chip": "x"}), ("compiled_step", "yes"), ("new", 0),
    ],
)  # fmt: skip
def test_every_field_is_checked(key: str, value: Any, cache: Path) -> None:
    kernels = singles("good")
    verdict.store_verdict(make_verdict(kernels))
    content = json.loads(cache.read_text())
    assert accepted(MACHINE, kernels)
    content["verdicts"][0][key] = value
    cache.write_text(json.dumps(content))
    assert accepted(MACHINE, kernels) == {}


def test_a_key_that_is_not_ours_is_not_used() -> None:
    kernels = singles("good")
    verdict.store_verdict(make_verdict(kernels, accepted={"place 0": ("evil",), "else": ()}))
    assert accepted(MACHINE, kernels) == {}


def test_one_doctor_at_a_time() -> None:
    with verdict.only_doctor():
        with pytest.raises(ResourceError, match="another doctor"), verdict.only_doctor():
            pass
        done = run_doctor("--reset")
        assert done.returncode == 5 and b"another doctor" in done.stderr
    with verdict.only_doctor():
        pass


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(ResourceError, match="APERTUS_MLX_CACHE"), verdict.only_doctor():
        pass
    assert verdict.find_verdict(MACHINE, singles("good")) is None
