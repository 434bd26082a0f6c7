"""Whatever moment a kill comes at: nothing half, nothing left elsewhere, and it goes on."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.convert.check.verify import verify
from apertus_mlx.convert.write.manifest import MANIFEST
from apertus_mlx.convert.write.workspace import partial_path
from apertus_mlx.errors import UsageError
from tests.convert_builders import tree
from tests.resumable_work import KINDS, make_work

# All that changes which files there are, or says that one is whole.
CALLS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "pwrite")
KILLS_EACH = 5


class Moments:
    """Calls something at every moment before and after a change of the files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seize: Callable[[int], None]) -> None:
        self.count = 0
        self._seize = seize
        self._busy = False
        for name in CALLS:
            monkeypatch.setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            self._next()
            try:
                return call(*arguments, **named)
            finally:
                self._next()

        return watched

    def _next(self) -> None:
        if not self._busy:
            self._busy = True
            self._seize(self.count)
            self._busy = False
            self.count += 1


@pytest.mark.parametrize(
    "kind",
    # What trains or calibrates takes as long as all other tests of conversion.
    [pytest.param(kind, marks=[pytest.mark.nightly] * (kind != "plain")) for kind in KINDS],
)
def test_a_kill_at_any_moment_loses_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill would leave is copied at random moments of one run; each copy then goes on."""
    monkeypatch.setattr("apertus_mlx.convert.distill.resources.BATCH_TOKENS", 128)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    work = make_work(kind, tmp_path)
    places = [tmp_path / name for name in ("whole", "killed")]
    for place in places:
        place.mkdir()
    with monkeypatch.context() as patch:
        moments = Moments(patch, lambda _: None)
        work.run(places[0] / "out")
    expected = tree(places[0] / "out")
    assert not verify(places[0] / "out").errors
    if kind == "tuned":
        record = json.loads((places[0] / "out" / MANIFEST).read_text())["tuning"]
        assert record["own_windows"] > 4 and record["tokens_seen"] > 0
    draw = random.Random(kind)
    chosen = set(draw.sample(range(moments.count), KILLS_EACH))
    copies: list[Path] = []

    def seize(moment: int) -> None:
        if moment in chosen:
            copy = tmp_path / f"moment-{moment}"
            shutil.copytree(places[1], copy)
            copies.append(copy)

    with monkeypatch.context() as patch:
        Moments(patch, seize)
        work.run(places[1] / "out")
    assert len(copies) == KILLS_EACH
    for copy in copies:
        target = copy / "out"
        assert {path.name for path in copy.iterdir()} <= {"out", partial_path(target).name}
        assert not target.exists() or tree(target) == expected
        for torn in partial_path(target).rglob("*.unfinished*"):
            os.truncate(torn, draw.randint(0, torn.stat().st_size))
        partial = partial_path(target)
        if target.exists() and partial.exists() and not any(partial.iterdir()):
            # Nothing says any more which run it was, so that this is an output like any other.
            with pytest.raises(UsageError, match="is not empty"):
                work.run(target, resume=True)
        elif partial.exists() or not target.exists():
            work.run(target, resume=True)
        assert tree(target) == expected
        assert [path.name for path in copy.iterdir()] == ["out"]
    assert not list((tmp_path / "tmp").iterdir())
