"""The door: regular files in their folder or in a Hub cache's blobs, of bounded size, at once."""

from __future__ import annotations

import io
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.checkpoint.config import read_config
from apertus_mlx.checkpoint.generation_config import read_generation_config
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.convert.evaluation.texts import read_texts
from apertus_mlx.convert.plan.options import read_recipe
from apertus_mlx.convert.write.copied_files import copied_files, copy_files
from apertus_mlx.convert.write.golden import GOLDEN, differing
from apertus_mlx.convert.write.manifest import MANIFEST, read_manifest
from apertus_mlx.errors import ApertusError, RejectedError
from apertus_mlx.system import model_files
from apertus_mlx.text.template import ChatTemplate
from apertus_mlx.text.tokenizer import Tokenizer
from tests.builders import config_4x, write_checkpoint

CONFIG = config_4x(num_hidden_layers=1)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def folder_in_its_place(path: Path) -> None:
    path.mkdir()


def link_out(path: Path) -> None:
    secret = path.parent.parent / "id_ed25519"
    secret.write_text("secret")
    path.symlink_to(f"../{secret.name}")


def link_in_a_circle(path: Path) -> None:
    path.symlink_to(path.name)


def broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**41)


WRONG: list[Callable[[Path], None]] = [
    fifo, device, listening, folder_in_its_place, link_out, link_in_a_circle, broken_link, huge,
]  # fmt: skip


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder, vocab_size=384, bos_token_id=1)


# What is read of a folder, and by whom.
READERS: dict[str, Callable[[Path], object]] = {
    "config.json": read_config,
    "generation_config.json": lambda folder: read_generation_config(folder, 384),
    "model.safetensors": take_inventory,
    "model.safetensors.index.json": take_inventory,
    "tokenizer.json": load_tokenizer,
    "tokenizer_config.json": lambda folder: ChatTemplate.load(folder, load_tokenizer(folder)),
    "chat_template.jinja": lambda folder: ChatTemplate.load(folder, load_tokenizer(folder)),
    "LICENSE": lambda folder: list(copied_files(folder)),
    MANIFEST: read_manifest,
    GOLDEN: lambda folder: differing(folder, read_config(folder)),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_plain_file_is_refused_by_name(
    name: str, wrong: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path / "model", CONFIG)
    (folder / name).unlink(missing_ok=True)
    wrong(folder / name)
    with pytest.raises(RejectedError) as caught:
        READERS[name](folder)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [fifo, device, listening, folder_in_its_place, huge])
@pytest.mark.parametrize(
    ("name", "read"),
    [("recipe.toml", read_recipe), ("texts.txt", lambda path: read_texts([path]))],
)
def test_files_that_the_user_names(
    name: str, read: Callable[[Path], object], wrong: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / name
    wrong(path)
    with pytest.raises(ApertusError) as caught:
        read(path)
    assert name in str(caught.value)


def test_a_users_own_file_may_be_a_link_to_anywhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x.toml").write_text("bits = 4\ngroup_size = 64\n")
    (tmp_path / "b" / "x.toml").symlink_to(tmp_path / "a" / "x.toml")
    assert read_recipe(tmp_path / "b" / "x.toml") == read_recipe(tmp_path / "a" / "x.toml")


def test_links_into_a_hub_cache_elsewhere(tmp_path: Path) -> None:
    """A folder of links to a snapshot, whose files are links themselves; its copies are files."""
    original = write_checkpoint(tmp_path / "original", CONFIG)
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    folder, copies = tmp_path / "links", tmp_path / "copies"
    for made in (repository / "blobs", snapshot, folder, copies):
        made.mkdir(parents=True)
    for path in original.iterdir():
        blob = repository / "blobs" / path.name.encode().hex()
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
        (folder / path.name).symlink_to(snapshot / path.name)
    assert take_inventory(folder).config == take_inventory(original).config
    load_tokenizer(folder)
    ids = mx.array([[1, 80, 90]])
    assert mx.array_equal(load_model(folder)(ids), load_model(original)(ids))
    copy_files(folder, copies)
    for path in copies.iterdir():
        assert not path.is_symlink() and path.read_bytes() == (original / path.name).read_bytes()
    assert (copies / "tokenizer.json").is_file()


def test_links_inside_the_folder_and_to_the_folder(tmp_path: Path) -> None:
    original = write_checkpoint(tmp_path / "original", CONFIG)
    (original / "model.safetensors").rename(original / "weights.bin")
    (original / "model.safetensors").symlink_to("weights.bin")
    (tmp_path / "link").symlink_to(original)
    assert take_inventory(tmp_path / "link").config == read_config(original)


def test_a_fifo_put_in_place_of_a_file_that_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    look = model_files.checked

    def exchange(path: Path, most_bytes: int) -> Path:
        real = look(path, most_bytes)
        path.unlink()
        os.mkfifo(path)
        return real

    monkeypatch.setattr(model_files, "checked", exchange)
    with pytest.raises(RejectedError, match="not a regular file"):
        model_files.read_file(path)


def test_a_file_with_more_than_it_says(tmp_path: Path) -> None:
    """As in /proc, where every file says that it is empty."""
    path = Path("/proc/self/status")
    if not path.exists():
        pytest.skip("no /proc here")
    with pytest.raises(RejectedError, match="at most 10 bytes"):
        model_files.read_own_file(path, 10)


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"x" * 1000)
    tracemalloc.start()
    try:
        assert model_files.read_file(path) == b"x" * 1000
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**20
    assert model_files.read_file(path, 1000) == b"x" * 1000


def test_large_files_are_copied_in_few_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    data = os.urandom(2**10) * (33 * 2**10)
    path.write_bytes(data)
    asked: list[int] = []
    opened = model_files.open_file

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            asked.append(size or -1)
            return super().read(size)

    monkeypatch.setattr(model_files, "open_file", lambda *a: Counted(opened(*a).read()))
    model_files.copy_file(path, tmp_path / "copy", 2**30)
    assert (tmp_path / "copy").read_bytes() == data
    assert len(asked) == 4


def test_a_folder_that_another_program_reads(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", CONFIG)
    model_files.check_folder(folder)
    (folder / "additional").mkdir()
    os.mkfifo(folder / "additional" / "template.jinja")
    with pytest.raises(RejectedError, match=r"template\.jinja"):
        model_files.check_folder(folder)
