"""Files that other tools write with their own code: each is read as its maker reads it.

The whole corpus is `benchmarks/neighbours`; here is one of each kind, the others are nightly.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.neighbours import rebuilt, with_compressed_tensors, with_mlx_lm, with_transformers
from benchmarks.neighbours.check import check, check_folder
from benchmarks.neighbours.corpus import (
    ROUNDING,
    Case,
    Values,
    leave_out,
    make,
    tell_death,
    write_base,
)
from benchmarks.neighbours.environments import ENVIRONMENTS, run

MODULES = {
    "mlx_lm": with_mlx_lm, "transformers": with_transformers,
    "compressed_tensors": with_compressed_tensors, "numpy": rebuilt,
}  # fmt: skip
DAILY = {
    "convert -q --q-mode nvfp4", "convert -q --quant-predicate mixed_3_6",
    "convert -q, single modules (as dwq and dynamic_quant)",
    "save_pretrained(variant='fp16') beside the model", "W4A16_ASYM", "FP8_BLOCK", "MXFP4A16",
    "MXFP8A16", "Unsloth, merged in 16 bits, bitsandbytes block left",
    "Unsloth, bitsandbytes 4 bits", "AutoGPTQ 0.7, 4 bits", "AutoGPTQ 0.7, 4 bits, desc_act",
    "AutoAWQ 0.2, 4 bits",
}  # fmt: skip
# What is refused, or converts only to plain weights, and what the message has to name.
REASONS = {
    "FP8_BLOCK": "a scale per 128 x 128 weights",
    "MXFP6A16": "refused: quantization_config: format 'mxfp6-pack-quantized'",
    "W7A16": "MLX has no 7-bit codes",
    "fp8 in groups of 64": "a scale per 1 x 64 weights",
    "Unsloth, bitsandbytes 4 bits": "refused: quantized by 'bitsandbytes'",
    "AutoGPTQ 0.7, 4 bits, desc_act": "columns are reordered (act-order, desc_act)",
}


def all_cases() -> Iterator[object]:
    for package, module in MODULES.items():
        # mlx-lm brings transformers along, but not the PyTorch that it writes with.
        needed = (package,) if package in ("mlx_lm", "numpy") else (package, "torch")
        lacks = pytest.mark.skipif(
            not all(map(find_spec, needed)), reason=f"{' and '.join(needed)} are not here"
        )
        for case in module.cases():
            marks = [lacks] if case.form in DAILY else [lacks, pytest.mark.nightly]
            yield pytest.param(case, id=f"{module.TOOL}: {case.form}", marks=marks)


def test_a_form_that_a_tool_refuses_is_a_row_that_says_why(tmp_path: Path) -> None:
    def fails(_: Path, folder: Path) -> Values:
        folder.mkdir()
        raise OSError(f"no {tmp_path}/x and no /usr/lib/y.so | z\nhere, {'for ever ' * 40}")

    rebuilt_one = rebuilt.cases()[0]
    make("Tool", None, [Case("form", fails), rebuilt_one], tmp_path)
    leave_out("Other", "other", [Case("form", fails)], tmp_path, "pip cannot install it")
    made, absent, refused = sorted(check(tmp_path), key=lambda row: row.result)[::-1]
    assert made.form == rebuilt_one.form and made.result == "runs as it is; values equal"
    assert absent.result == "not made: pip cannot install it"
    assert refused.result.startswith("not made: OSError: no FOLDER/x and no y.so / z here, for")
    assert refused.result.endswith(" ...") and len(refused.result) < 270
    assert {row.kind for row in (made, refused, absent)} == {"runs as it is", "not made"}
    # The next run tries it again.
    make("Tool", None, [Case("form", rebuilt_one.make)], tmp_path)
    assert [row.kind for row in check(tmp_path) if row.tool == "Tool"] == ["runs as it is"] * 2


def test_a_process_that_dies_leaves_a_row(tmp_path: Path) -> None:
    def dies(*_: Path) -> Values:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        make("Tool", None, [Case("form", dies)], tmp_path)
    reason = run(Path(sys.executable), "with_nothing", tmp_path)
    assert reason is not None and reason.startswith("ModuleNotFoundError: No module named")
    tell_death(tmp_path, reason)
    [row] = check(tmp_path)
    assert row.result.startswith("not made: the process died: ModuleNotFoundError: No module")


def test_every_tool_has_an_environment() -> None:
    folder = Path(rebuilt.__file__).parent
    modules = {path.stem for path in folder.glob("with_*.py")} | {"rebuilt"}
    assert {name for each in ENVIRONMENTS for name in each.modules} == modules
    # What is pinned is pinned to one version.
    steps = [step for each in ENVIRONMENTS for step in each.steps]
    assert all("==" in word for step in steps for word in step if not word.startswith("-"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("case", list(all_cases()))
def test_is_read_as_its_maker_reads_it(case: Case, base: Path, tmp_path: Path) -> None:
    expected = case.make(base, tmp_path / "model")
    result, fault = check_folder(tmp_path / "model", expected, ROUNDING[case.dtype])
    assert not fault
    if case.form in REASONS:
        assert REASONS[case.form] in result
        return
    assert result.startswith(("runs as it is", "converts, codes kept"))
    assert result.endswith("values equal")
