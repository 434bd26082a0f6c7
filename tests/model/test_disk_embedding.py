"""Rows of the embedding from the file: the logits of the embedding in memory, bit by bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from apertus_mlx import convert_model, load, plan
from apertus_mlx.backend.choose import load_for
from apertus_mlx.backend.mlx import load_inventory
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.header import read_header
from apertus_mlx.checkpoint.inventory import Inventory, take_inventory
from apertus_mlx.checkpoint.rows import StoredRows
from apertus_mlx.errors import RejectedError, ResourceError, UsageError
from apertus_mlx.memory import footprint
from apertus_mlx.memory.fit import PREFILL_STEPS, fit
from apertus_mlx.memory.footprint import choose_backend
from apertus_mlx.model import kept_rows
from tests.builders import config_4x, random_weights, write_checkpoint
from tests.daily import every

CONFIG = config_4x(tie_word_embeddings=False)
PROMPT = mx.array([[1, 65, 300, 77, 300, 2, 383, 0]])
FORMS: dict[str, dict[str, Any]] = {
    **{f"affine {bits}": {"bits": bits, "group_size": 32} for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": {"mode": "mxfp4"},
    "mxfp8": {"mode": "mxfp8"},
    "nvfp4": {"mode": "nvfp4"},
}
DAILY = ("affine 3", "nvfp4")
PLAIN = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "source", CONFIG, dtype=mx.bfloat16)


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    return convert_model(source, source.with_name("q4"), bits=4, group_size=32).output


@pytest.fixture(scope="module")
def wide(source: Path) -> Path:
    """A model whose heads are wide enough for a quantized cache."""
    config = config_4x(tie_word_embeddings=False, hidden_size=128, max_position_embeddings=2048)
    folder = write_checkpoint(source.with_name("wide"), config, dtype=mx.bfloat16)
    return convert_model(folder, source.with_name("wide-q4"), bits=4, group_size=32).output


@pytest.fixture
def model(quantized: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(quantized, tmp_path / "model")


def require_equal_logits(inventory: Inventory, dtype: str | None = None) -> None:
    there, on_disk = (load_inventory(inventory, dtype, None, disk) for disk in (False, True))
    for ids in (PROMPT, PROMPT[:, 2:3], PROMPT[:, -1:], mx.concatenate([PROMPT, PROMPT + 0])):
        assert mx.array_equal(on_disk.model.embed_tokens(ids), there.model.embed_tokens(ids))
        assert mx.array_equal(on_disk(ids), there(ids))
    assert not [name for name, _ in tree_flatten(on_disk.parameters()) if "embed" in name]
    # One row by itself needs no operation of MLX, and stays what it is when the next is made.
    embeddings: list[Any] = [each.model.embed_tokens for each in (on_disk, there)]
    assert embeddings[0]._row is not None
    found, expected = ([embedding(each) for each in mx.split(PROMPT, PROMPT.size, 1)]
                       for embedding in embeddings)  # fmt: skip
    assert all(map(mx.array_equal, found, expected))
    assert found[0].dtype == expected[0].dtype


def require_equal_rows_on_the_cpu(inventory: Inventory) -> None:
    """One by one and several at a time, as MLX's rows in float32."""
    if find_spec("onnxruntime") is None:
        return
    from apertus_mlx.backend.cpu.tensors import Tensors

    rows = Tensors(inventory, "float32").embedding()
    there = load_inventory(inventory, "float32", None).model.embed_tokens
    ids = np.array(PROMPT[0])
    expected = np.array(there(PROMPT)[0].astype(mx.float32))
    assert (rows(ids) == expected).all()
    assert (np.concatenate([rows(each) for each in np.split(ids, len(ids))]) == expected).all()


@pytest.mark.parametrize(
    "form",
    [form if form in DAILY else pytest.param(form, marks=pytest.mark.nightly) for form in FORMS],
)
def test_same_logits_in_quantized_forms(source: Path, tmp_path: Path, form: str) -> None:
    folder = convert_model(source, tmp_path / "model", **FORMS[form]).output
    inventory = take_inventory(folder)
    assert inventory.matrices[layout.EMBEDDING].spec is not None
    require_equal_logits(inventory)
    require_equal_rows_on_the_cpu(inventory)
    if form == "affine 3":
        require_equal_logits(inventory, "bfloat16")


@pytest.mark.parametrize("stored", PLAIN)
def test_same_logits_in_plain_forms(tmp_path: Path, stored: str) -> None:
    weights = random_weights(CONFIG)
    folder = write_checkpoint(tmp_path / "model", CONFIG, weights, dtype=PLAIN[stored], shards=2)
    for dtype in ("float32", stored):
        require_equal_logits(take_inventory(folder), dtype)
    require_equal_rows_on_the_cpu(take_inventory(folder))


