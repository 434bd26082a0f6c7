"""The planner: exact sizes, devices, choices under a limit, and refusals before loading."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from apertus_mlx.backend import hardware
from apertus_mlx.backend.hardware import available_bytes
from apertus_mlx.backend.memory_limits import mlx_limits
from apertus_mlx.cache import FULL_PRECISION, CacheConfig, make_layer_cache
from apertus_mlx.cache.config import FULL_BITS
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.checkpoint.header import read_header
from apertus_mlx.checkpoint.inventory import Inventory, take_inventory
from apertus_mlx.checkpoint.layout import matrices, vectors
from apertus_mlx.cli.app import app
from apertus_mlx.errors import ApertusError, RejectedError, ResourceError, UsageError
from apertus_mlx.hub import RemoteCheckpoint
from apertus_mlx.memory import (
    fit,
    footprint,
    largest_context,
    parse_device,
)
from apertus_mlx.memory.footprint import (
    GPU_16_BIT,
    MLX_CPU,
    kv_bytes,
    kv_bytes_per_position,
    weights_bytes,
)
from apertus_mlx.memory.speed import decode_tokens_per_s
from apertus_mlx.quant.spec import QuantSpec
from tests.builders import config_4x, planned_inventory, random_weights, write_checkpoint
from tests.hub_server import point_client_at, serving

# hidden, MLP, layers, heads, key heads, tied
GEOMETRIES = {
    "0.5B": (1024, 6144, 20, 16, 4, True),
    "1.5B": (2048, 12288, 16, 32, 8, False),
    "8B": (4096, 21504, 32, 32, 8, False),
}


def planned(size: str, bits: int | None = None) -> Inventory:
    hidden, inner, layers, heads, kv_heads, tied = GEOMETRIES[size]
    values = config_4x(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        vocab_size=131_072, max_position_embeddings=65_536,
    )  # fmt: skip
    config = parse_config(values)
    spec = QuantSpec(bits, 64) if bits else None
    return planned_inventory(size, config, spec)


@pytest.mark.parametrize(
    ("size", "bits", "published_gb"),
    [("0.5B", 4, 0.247), ("1.5B", 4, 0.850), ("8B", 4, 4.53), ("8B", None, 16.107)],
)
def test_weights_are_those_of_the_released_sizes(
    size: str, bits: int | None, published_gb: float
) -> None:
    assert weights_bytes(planned(size, bits), 2) / 1e9 == pytest.approx(published_gb, rel=0.005)


@pytest.mark.parametrize(
    ("size", "published"), [("0.5B", 20_480), ("1.5B", 32_768), ("8B", 131_072)]
)
@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
def test_kv_bytes_of_a_token(size: str, published: int, bits: int) -> None:
    config = planned(size).config
    form = CacheConfig(bits, bits)
    # Theory: one scale and one bias of 16 bits for each head's keys and values.
    theory = published / 16 * (bits if bits == FULL_BITS else bits + 32 / config.head_dim)
    assert kv_bytes_per_position(config, form, 2) == theory
    # One layer, as it is allocated, over 4,096 positions.
    cache = make_layer_cache(form, config.head_dim)
    row = mx.zeros((1, config.num_key_value_heads, 1, config.head_dim), mx.bfloat16)
    sizes = []
    for positions in (4096 + (0 if bits == FULL_BITS else 68), 4096):
        wide = mx.broadcast_to(row, (*row.shape[:2], positions, config.head_dim))
        cache.update_and_fetch(wide, wide)
        sizes.append(cache.nbytes)
    measured = (sizes[1] - sizes[0]) / 4096 * config.num_hidden_layers
    assert measured == pytest.approx(theory, rel=1e-9)
    if bits == 4:
        assert measured <= 0.30 * published


@pytest.mark.parametrize("positions", [1, 60, 100, 101, 132, 260, 700, 1500, 5000])
@pytest.mark.parametrize(
    "form",
    [
        FULL_PRECISION, CacheConfig(bound=300), CacheConfig(4, 3), CacheConfig(16, 2),
        CacheConfig(8, 8, bound=300, sinks=0, window=0),
    ],
    ids=str,
)  # fmt: skip
def test_planned_cache_bytes_are_those_allocated(positions: int, form: CacheConfig) -> None:
    config = parse_config(config_4x(head_dim=64))
    cache = make_layer_cache(form, 64)
    done = 0
    while done < positions:
        length = min(256, positions - done)
        rows = mx.zeros((1, 2, length, 64))
        cache.update_and_fetch(rows, rows)
        done += length
    assert cache.nbytes * config.num_hidden_layers == kv_bytes(config, form, positions, 4)


def test_more_context_less_precision_then_refusal() -> None:
    model = planned("8B", 4)
    generous = fit(model, 30 * 10**9, 8192, GPU_16_BIT)
    assert (generous.form, generous.prefill_step) == (FULL_PRECISION, 512)
    bits = []
    for limit_gb in (6.0, 5.6, 5.3, 5.1):
        chosen = fit(model, int(limit_gb * 1e9), 8192, GPU_16_BIT)
        assert chosen.footprint.total_bytes <= limit_gb * 1e9
        assert chosen.buffer_cache_bytes <= 512 * 10**6
        bits.append(chosen.form.key_bits)
    assert bits == sorted(bits, reverse=True)
    assert bits[-1] < FULL_BITS
    with pytest.raises(ResourceError, match=r"--max-kv \d+, or with at most \d+ tokens"):
        fit(model, 4_900_000_000, 65_536, GPU_16_BIT)
    with pytest.raises(ResourceError, match=r"at 3 bits .*convert --bits 3"):
        fit(model, 4_000_000_000, 4096, GPU_16_BIT)
    with pytest.raises(ResourceError, match="take a smaller model"):
        fit(model, 10**9, 4096, GPU_16_BIT)
    bounded = fit(model, 4_900_000_000, 65_536, GPU_16_BIT, bounds=True)
    assert bounded.form.bound is not None
    assert bounded.footprint.total_bytes <= 4_900_000_000


def test_the_numbers_of_a_refusal_fit() -> None:
    model, limit = planned("8B", 4), 4_900_000_000
    with pytest.raises(ResourceError) as refused:
        fit(model, limit, 65_536, GPU_16_BIT)
    words = str(refused.value).split()
    bound = int(words[words.index("--max-kv") + 1].strip(","))
    form = CacheConfig(3, 3, bound=bound)
    assert footprint(model, form, 65_536, 32, GPU_16_BIT).total_bytes <= limit
    tokens = int(words[words.index("most") + 1])
    assert footprint(model, CacheConfig(3, 3), tokens, 32, GPU_16_BIT).total_bytes <= limit


def test_what_is_asked_for_is_kept() -> None:
    model = planned("0.5B", 4)
    asked = CacheConfig(2, 4, bound=2048)
    chosen = fit(model, 10**9, 4096, MLX_CPU, asked, 64)
    assert (chosen.form, chosen.prefill_step) == (asked, 64)
    with pytest.raises(ResourceError, match="4096 tokens of context"):
        fit(model, 10**8, 4096, MLX_CPU, asked, 64)


def test_largest_context_is_the_edge() -> None:
    model = planned("8B", 4)
    longest = largest_context(model, 8 * 10**9, FULL_PRECISION, 256, GPU_16_BIT)
    assert 0 < longest < 65_536
    for context, within in ((longest, True), (longest + 1, False)):
        total = footprint(model, FULL_PRECISION, context, 256, GPU_16_BIT).total_bytes
        assert (total <= 8 * 10**9) is within


def test_speed_estimates_are_near_published_measurements() -> None:
    """Qwen-class figures of devices: 4-bit 8B on an M4 Max near 100, 1.5B on a phone near 75."""
    m4_max, phone = parse_device("m4-max-64gb"), parse_device("iphone-17-pro")
    assert m4_max.bandwidth and phone.bandwidth
    fast = decode_tokens_per_s(planned("8B", 4), FULL_PRECISION, 512, GPU_16_BIT, m4_max.bandwidth)
    slow = decode_tokens_per_s(planned("1.5B", 4), FULL_PRECISION, 512, GPU_16_BIT, phone.bandwidth)
    assert fast == pytest.approx(100, rel=0.25)
    assert slow == pytest.approx(82, rel=0.25)


def write_model(folder: Path, **changes: Any) -> Path:
    config = config_4x(**changes)
    return write_checkpoint(folder, config, random_weights(config), shards=2)


def test_a_remote_checkpoint_is_planned_as_the_local_one(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", head_dim=64)
    headers = {path.name: read_header(path) for path in folder.glob("*.safetensors")}
    files = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    remote = RemoteCheckpoint("org/name", "main", files, headers).inventory()
    local = take_inventory(folder)
    size = (folder / "tokenizer.json").stat().st_size
    assert local.tokenizer_bytes == size
    assert replace(remote, checkpoint=local.checkpoint, tokenizer_bytes=size) == local
    assert remote.checkpoint == replace(local.checkpoint, name="org/name", folder=None)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert local.checkpoint.file_bytes == stored
    with pytest.raises(RejectedError, match=r"config\.json"):
        RemoteCheckpoint("org/name", "main", {}, headers).inventory()
    del headers["model-00002-of-00002.safetensors"]
    with pytest.raises(RejectedError):
        RemoteCheckpoint("org/name", "main", files, headers).inventory()


def test_weights_without_vectors_are_not_forgotten(tmp_path: Path) -> None:
    local = take_inventory(write_model(tmp_path / "model"))
    numbers = sum(matrix.rows * matrix.columns for matrix in matrices(local.config))
    for _, shape in vectors(local.config):
        numbers += shape[0] if shape else 1
    assert weights_bytes(local, 4) == 4 * numbers


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_plan_command(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", head_dim=64)
    shown = run("plan", str(folder), "--device", "iphone-15-pro")
    assert shown.exit_code == 0
    for word in ("full precision", "4 bits", "tok/s", "estimate", "best that fits"):
        assert word in shown.output
    answer = run("plan", str(folder), "--device", "6GB", "--context", "300", "--json")
    report = json.loads(answer.stdout)
    assert report["context"] == 300
    assert report["file_bytes"] == take_inventory(folder).checkpoint.file_bytes
    assert report["best"]["form"] == "full precision"
    assert {row["form"] for row in report["forms"]} >= {"full precision", "8 bits", "3 bits"}
    assert "does not fit" in run("plan", str(folder), "--device", "100kB").output
    with_ring = run("plan", str(folder), "--kv-bits", "4", "--max-kv", "200", "--json")
    assert json.loads(with_ring.stdout)["forms"][0]["form"] == "4 bits, at most 200 positions"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--memory-limit", "1MB"), ResourceError, "the limit is 1.0 MB"),
        (("--memory-limit", "much"), UsageError, "--memory-limit 'much'"),
        (("--kv-bits", "5"), UsageError, "--kv-bits 5"),
        (("--kv-bits-v", "0"), UsageError, "--kv-bits-v 0"),
        (("--max-kv", "0"), UsageError, "--max-kv 0"),
        (("--max-kv", "50", "--kv-bits", "4"), UsageError, "--max-kv 50"),
        (("--kv-sink", "-1"), UsageError, "--kv-sink -1"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_refusals_come_before_the_weights(
    command: str,
    arguments: tuple[str, ...],
    error: type[ApertusError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_model(tmp_path / "model", head_dim=64)
    monkeypatch.setattr("apertus_mlx.generation.model_folder.load_for", None)
    prompt = ["hello"] if command == "generate" else []
    result = run(command, *prompt, "--model", str(folder), *arguments)
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_heads_too_narrow_for_groups_are_refused_at_the_start(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    result = run("generate", "hi", "--model", str(folder), "--kv-bits", "4")
    assert isinstance(result.exception, UsageError)
    assert "head_dim 16 does not divide" in str(result.exception)


def test_a_bound_below_the_prompt_works_with_and_without_bits(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", head_dim=64)
    text = "a" * 300
    for extra in ((), ("--kv-bits", "4")):
        result = run("generate", text, "--raw", "--model", str(folder), "--max-kv", "200",
                     "-n", "8", "-t", "0", *extra)  # fmt: skip
        assert result.exit_code == 0


def test_force_runs_what_the_plan_refuses(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", head_dim=64)
    result = run("generate", "hi", "--model", str(folder), "--memory-limit", "1MB", "--force",
                 "-n", "2")  # fmt: skip
    assert result.exit_code == 0


@pytest.mark.without_gpu
def test_a_tight_limit_is_kept_and_told(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", head_dim=64)
    local = take_inventory(folder)
    full = footprint(local, FULL_PRECISION, 400, 512, MLX_CPU).total_bytes
    result = run("generate", "a" * 300, "--raw", "--model", str(folder), "-n", "99",
                 "--compute", "mlx", "--memory-limit", f"{int(full * 0.9)}B", "--json")  # fmt: skip
    assert result.exit_code == 0
    assert "memory: about" in result.stderr
    chosen = json.loads(result.stdout)["memory"]
    assert chosen["total_bytes"] <= full * 0.9


@pytest.mark.usefixtures("no_other_models")
def test_mlx_limits_are_restored_whatever_happens() -> None:
    before = mx.set_cache_limit(123_456)
    try:
        with pytest.raises(KeyError), mlx_limits(1000, 10**6):
            raise KeyError
        assert mx.set_cache_limit(123_456) == 123_456
    finally:
        mx.set_cache_limit(before)


@pytest.mark.usefixtures("no_other_models")
def test_the_wired_limit_stays_below_what_metal_recommends_and_is_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wired = [77]

    def set_wired_limit(size_bytes: int) -> int:
        wired.append(size_bytes)
        return wired[-2]

    monkeypatch.setattr(hardware, "has_gpu", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 8 * 10**9})
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    assert hardware.available_bytes() == 7_600_000_000
    with pytest.raises(KeyboardInterrupt), mlx_limits(10**6, 2 * 10**9):
        raise KeyboardInterrupt
    assert wired == [77, 2 * 10**9, 77]
    with mlx_limits(10**6, 9 * 10**9):
        assert wired[-1] == 7_600_000_000
    assert wired[-1] == 77


def test_a_hub_id_is_planned_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import close_session

    folder = write_model(tmp_path / "model", head_dim=64, vocab_size=20_000)
    with serving() as server:
        point_client_at(server.endpoint, tmp_path / "home", monkeypatch)
        close_session()
        server.repository("org/name").commit_folder(folder)
        result = run("plan", "org/name", "--device", "m1-8gb", "--json")
        close_session()
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["file_bytes"] == take_inventory(folder).checkpoint.file_bytes
    assert report["forms"][0]["weights_bytes"] == weights_bytes(take_inventory(folder), 4)
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_this_machine_gives_something() -> None:
    assert 10**8 < available_bytes() < 2**50
