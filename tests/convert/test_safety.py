"""Interruptions, collisions and full disks: an output appears complete or not at all."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apertus_mlx.checkpoint.header import read_header
from apertus_mlx.convert import job as jobs
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.write import workspace
from apertus_mlx.errors import RejectedError, ResourceError, UsageError
from apertus_mlx.quant.spec import QuantSpec
from tests import convert_builders as build
from tests.daily import every

REQUEST = Request(QuantSpec(4, 64))
# mxfp4 is MLX's slowest quantization here, which leaves time to kill it.
SLOW = Request(QuantSpec(4, 32, "mxfp4"))
CHILD = """
import sys
from pathlib import Path
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.quant.spec import QuantSpec
source, target = map(Path, sys.argv[1:3])
job = prepare(source, Request(QuantSpec(4, 32, "mxfp4")), "source", max_shard_bytes=400_000)
convert(job, target, resume=True)
"""


@pytest.fixture(scope="module")
def bigger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = build.config(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    return build.write_checkpoint(tmp_path_factory.mktemp("bigger") / "in", values)


def start(source: Path, target: Path) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(target)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def bytes_in(directory: Path) -> int:
    try:
        return sum(file.stat().st_size for file in (directory / workspace.OUTPUT).iterdir())
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("rounds", every(2, [1, 2]))
def test_killed_at_random_points_leaves_nothing_and_resumes_to_the_same_bytes(
    bigger: Path, tmp_path: Path, rounds: int
) -> None:
    whole = tmp_path / "whole" / "out"
    whole.parent.mkdir()
    convert(prepare(bigger, SLOW, "source", max_shard_bytes=400_000), whole)
    expected = build.tree(whole)
    total = sum(map(len, expected.values()))
    rng = random.Random(3)
    kills = 0
    for round_number in range(rounds):
        target = tmp_path / f"round{round_number}" / "out"
        target.parent.mkdir()
        for _ in range(2 * rounds + 1):
            child = start(bigger, target)
            threshold = rng.randrange(total)
            partial = workspace.partial_path(target)
            while child.poll() is None and bytes_in(partial) < threshold:
                time.sleep(0.001)
            child.send_signal(signal.SIGKILL)
            child.communicate()
            if child.returncode == 0:
                break
            kills += 1
            assert not target.exists() or build.tree(target) == expected
        if not target.exists():
            child = start(bigger, target)
            _, errors = child.communicate()
            assert child.returncode == 0, errors
        assert build.tree(target) == expected
        assert names(target.parent) == ["out"]
    assert kills >= rounds * rounds


def test_resume_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    (tmp_path / "whole").mkdir()
    convert(prepare(source, REQUEST, "source"), tmp_path / "whole" / "out")
    job = prepare(source, REQUEST, "source")
    seen: list[int] = []

    def interrupt(done_bytes: int) -> None:
        seen.append(done_bytes)
        if done_bytes > job.plan.source_bytes // 2:
            raise KeyboardInterrupt

    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(job, target, progress=interrupt)
    assert not target.exists()
    with pytest.raises(UsageError, match="--resume"):
        convert(job, target)
    done = len(workspace.partial_path(target).joinpath(workspace.JOURNAL).read_text().splitlines())
    assert done > 5
    reads: list[str] = []
    original = jobs.Reader.raw

    def counted(self: object, tensor: object, *rows: int) -> object:
        reads.append(tensor.name)  # type: ignore[attr-defined]
        return original(self, tensor, *rows)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs.Reader, "raw", counted)
    convert(job, target, resume=True)
    assert "model.embed_tokens.weight" not in reads
    assert build.tree(target) == build.tree(tmp_path / "whole" / "out")


def test_damage_in_a_partial_output_is_found_and_redone(tmp_path: Path) -> None:
    """As after a power loss: the journal says done, the bytes never reached the disk."""
    source = build.write_checkpoint(tmp_path / "in")
    convert(prepare(source, REQUEST, "source"), tmp_path / "whole")
    job = prepare(source, REQUEST, "source")

    def interrupt(done_bytes: int) -> None:
        if done_bytes > job.plan.source_bytes // 2:
            raise KeyboardInterrupt

    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(job, target, progress=interrupt)
    shard = workspace.partial_path(target) / workspace.OUTPUT / "model.safetensors"
    with shard.open("r+b") as file:
        file.seek(len(job.plan.files[0].header) + 100)
        file.write(bytes(64))
    convert(job, target, resume=True)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (target / "model.safetensors").read_bytes() == expected


def test_another_request_does_not_continue_an_interrupted_one(tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    job = prepare(source, REQUEST, "source")

    def interrupt(done_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(job, tmp_path / "out", progress=interrupt)
    other = prepare(source, Request(QuantSpec(3, 64)), "source")
    with pytest.raises(UsageError, match="other options"):
        convert(other, tmp_path / "out", resume=True)


def test_a_second_conversion_to_the_same_output_is_refused(tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    job = prepare(source, REQUEST, "source")
    target = tmp_path / "out"
    tried: list[str] = []

    def second(done_bytes: int) -> None:
        if not tried:
            with pytest.raises(UsageError, match="running") as error:
                convert(job, target, resume=True)
            tried.append(str(error.value))

    convert(job, target, progress=second)
    assert tried
    assert target.is_dir()


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    job = prepare(source, REQUEST, "source")

    def touch(done_bytes: int) -> None:
        os.utime(source / "model.safetensors", (1, 1))

    with pytest.raises(RejectedError, match="changed"):
        convert(job, tmp_path / "out", progress=touch)
    assert names(tmp_path) == ["in"]


def test_a_source_that_shrinks_meanwhile_is_refused(tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    job = prepare(source, REQUEST, "source")
    os.truncate(source / "model.safetensors", 20_000)
    with pytest.raises(RejectedError, match="shorter"):
        convert(job, tmp_path / "out")
    assert names(tmp_path) == ["in"]


@pytest.mark.parametrize("code", every(3, [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO]))
@pytest.mark.parametrize("after", [0, 3, 20])
def test_a_disk_that_fails_leaves_nothing_but_finished_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: int
) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    before = build.tree(source)
    job = prepare(source, REQUEST, "source")
    calls = 0
    original = os.pwrite

    def failing(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code))
        return original(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(ResourceError) as caught:
        convert(job, tmp_path / "out")
    kept = after == 20
    assert names(tmp_path) == ([".out.partial"] if kept else []) + ["in"]
    assert ("--resume" in str(caught.value)) == kept
    assert build.tree(source) == before
    monkeypatch.undo()
    (tmp_path / "whole").mkdir()
    convert(job, tmp_path / "out", resume=kept)
    convert(job, tmp_path / "whole" / "out")
    assert build.tree(tmp_path / "out") == build.tree(tmp_path / "whole" / "out")


def test_space_is_checked_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    job = prepare(source, REQUEST, "source")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(ResourceError, match=r"10\.0 kB free"):
        convert(job, tmp_path / "out")
    assert names(tmp_path) == ["in"]


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    job = prepare(source, REQUEST, "source")
    target = tmp_path / "out"

    def appear(done_bytes: int) -> None:
        target.mkdir(exist_ok=True)
        (target / "mine").write_text("x")

    with pytest.raises(UsageError, match="meanwhile"):
        convert(job, target, progress=appear)
    assert build.tree(target) == {"mine": b"x"}


def test_every_shard_passes_the_safetensors_library(tmp_path: Path) -> None:
    source = build.write_checkpoint(tmp_path / "in")
    convert(prepare(source, REQUEST, "source", max_shard_bytes=50_000), tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert read_header(path)
