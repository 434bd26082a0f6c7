"""The folder in which an output is built: its journal, what lies in the way, and its room."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from apertus_mlx.convert.write.target import check_space
from apertus_mlx.convert.write.workspace import (
    JOURNAL,
    OUTPUT,
    clear_published,
    how_to_go_on,
    is_published,
    open_workspace,
    partial_path,
)
from apertus_mlx.errors import RejectedError, ResourceError, UsageError
from apertus_mlx.system.foreign_errors import explain

PRINT = "f" * 64


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An output that was interrupted after two steps and with something that took long."""
    target = tmp_path / "out"
    with (  # noqa: PT012 - the work is what is interrupted
        pytest.raises(KeyboardInterrupt),
        open_workspace(target, PRINT, False) as workspace,
    ):
        workspace.follow("steps")
        for step in (0, 1):
            workspace.record(step, 7 + step)
        (workspace.kept_folder("calibration") / "deep").mkdir()
        (workspace.kept_folder("calibration") / "codes").write_bytes(b"codes")
        raise KeyboardInterrupt
    return target


def test_a_journal_says_how_far_it_is(target: Path) -> None:
    with open_workspace(target, PRINT, True) as workspace:
        workspace.follow("steps")
        assert workspace.done == {0: 7, 1: 8}
        workspace.follow("other steps")
        assert not workspace.done


def test_what_another_plan_wrote_is_not_published(target: Path) -> None:
    output = partial_path(target) / OUTPUT
    (output / "model-00002-of-00002.safetensors").write_bytes(b"stale")
    with open_workspace(target, PRINT, True) as workspace:
        workspace.follow("steps")
        assert [path.name for path in output.iterdir()] == ["model-00002-of-00002.safetensors"]
        workspace.follow("other steps")
        (workspace.path / "model.safetensors").write_bytes(b"weights")
        workspace.publish()
    assert [path.name for path in target.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["rmtree", "mkdir"])
