"""Names up to what the file system allows work, though they are lengthened meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from apertus_mlx.hub.demo import model_dir
from apertus_mlx.system.beside import MAX_NAME_BYTES, beside
from apertus_mlx.system.whole_file import UNFINISHED, unfinished_path
from tests.commands import command, refusal

NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=255
).filter(lambda name: len(os.fsencode(name)) <= MAX_NAME_BYTES and name not in (".", ".."))


@given(NAMES, NAMES)
def test_what_lies_beside_has_a_name_of_its_own(name: str, other: str) -> None:
    for ending in (".partial", ".4194304.safetensors"):
        found = beside(Path("folder") / name, ending)
        assert found.parent == Path("folder") and found.name != name
        assert found.name.startswith(".") and found.name.endswith(ending)
        assert len(found.name.encode()) <= MAX_NAME_BYTES
        assert (found == beside(Path("folder") / other, ending)) == (name == other)
        if len(os.fsencode(name)) < 200:
            assert found.name == f".{name}{ending}"


@given(st.sampled_from("aé"), st.integers(1, 250))
def test_a_name_that_is_nearly_all_ending_can_be_written(letter: str, length: int) -> None:
    name = f"n.{letter * length}"[:253]
    while len(name.encode()) > MAX_NAME_BYTES:
        name = name[:-1]
    found = unfinished_path(Path("folder") / name)
    assert len(found.name.encode()) <= MAX_NAME_BYTES and UNFINISHED in found.name
    assert found.suffix == f".{letter * length}" or length * len(letter.encode()) >= 16


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_long_names_of_outputs(tmp_path: Path) -> None:
    longest = "é" * 127 + "x"
    done = command("convert", "--bits", "4", model_dir(), longest, cwd=tmp_path)
    assert done.returncode == 0, done
    assert names(tmp_path) == [longest]
    (tmp_path / longest).rename(tmp_path / "short")
    done = command(
        "generate", "hi", "-n", "2", "-m", "short", "--prompt-cache", "x" * 255, cwd=tmp_path
    )
    assert done.returncode == 0, done
    assert names(tmp_path) == ["short", "x" * 255]


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for arguments in (
        ["convert", "--bits", "4", model_dir(), "x" * 256],
        ["generate", "hi", "--prompt-cache", "x" * 256],
        ["convert", "--bits", "4", model_dir(), b"caf\xe9"],
    ):
        refusal(command(*arguments, cwd=tmp_path), 2)
    assert not names(tmp_path)
