"""A file that is written is there whole or as it was."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.cli.plot import Series, save_plot
from apertus_mlx.errors import ResourceError, UsageError
from apertus_mlx.system.whole_file import sync, whole_file
from tests.daily import every


def test_a_failure_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    path.write_text("old")

    def fail() -> None:
        with whole_file(path) as beside:
            beside.write_text("half")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with whole_file(path) as beside:
        beside.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    """Not the one beside it, of which nobody knows."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "absent" / "talk.json", tmp_path / "file" / "talk.json"):
        with pytest.raises((FileNotFoundError, NotADirectoryError)) as error, whole_file(path):
            raise AssertionError("it cannot be written")
        assert error.value.filename == str(path)

    path = tmp_path / "talk.json"
    with pytest.raises(PermissionError) as raised, whole_file(path) as beside:
        raise PermissionError(errno.EACCES, "denied", str(beside))
    assert raised.value.filename == str(path)


def test_nothing_is_written_through_a_link_that_lies_beside(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / ".report.txt.unfinished.txt").symlink_to(tmp_path / "mine")
    with whole_file(tmp_path / "report.txt") as beside:
        beside.write_text("new")
    assert (tmp_path / "mine").read_text() == "precious"


def test_two_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"

    def write(text: str) -> None:
        with whole_file(path) as beside:
            beside.write_text(text)

    with whole_file(path) as beside:
        beside.write_text("half")
        with beside.open("rb") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        second = threading.Thread(target=write, args=("second",))
        second.start()
        beside.write_text("first, whole")
    second.join()
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "report.txt").symlink_to(tmp_path / "folder" / "report.txt")
    with whole_file(tmp_path / "report.txt") as beside:
        beside.write_text("new")
    assert (tmp_path / "report.txt").is_symlink()
    assert (tmp_path / "folder" / "report.txt").read_text() == "new"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The file is in place by then; only a failing drive is a failure."""
    fsync = os.fsync

    def refusing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refusing)
    try:
        with whole_file(tmp_path / "report.txt") as beside:
            beside.write_text("new")
    except OSError as error:
        assert error.errno == code == errno.EIO
    else:
        assert code != errno.EIO
    assert (tmp_path / "report.txt").read_text() == "new"


@pytest.mark.parametrize("code", [None, errno.ENOTSUP, errno.EIO])
def test_through_the_cache_of_a_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    """Where the system has a call for it, as macOS does, and the file system takes it."""
    calls: list[str] = []

    def full(descriptor: int, command: int) -> int:
        assert command == 51
        calls.append("full")
        if code is not None:
            raise OSError(code, os.strerror(code))
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full)
    monkeypatch.setattr(os, "fsync", lambda _: calls.append("plain"))
    (tmp_path / "report.txt").touch()
    sync(tmp_path / "report.txt")
    assert calls == ["plain"]
    calls.clear()
    if code == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(code)):
            sync(tmp_path / "report.txt", through_cache=True)
    else:
        sync(tmp_path / "report.txt", through_cache=True)
    assert calls == (["full", "plain"] if code == errno.ENOTSUP else ["full"])


@pytest.mark.parametrize("ending", every(3, ["svg", "png", "pdf"]))
def test_a_full_disk_leaves_no_half_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    path = tmp_path / f"curve.{ending}"
    draw = figure.savefig

    def full(self: Any, target: Path, **options: Any) -> None:
        draw(self, target, **options)
        os.truncate(target, 100)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(figure, "savefig", full)
        for before in (None, b"an older plot"):
            if before is not None:
                path.write_bytes(before)
            with pytest.raises(ResourceError, match="No space left"):
                save_plot(path, [Series("a", [1.0], [2.0])], "x", "y", "title")
            assert list(tmp_path.iterdir()) == ([] if before is None else [path])
            assert before is None or path.read_bytes() == before
    save_plot(path, [Series("a", [1.0], [2.0])], "x", "y", "title")
    assert path.read_bytes()[:4] in (b"<?xm", b"\x89PNG", b"%PDF")


def test_a_plot_is_not_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "curve.svg").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        save_plot(tmp_path / "curve.svg", [], "x", "y", "title")