def test_the_same_answer(model: Path) -> None:
    answers = []
    for embedding in ("memory", "disk"):
        with load(model, compute="mlx", embedding=embedding) as loaded:
            answers.append(loaded.generate("Hello", max_tokens=12, temperature=0).token_ids)
    assert answers[0] == answers[1]
    assert len(answers[0]) > 1


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize(
    "options",
    every(
        2,
        [
            {"draft": "lookup"},
            {"kv_bits": 4},
            {"draft": "lookup", "kv_bits": 8},
            {"max_kv": 80},
            {"max_kv": 200, "kv_bits": 4},
        ],
    ),
    ids=str,
)
def test_the_same_answers_in_pairs(wide: Path, options: dict[str, Any], think: bool) -> None:
    """Forms of cache, drafts and thoughts, behind a stream that was closed and from a prefix."""
    told = []
    for embedding in ("memory", "disk"):
        answers: list[Any] = []
        with load(wide, compute="mlx", embedding=embedding, **options) as loaded:
            chat = loaded.chat(think=think, seed=4, max_tokens=20)
            with chat.stream("Hello, hello, hello") as pieces:
                answers.append(next(iter(pieces)))
            for question, temperature in (("And hello?", 0.0), ("Hello, hello, hello", 1.0)):
                found = chat.ask(question, temperature=temperature)
                answers.append((found.token_ids, found.reused_prompt_tokens))
        told.append(answers)
    assert told[0] == told[1]
    assert told[1][1][1]


