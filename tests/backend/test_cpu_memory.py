"""What the CPU path holds: an upper bound, refused in its own sizes, reported as its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from apertus_mlx.backend import hardware
from apertus_mlx.cache import FULL_PRECISION, CacheConfig
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.checkpoint.inventory import Inventory, take_inventory
from apertus_mlx.checkpoint.layout import matrices
from apertus_mlx.cli.app import app
from apertus_mlx.errors import ResourceError
from apertus_mlx.generation.memory_plan import plan_memory
from apertus_mlx.generation.model_folder import open_folder
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.generation.run import Generation
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.memory import fit, footprint, parse_size
from apertus_mlx.memory.cpu import weights_bytes
from apertus_mlx.memory.footprint import CPU_PATH, GPU_16_BIT, choose_backend
from apertus_mlx.quant.spec import QuantSpec
from tests.builders import config_4x, planned_inventory
from tests.daily import every

MEASURED = json.loads((Path(__file__).parents[1] / "data" / "cpu_memory.json").read_text())
FORMS = {
    "full": FULL_PRECISION, "8 bits": CacheConfig(8, 8), "4 bits": CacheConfig(4, 4),
    "full, at most 512": CacheConfig(bound=512),
    "4 bits, at most 512": CacheConfig(4, 4, bound=512),
}  # fmt: skip


def half_billion(bits: int | None) -> Inventory:
    """The 0.5B with the tokenizer of `benchmarks.make_checkpoint`."""
    config = parse_config(
        config_4x(
            hidden_size=1024, intermediate_size=6144, num_hidden_layers=20, head_dim=64,
            num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True,
            vocab_size=131_072, max_position_embeddings=4096,
        )
    )  # fmt: skip
    spec = QuantSpec(bits, 64) if bits else None
    return planned_inventory("0.5B", config, spec, tokenizer_bytes=3_888_468)


def test_no_measured_run_took_more_than_is_planned() -> None:
    """Resident peaks of fresh processes, recorded by `benchmarks.cpu_memory`."""
    ratios = []
    for run in MEASURED["runs"]:
        inventory = half_billion(run["bits"])
        backend = choose_backend(inventory, on_gpu=False, cpu=run["precision"])
        context = run["prompt_tokens"] + MEASURED["new_tokens"]
        planned = footprint(inventory, FORMS[run["form"]], context, run["step"], backend)
        ratios.append(planned.total_bytes / run["held_bytes"])
    assert len(ratios) >= 20
    assert min(ratios) >= 1 and max(ratios) < 1.25


@pytest.mark.parametrize("tokens", every(2, [700, 40]))
def test_a_run_stays_within_its_plan(tokens: int) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is Linux's")
    pytest.importorskip("onnxruntime")
    command = [sys.executable, "-m", "apertus_mlx", "generate", "--raw", "--compute", "cpu",
               "--json", "-n", "4", "a " * (tokens // 2)]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["peak_memory_bytes"] <= found["memory"]["total_bytes"]


def test_weights_by_hand() -> None:
    """Codes, and for each group four bytes for scales, offsets and sums of codes."""
    weights = sum(m.rows * m.columns for m in matrices(half_billion(4).config))
    for bits, precision, stored_bits, numbers in (
        (2, "auto", 2, 3), (3, "auto", 4, 3), (4, "auto", 4, 3), (5, "auto", 8, 3),
        (6, "auto", 8, 3), (2, "float32", 4, 2), (8, "float32", 8, 3), (8, "int8", 8, 3),
    ):  # fmt: skip
        found = weights_bytes(half_billion(bits), precision)[0]
        assert found == weights * stored_bits // 8 + 4 * numbers * weights // 64
    assert weights_bytes(half_billion(None), "auto")[0] == 4 * weights


def size_after(word: str, refused: pytest.ExceptionInfo[ResourceError]) -> int:
    """The size that a message names behind `word`, in bytes."""
    number, unit = str(refused.value).split(word)[1].split()[:2]
    return parse_size(f"{number} {unit}", "")


def test_advice_is_what_helps_on_this_path() -> None:
    """At 3 bits it holds what it holds at 4, so only 2 bits help there."""
    for bits in (4, 3):
        with pytest.raises(ResourceError, match=r"at 2 bits .* convert --bits 2 ") as refused:
            fit(half_billion(bits), 450_000_000, 1009, CPU_PATH)
        assert "libraries and tokenizer 219.7 MB, weights" in str(refused.value)
        fit(half_billion(2), size_after("from ", refused), 512, CPU_PATH)
    with pytest.raises(ResourceError) as refused:
        fit(half_billion(2), 200_000_000, 1009, CPU_PATH)
    assert "convert" not in str(refused.value)
    limit = size_after("from ", refused)
    fit(half_billion(2), limit, 512, CPU_PATH)
    with pytest.raises(ResourceError):
        fit(half_billion(2), limit - 10**6, 512, CPU_PATH)
    # Where MLX computes, 3 bits are smaller than 4.
    with pytest.raises(ResourceError, match="convert --bits 3 "):
        fit(half_billion(4), 225_000_000, 1009, GPU_16_BIT)


@pytest.fixture
def beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if MLX had a GPU, on which nothing runs."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 2**40})
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 41_100)
    monkeypatch.setattr(mx, "set_wired_limit", lambda size: size)


@pytest.mark.usefixtures("beside_a_gpu")
def test_the_peak_is_that_of_who_computes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    loaded = open_folder(model_dir()).load(RunOptions(compute="cpu"))
    assert not loaded.model.on_gpu
    run = Generation(loaded, [1, 100, 200], SamplingOptions(temperature=0, max_tokens=2))
    list(run)
    assert run.answer.peak_memory_bytes > 50_000_000
    assert hardware.peak_bytes(True) == 41_100
    app(["generate", "hi", "--compute", "cpu", "-n", "2", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["peak_memory_bytes"] > 50_000_000


@pytest.mark.usefixtures("beside_a_gpu")
def test_a_gpu_beside_the_cpu_path_plans_nothing_of_it() -> None:
    pytest.importorskip("onnxruntime")
    inventory = take_inventory(model_dir())
    chosen: Any = plan_memory(inventory, RunOptions(compute="cpu", precision="int8"), 100)
    assert chosen.backend.cpu == "int8"
    assert chosen.limit_bytes < 2**39
    assert chosen.wired_bytes == 0
    assert chosen.footprint.process_bytes > 50_000_000
