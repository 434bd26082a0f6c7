"""What the check of free space counts with is what lies on the disk at most."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.checkpoint.config import read_config
from apertus_mlx.convert.calibration import allocation
from apertus_mlx.convert.evaluation import evaluate
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.write.keep import Keep
from apertus_mlx.convert.write.workspace import partial_path
from apertus_mlx.errors import ResourceError
from tests.resumable_work import REQUESTS, make_work

# Headers of files, and what is not an array.
SMALL_BYTES = 60_000


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.nightly
def test_the_most_that_lies_beside_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make_work("target", tmp_path)
    target = tmp_path / "out"
    folder = partial_path(target)
    highest: dict[str, int] = {}
    replace = os.replace

    def watched(*arguments: Any, **named: Any) -> None:
        # The file beside and the one that it replaces are both there.
        for room in ("allocation", "calibration", "receipt-held-out"):
            highest[room] = max(highest.get(room, 0), bytes_below(folder / room))
        replace(*arguments, **named)

    monkeypatch.setattr(os, "replace", watched)
    monkeypatch.setattr(Keep, "least_s", 0.0)
    job = prepare(
        work.source, REQUESTS["target"], "source", calibration_texts=[work.text], target=target
    )
    convert(job, target)
    config = read_config(work.source)
    assert job.calibration is not None
    tokens = job.calibration.sample.windows.size
    judged = evaluate.kept_bytes(config, job.calibration.judged)
    assert 0 < highest["receipt-held-out"] <= judged + SMALL_BYTES
    beside = job.kept_bytes - judged
    assert 0.7 * beside < highest["calibration"] <= beside + SMALL_BYTES
    codes_bytes = job.plan.weight_bytes * 5 // 4
    assert highest["allocation"] <= allocation.kept_bytes(config, tokens, codes_bytes)


def test_what_lies_beside_is_in_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = make_work("gptq", tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=17 * 2**20))
    with pytest.raises(ResourceError, match=r"the output takes .* and .* beside it until it is"):
        work.run(tmp_path / "out")
    assert not partial_path(tmp_path / "out").exists()