def test_memory_is_as_planned(model: Path) -> None:
    inventory = take_inventory(model)
    backend = choose_backend(inventory, False)
    on_disk = choose_backend(inventory, False, embedding_on_disk=True)
    sizes = []
    for disk in (False, True):
        parameters = tree_flatten(load_inventory(inventory, "float32", None, disk).parameters())
        sizes.append(sum(array.nbytes for _, array in parameters))
    planned = [
        footprint(inventory, fit(inventory, 10**9, 64, backend).form, 64, 32, each).weights_bytes
        for each in (backend, on_disk)
    ]
    # Of 384 rows one is kept.
    assert [sizes[0], sizes[1] + 64 * 4] == planned
    assert planned[0] - planned[1] == 384 * (64 // 2 + 2 * 64 // 32 * 4) - 64 * 4


def test_the_latest_rows_are_kept(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as planned, and each is that of its token, whether kept, made anew or put out."""
    monkeypatch.setattr(kept_rows, "SHARE", 16)
    inventory = take_inventory(quantized)
    on_disk, there = (
        load_inventory(inventory, None, None, disk).model.embed_tokens for disk in (True, False)
    )
    reads: list[int] = []
    read_into = StoredRows.read_into

    def counted(rows: StoredRows, index: int, targets: Any) -> None:
        reads.append(index)
        read_into(rows, index, targets)

    monkeypatch.setattr(StoredRows, "read_into", counted)
    most, kept, missed = 384 // 16, list[int](), list[int]()
    # Few tokens often, many seldom.
    drawn = np.minimum(np.random.default_rng(0).geometric(0.03, 500), 383).tolist()
    before = mx.get_active_memory()
    for token in drawn:
        ids = mx.array([[token]])
        assert mx.array_equal(on_disk(ids), there(ids))
        missed += [] if token in kept else [token]
        kept = [*(each for each in kept if each != token), token][-most:]
    assert reads == missed
    assert len(set(drawn)) > 2 * most and most < len(missed) < len(drawn)
    held = mx.get_active_memory() - before
    assert held <= kept_rows.kept_bytes(384, 64, 4) + 1024


def test_a_file_system_may_give_less_at_a_time(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the rest is read as well: no byte of the row before stays."""
    pread, preadv = os.pread, os.preadv

    def few(number: int, targets: Any, offset: int) -> int:
        return preadv(number, [memoryview(targets[0])[:7]], offset)

    on_disk, there = (
        load_inventory(take_inventory(quantized), None, None, disk).model.embed_tokens
        for disk in (True, False)
    )
    monkeypatch.setattr(os, "preadv", few)
    monkeypatch.setattr(os, "pread", lambda number, size, at: pread(number, min(size, 7), at))
    for ids in [*mx.split(PROMPT, PROMPT.size, 1), PROMPT]:
        assert mx.array_equal(on_disk(ids), there(ids))


def replaced(path: Path) -> None:
    data = path.read_bytes()
    path.rename(path.with_name("old"))
    path.write_bytes(data)


def touched(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def shortened(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("change", [replaced, touched, shortened, Path.unlink])
@pytest.mark.parametrize("compute", ["mlx", "cpu"])
def test_a_file_that_changes_is_an_error(
    model: Path, change: Callable[[Path], None], compute: Any
) -> None:
    if compute == "cpu":
        pytest.importorskip("onnxruntime")
    loaded = load_for(take_inventory(model), compute, embedding="disk")
    one = PROMPT[:, :1]
    mx.eval(loaded(PROMPT), loaded(one))
    change(model / "model.safetensors")
    # The row of `one` is kept.
    for ids in (one, PROMPT):
        with pytest.raises(RejectedError, match=r"model\.safetensors: was changed while the mod"):
            loaded(ids)


def test_a_file_that_was_cut_off_before_it_is_opened(model: Path) -> None:
    """After its header was read: then it has not changed since, and ends too early."""
    inventory = take_inventory(model)
    stored = inventory.matrices[layout.EMBEDDING]
    sizes = [tensor.size_bytes // tensor.shape[0] for tensor in stored.tensors]
    last = max(tensor.offset + tensor.size_bytes for tensor in stored.tensors)
    os.truncate(model / "model.safetensors", last - 1)
    rows = StoredRows(inventory.checkpoint, stored.tensors)
    ends = r"model\.safetensors: ends before model\.embed_tokens\.[a-z]+ does; .*, fetch or conv"
    with pytest.raises(RejectedError, match=ends):
        rows.read([0, stored.rows - 1])
    with pytest.raises(RejectedError, match=ends):
        rows.read_into(stored.rows - 1, [bytearray(size) for size in sizes])
    with pytest.raises(RejectedError, match=ends):
        load_inventory(inventory, None, None, True)


def test_the_cpu_path_has_it_on_disk_in_any_case(model: Path) -> None:
    pytest.importorskip("onnxruntime")
    inventory = take_inventory(model)
    there, on_disk = (load_for(inventory, "cpu", embedding=kind) for kind in ("memory", "disk"))
    assert mx.array_equal(there(PROMPT), on_disk(PROMPT))


def test_a_tied_embedding_stays_in_memory(tmp_path: Path) -> None:
    config = config_4x(tie_word_embeddings=True)
    folder = write_checkpoint(tmp_path / "model", config, dtype=mx.bfloat16)
    for compute in ("mlx", "cpu"):
        with pytest.raises(UsageError, match="--embedding disk: the head of"):
            load(folder, embedding="disk", compute=compute)
    assert plan(folder).embedding_on_disk_saves_bytes == 0


def test_a_row_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.embed_tokens.weight"][300, 5] = np.nan
    folder = write_checkpoint(tmp_path / "model", CONFIG, weights)
    loaded = load_inventory(take_inventory(folder), None, None, True)
    mx.eval(loaded(mx.array([[1, 299]])))
    for ids in (PROMPT, PROMPT[:, 2:3]):
        with pytest.raises(RejectedError, match=r"embed_tokens\.weight: a value is not finite"):
            loaded(ids)


def test_a_scale_that_is_not_finite_is_refused(model: Path) -> None:
    loaded = load_inventory(take_inventory(model), None, None, True)
    mx.eval(loaded(PROMPT))
    scales = next(t for t in read_header(model / "model.safetensors")
                  if t.name == "model.embed_tokens.scales")  # fmt: skip
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(scales.offset + 300 * scales.size_bytes // 384)
        file.write(b"\x80\x7f")
    for ids in (PROMPT, PROMPT[:, 2:3]):
        loaded = load_inventory(take_inventory(model), None, None, True)
        with pytest.raises(RejectedError, match=r"embed_tokens\.scales: a value is not finite"):
            loaded(ids)


def test_the_planner_offers_it(model: Path) -> None:
    inventory = take_inventory(model)
    backend = choose_backend(inventory, True)
    least = [
        footprint(inventory, each.form, 64, each.prefill_step, each.backend).total_bytes
        for each in (
            fit(inventory, 10**9, 64, choose_backend(inventory, True, embedding_on_disk=disk),
                prefill_step=PREFILL_STEPS[-1])
            for disk in (True, False)
        )
    ]  # fmt: skip
    between = sum(least) // 2
    with pytest.raises(ResourceError, match="what would fit: --embedding disk"):
        fit(inventory, between, 64, backend, prefill_step=PREFILL_STEPS[-1])
    found = plan(model, device=f"{between / 1e6}MB", context=64, kv_bits=16, prefill_step=32)
    assert found.best is not None
    assert found.advice.startswith("best that fits: --embedding disk ")
    saved = inventory.matrices[layout.EMBEDDING].weight_bytes(found.compute_bytes)
    assert found.embedding_on_disk_saves_bytes == saved - 64 * found.compute_bytes
