"""A GPU with memory of its own: what is planned, named and kept there, on a simulated one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from apertus_mlx.backend import hardware
from apertus_mlx.backend.cpu.model import CPUModel
from apertus_mlx.backend.mlx import load_model
from apertus_mlx.cache import FULL_PRECISION, CacheConfig
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.cli.app import app
from apertus_mlx.generation import memory_plan
from apertus_mlx.generation.decode import prefill
from apertus_mlx.generation.memory_plan import describe_plan, find_device, memory_limit, plan_memory
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.measure.doctor import facts
from apertus_mlx.memory import fit
from apertus_mlx.memory.footprint import CARD_16_BIT, choose_backend, footprint
from apertus_mlx.model.embedding import ProductEmbedding
from apertus_mlx.quant.spec import QuantSpec
from tests.builders import config_4x, planned_inventory, random_weights, write_checkpoint
from tests.metal_cases import released
from tests.simulated_gpu import MAC, NAME, simulated_card, simulated_mac

GB = 10**9


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


# GB that MLX 0.32.4 had in use at most on an H100 80GB (2026-11-26) for a prompt of 2,048 tokens,
# by model, bits and prefill step.
PEAKS = [
    ("0.5B", 16, 512, 1.1), ("0.5B", 16, 2048, 1.7), ("8B", 16, 512, 17.6), ("8B", 16, 2048, 21.7),
    ("8B", 4, 512, 6.6), ("8B", 4, 2048, 11.5),
]  # fmt: skip


@pytest.fixture
def card() -> Iterator[pytest.MonkeyPatch]:
    with simulated_card() as patch:
        yield patch


@pytest.mark.usefixtures("card")
def test_memory_is_the_cards() -> None:
    assert hardware.card() == hardware.Card(NAME, 85 * GB, 80 * GB)
    assert hardware.available_bytes() == memory_limit(RunOptions()) == 72 * GB
    assert hardware.available_bytes(gpu=False) < 2**50
    found = facts.gather_facts()
    assert (found.memory_bytes, found.available_bytes) == (85 * GB, 72 * GB)
    assert found.identity.chip == NAME
    assert (found.mlx_library, found.metal, found.gpu) == ("cuda", False, True)
    device, on_gpu, precision = find_device(None)
    assert (device.memory_bytes, device.ram_bytes, device.is_card) == (72 * GB, 85 * GB, True)
    assert (on_gpu, precision) == (True, None)


def test_a_mac_is_told_by_its_name_and_how_fast_it_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with simulated_mac():
        monkeypatch.setattr(hardware, "physical_bytes", lambda: 48 * 2**30)
        monkeypatch.setattr(memory_plan, "physical_bytes", lambda: 48 * 2**30)
        device, on_gpu, _ = find_device(None)
        plan = json.loads(run("plan", "--json"))
    assert (device.name, on_gpu, device.is_card) == (f"this machine ({MAC}, 48 GiB)", True, False)
    # As Apple says.
    assert device.bandwidth == 273e9
    assert plan["device"] == device.name
    assert all(row["decode_tokens_per_s"] > 0 for row in plan["forms"])


@pytest.mark.without_gpu
def test_without_a_card_nothing_is_said_of_one() -> None:
    assert hardware.card() is None
    assert not hardware.refuses_slices()
    assert not find_device(None)[0].is_card
    # A card that MLX was told not to use.
    with simulated_card() as patch:
        patch.setattr(mx, "default_device", lambda: mx.cpu)
        assert hardware.card() is None
        assert not hardware.refuses_slices()


@pytest.mark.usefixtures("card")
def test_commands_name_it() -> None:
    plan = json.loads(run("plan", "--json"))
    assert plan["device"] == f"this machine ({NAME}, 85.00 GB)"
    assert plan["limit_bytes"] == 72 * GB
    said = run("doctor")
    assert f"{NAME} (sm_90)" in said
    assert "CUDA" in said
    assert "memory 85.00 GB, 72.00 GB for a run" in said
    assert "MLX's library: cuda" in said


@pytest.mark.parametrize(("name", "bits", "step", "peak_gb"), PEAKS)
def test_the_plan_is_above_the_peaks_of_an_h100(
    name: str, bits: int, step: int, peak_gb: float
) -> None:
    spec = QuantSpec(bits, 64) if bits < 16 else None
    model = planned_inventory(name, released(name), spec)
    planned = footprint(model, FULL_PRECISION, 2048, step, CARD_16_BIT).total_bytes
    # What was seen is rounded to 0.1 GB.
    assert (peak_gb - 0.05) * GB <= planned <= 1.3 * peak_gb * GB


def test_the_prefill_step_is_by_the_memory_there_is() -> None:
    model = planned_inventory("8B", released("8B"), QuantSpec(4, 64))
    steps = {}
    for limit_gb in (80, 16, 10, 8, 6):
        found = fit(model, limit_gb * GB, 4096, CARD_16_BIT)
        assert found.footprint.total_bytes <= limit_gb * GB
        steps[limit_gb] = found.prefill_step
    assert steps[80] == 2048
    assert list(steps.values()) == sorted(steps.values(), reverse=True)
    assert steps[6] < 512
    # Memory that the processor has too: as ever.
    shared = choose_backend(model, on_gpu=True)
    assert fit(model, 80 * GB, 4096, shared).prefill_step == 512
    # In float32 long steps were not measured.
    wide = choose_backend(model, on_gpu=True, dtype="float32", is_card=True)
    assert fit(model, 80 * GB, 4096, wide).prefill_step == 512


@pytest.mark.usefixtures("card")
def test_a_run_takes_long_steps_and_says_nothing_of_it() -> None:
    model = planned_inventory("8B", released("8B"), QuantSpec(4, 64))
    options = RunOptions()
    plan = plan_memory(model, options, 8192)
    assert (plan.form, plan.prefill_step) == (FULL_PRECISION, 2048)
    assert describe_plan(plan, options, 8192) is None
    forced = plan_memory(model, RunOptions(force=True, memory_limit="1GB"), 8192)
    assert forced.prefill_step == 2048


def test_a_quantized_cache_computes_there_as_elsewhere(tmp_path: Path) -> None:
    config = config_4x(head_dim=64, hidden_size=128, vocab_size=300, tie_word_embeddings=True)
    folder = write_checkpoint(tmp_path, config, random_weights(config), tokenizer=False)
    ids, found = [(7 * i * i + 3 * i) % 300 for i in range(201)], []
    for place in (simulated_card(), nullcontext()):
        with place:
            model = load_model(folder, "float32")
            cache = model.make_cache(CacheConfig(4, 4))
            prefill(model, ids[:200], cache, 96)
            found.append(model.next_token_logits(mx.array([ids[200:]]), cache).values)
            mx.eval(found)
    assert mx.allclose(*found, rtol=1e-5, atol=1e-5)


def test_the_processors_path_beside_it_keeps_codes_whole(tmp_path: Path) -> None:
    """MLX attends to its quantized caches, on the card, which takes no slices."""
    config = config_4x(head_dim=64, hidden_size=128, vocab_size=300)
    folder = write_checkpoint(tmp_path, config, random_weights(config), tokenizer=False)
    ids, found = mx.array([[(7 * i * i + 3 * i) % 300 for i in range(201)]]), []
    for place in (simulated_card(), nullcontext()):
        with place:
            model = CPUModel(take_inventory(folder), "float32")
            cache = model.make_cache(CacheConfig(4, 4))
            model(ids[:, :200], cache)
            found.append(model.next_token_logits(ids[:, 200:], cache).values)
            mx.eval(found)
    assert mx.allclose(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metal", [True, False])
def test_a_row_of_the_embedding_is_a_product_with_metal_alone(
    metal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_4x(tie_word_embeddings=True, quantization={"group_size": 32, "bits": 4})
    weights: dict[str, Any] = dict(random_weights(config))
    path = "model.embed_tokens."
    codes = mx.quantize(mx.array(weights[path + "weight"]), 32, 4)
    weights.update(zip((path + "weight", path + "scales", path + "biases"), codes, strict=True))
    folder = write_checkpoint(tmp_path, config, weights, tokenizer=False)
    monkeypatch.setattr(hardware, "has_metal", lambda: metal)
    model = load_model(folder, "float32")
    assert isinstance(model.model.embed_tokens, ProductEmbedding) is metal


@pytest.mark.without_gpu
def test_wheels_that_overwrite_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"mlx-cpu": "0.32.4", "mlx-cuda-13": "0.32.3"}
    monkeypatch.setattr(facts, "_version", installed.get)
    said = run("doctor")
    assert "MLX's library: cpu (of mlx-cpu 0.32.4, mlx-cuda-13 0.32.3)" in said
    assert "overwrite each other's library" in said
    installed.pop("mlx-cuda-13")
    assert "overwrite" not in run("doctor")
