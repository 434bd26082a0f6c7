"""What the doctor measured of several rows is found again where it holds, and nowhere else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.backend import row_costs
from apertus_mlx.backend.metal.verdict import this_machine
from apertus_mlx.backend.row_costs import (
    RowCosts,
    find_row_costs,
    forget_row_costs,
    products_of,
    store_row_costs,
)
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.errors import ResourceError
from apertus_mlx.generation.draft_model import load_drafting
from apertus_mlx.generation.model_folder import open_folder
from apertus_mlx.generation.options import DraftOptions, RunOptions
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.system.user_folders import CACHE_VARIABLE
from tests.builders import config_4x, write_checkpoint
from tests.commands import in_process
from tests.simulated_device import MACHINE

COSTS = (1.0, 1.1, 1.3)
ENTRY = RowCosts(MACHINE, "products", "model", "today", COSTS)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder / row_costs.FILE_NAME


def test_costs_hold_for_their_machine_and_products(kept: Path) -> None:
    assert find_row_costs(MACHINE, "products") == ()
    assert store_row_costs(ENTRY) == kept
    store_row_costs(replace(ENTRY, products="others", costs=(1.0, 2.0)))
    assert find_row_costs(MACHINE, "products") == COSTS
    for change in ({"chip": "Apple M4 Max"}, {"mlx": "0.33.0"}, {"package": "9"}):
        assert find_row_costs(replace(MACHINE, **change), "products") == ()
    store_row_costs(replace(ENTRY, costs=(1.0, 1.5)))
    assert find_row_costs(MACHINE, "products") == (1.0, 1.5)
    assert find_row_costs(MACHINE, "others") == (1.0, 2.0)
    forget_row_costs()
    assert find_row_costs(MACHINE, "products") == () and not kept.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"costs": []}, {"costs": [1.0, -1]}, {"costs": [2.0]}, {"costs": [1.0, "2"]},
        {"costs": [1.0, 1e999]}, {"costs": None}, {"machine": {}}, {"machine": None},
        {"costs": [1.0] * 99},
    ],
)  # fmt: skip
def test_a_damaged_file_counts_as_nothing(
    change: dict[str, Any], kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store_row_costs(ENTRY)
    content = json.loads(kept.read_text())
    content["entries"][0] |= change
    for text in (json.dumps(content), "[", '{"format": 1}', '{"format": 9, "entries": []}'):
        kept.write_text(text)
        assert find_row_costs(MACHINE, "products") == ()
        assert "doctor --tune" in caplog.text
    store_row_costs(ENTRY)
    assert find_row_costs(MACHINE, "products") == COSTS


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(ResourceError, match=rf"cannot be written .*{CACHE_VARIABLE}"):
        store_row_costs(ENTRY)


def test_shapes_formats_and_types_are_told_apart(tmp_path: Path) -> None:
    one = take_inventory(write_checkpoint(tmp_path / "1", config_4x()))
    deeper = take_inventory(write_checkpoint(tmp_path / "2", config_4x(num_hidden_layers=3)))
    wider = take_inventory(write_checkpoint(tmp_path / "3", config_4x(intermediate_size=256)))
    path = "model.layers.0.mlp.up_proj"
    coded = replace(one.matrices[path], spec=QuantSpec(4, 64))
    quantized = replace(one, matrices={**one.matrices, path: coded})
    same = products_of(one, "float32")
    assert products_of(deeper, "float32") == same
    others = {products_of(wider, "float32"), products_of(quantized, "float32")}
    assert len({*others, products_of(one, "bfloat16"), same}) == 4


def test_a_draft_begins_with_what_the_doctor_found(tmp_path: Path, kept: Path) -> None:
    path = write_checkpoint(tmp_path / "model", config_4x(num_hidden_layers=1))
    report = json.loads(in_process("doctor", path, "--tune", "--json").stdout)
    assert report["row_costs_stored"] == str(kept)
    folder = open_folder(path)
    assert find_row_costs(this_machine(), products_of(folder.inventory, report["dtype"])) == tuple(
        report["row_costs"]
    )

    def known(**how: Any) -> str | None:
        options = DraftOptions(draft="lookup")
        drafting = load_drafting(folder, None, options, RunOptions(**how))
        assert drafting is not None
        return drafting.pace.row_costs

    assert known(compute="mlx") == "doctor"
    assert known(compute="mlx", dtype="float16") == "measured"
    assert known(compute="cpu") == "measured"
    # Through a command, whose statistics say so.
    how = ("--compute", "mlx", "-m", str(path), "--raw", "-n", "3", "--draft", "lookup", "--json")
    for row_costs_from in ("doctor", "measured"):
        said = json.loads(in_process("generate", "a b a b a b", *how).stdout)
        assert said["speculation"]["row_costs"] == row_costs_from
        assert in_process("doctor", "--reset").returncode == 0
    assert not kept.exists()