def test_a_kill_while_another_plan_begins(
    target: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A finished output goes for another plan; then the first plan is asked for again."""
    output = partial_path(target) / OUTPUT
    (output / "model.safetensors").write_bytes(b"weights")
    with (partial_path(target) / JOURNAL).open("a") as journal:
        journal.write("complete\n")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with (  # noqa: PT012 - the first line may not fail
        pytest.raises(KeyboardInterrupt),
        open_workspace(target, PRINT, True) as workspace,
        monkeypatch.context() as patch,
    ):
        assert workspace.is_complete
        patch.setattr(*((shutil, name) if name == "rmtree" else (Path, name)), killed)
        workspace.follow("other steps")
    with open_workspace(target, PRINT, True) as workspace:
        workspace.follow("steps")
        assert not workspace.is_complete and not workspace.done
        assert not list(output.iterdir())


@pytest.mark.parametrize("left", [0, 1, 20])
def test_a_torn_journal_starts_again(target: Path, left: int) -> None:
    journal = partial_path(target) / JOURNAL
    journal.write_bytes(journal.read_bytes()[:left])
    with pytest.raises(UsageError, match="--resume"), open_workspace(target, PRINT, False):
        pass
    with open_workspace(target, PRINT, True) as workspace:
        assert {path.name for path in workspace.folder.iterdir()} == {JOURNAL, OUTPUT}
        workspace.follow("steps")
        assert not workspace.done


def test_a_torn_last_line_is_a_step_that_was_not_finished(target: Path) -> None:
    journal = partial_path(target) / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-3])
    with open_workspace(target, PRINT, True) as workspace:
        workspace.follow("steps")
        assert workspace.done == {0: 7}
        workspace.record(1, 8)
        assert journal.read_text().endswith("0 00000007\n1 00000008\n")


@pytest.mark.parametrize("kind", ["fifo", "link", "folder", "none"])
def test_a_journal_that_is_no_file_of_ours(target: Path, tmp_path: Path, kind: str) -> None:
    """Neither waited for, nor written through, nor removed."""
    journal = partial_path(target) / JOURNAL
    (tmp_path / "precious").write_text(journal.read_text())
    journal.unlink()
    if kind == "fifo":
        os.mkfifo(journal)
    elif kind == "link":
        journal.symlink_to(tmp_path / "precious")
    elif kind == "folder":
        journal.mkdir()
    before = (tmp_path / "precious").read_bytes()
    for resume in (False, True):
        with pytest.raises(UsageError, match="not ours"), open_workspace(target, PRINT, resume):
            pass
    assert (tmp_path / "precious").read_bytes() == before
    assert (partial_path(target) / "calibration" / "codes").exists()


def test_a_partial_folder_that_is_taken_away(target: Path) -> None:
    with (  # noqa: PT012 - either line may fail
        pytest.raises(ResourceError, match="taken away") as caught,
        open_workspace(target, PRINT, True) as workspace,
    ):
        shutil.rmtree(workspace.folder)
        (workspace.path / "model.safetensors").write_bytes(b"")
    assert "--resume" not in str(caught.value)


def test_a_refusal_before_any_work_leaves_nothing(tmp_path: Path) -> None:
    with (  # noqa: PT012 - a folder alone is no work
        pytest.raises(RejectedError, match=r"^damaged$"),
        open_workspace(tmp_path / "out", PRINT, False) as workspace,
    ):
        workspace.kept_folder("calibration")
        raise RejectedError("damaged")
    assert not list(tmp_path.iterdir())


def test_a_refusal_after_long_work_keeps_it(target: Path) -> None:
    with (
        pytest.raises(RejectedError, match="damaged; --resume"),
        open_workspace(target, PRINT, True),
    ):
        raise RejectedError("damaged")
    assert (partial_path(target) / "calibration" / "codes").exists()


@pytest.mark.parametrize("cut", [KeyboardInterrupt(), RuntimeError("ours"), MemoryError()])
def test_how_to_go_on_is_said_once(
    target: Path, caplog: pytest.LogCaptureFixture, cut: BaseException
) -> None:
    caplog.set_level("INFO", "apertus_mlx")
    with pytest.raises(type(cut)), open_workspace(target, PRINT, True):
        raise cut
    assert caplog.text.count(how_to_go_on(partial_path(target))) == 1


@pytest.mark.parametrize(
    ("code", "named"), [(errno.ENOSPC, None), (errno.EBUSY, "shard"), (errno.ENOMEM, None)]
)
def test_what_a_disk_does_to_a_run(target: Path, code: int, named: str | None) -> None:
    """As `foreign_errors` says it of any file, with the folder where the system names none."""
    error = OSError(code, os.strerror(code), named)
    with pytest.raises(ResourceError) as caught, open_workspace(target, PRINT, True):
        raise error
    assert (named or str(partial_path(target))) in str(caught.value)
    meant = explain(OSError(code, os.strerror(code), named or str(partial_path(target))))
    assert str(caught.value) == f"{meant}; {how_to_go_on(partial_path(target))}"


def test_a_run_that_was_killed_with_its_last_breath(tmp_path: Path) -> None:
    """The output has its name; only the journal was still there."""
    target = tmp_path / "out"
    with open_workspace(target, PRINT, False) as workspace:
        workspace.follow("steps")
        kept = (workspace.folder / JOURNAL).read_text() + "complete\n"
        (workspace.path / "model.safetensors").write_bytes(b"weights")
        workspace.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    folder = partial_path(target)
    for other in ((PRINT, "other steps"), ("e" * 64, "steps")):
        folder.mkdir(exist_ok=True)
        (folder / JOURNAL).write_text(kept)
        assert not is_published(target, *other)
    assert is_published(target, PRINT, "steps") and is_published(target, PRINT)
    target.rename(tmp_path / "elsewhere")
    assert not is_published(target, PRINT)
    target.mkdir()
    assert not is_published(target, PRINT)
    target.rmdir()
    (tmp_path / "elsewhere").rename(target)
    clear_published(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # Nor is it in the way of a new one, once the output is gone.
    folder.mkdir()
    (folder / JOURNAL).write_text(kept)
    shutil.rmtree(target)
    with open_workspace(target, "e" * 64, False) as workspace:
        workspace.publish()


def test_what_is_there_already_needs_no_room(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (partial_path(target) / OUTPUT / "model.safetensors").open("wb") as file:
        file.write(bytes(2**20))
    usage = shutil.disk_usage(target.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=17 * 2**20))
    check_space(target, 2**20, 2**20)
    with pytest.raises(ResourceError, match=r"17.8 MB free, the output takes 2.1 MB and 2.1 MB"):
        check_space(target, 2 * 2**20, 2 * 2**20)


def test_room_is_counted_while_another_process_clears_up(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lstat = Path.lstat

    def clearing(path: Path) -> os.stat_result:
        if path.name == "codes":
            path.unlink()
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", clearing)
    check_space(target, 1, 1)
    assert not (partial_path(target) / "calibration" / "codes").exists()


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    locked: list[int] = []

    def refusing(descriptor: int, _: int) -> None:
        locked.append(descriptor)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refusing)
    with (
        pytest.raises(ResourceError, match=r"locks no folders.*choose another output"),
        open_workspace(tmp_path / "out", PRINT, False),
    ):
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(locked[0])
    assert not list(tmp_path.iterdir())


def test_publishing_goes_through_the_cache_of_a_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda file, _: flushed.append(os.fstat(file).st_ino))
    with open_workspace(tmp_path / "out", PRINT, False) as workspace:
        workspace.follow("steps")
        shard = workspace.path / "model.safetensors"
        shard.write_bytes(b"weights")
        of_ours = [shard.stat().st_ino, (workspace.folder / JOURNAL).stat().st_ino]
        flushed.clear()
        workspace.publish()
    assert flushed == of_ours
