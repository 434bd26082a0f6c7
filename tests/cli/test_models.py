"""`models`: what is released beside published figures, and what lies in a cache of the test's."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx import convert_model, plan
from apertus_mlx.checkpoint.layout import parameter_count
from apertus_mlx.cli.app import app
from apertus_mlx.errors import ApertusError, NotFoundError, UsageError
from apertus_mlx.hub.apertus_models import RELEASED, expected_download_bytes, expected_inventory
from tests.builders import config_4x, write_checkpoint
from tests.hub_server import HubServer, point_client_at, serving

TINY = "swiss-ai/Apertus-v1.1-0.5B-Instruct"
OTHER = "somebody/Apertus-tuned"
LLAMA = "somebody/Llama"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with two Apertus models, of which the second's commit has the first's id."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with serving() as server:
        point_client_at(server.endpoint, tmp_path / "home", monkeypatch)
        folder = write_checkpoint(tmp_path / "model", config_4x())
        for name in (TINY, OTHER):
            server.repository(name).commit_folder(folder)
        yield server


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `models` and returns what it prints with `--json`."""

    def run(*arguments: str) -> Any:
        capsys.readouterr()
        app(["models", *arguments, "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    return run


def listed(run: Callable[..., Any], *arguments: str) -> dict[str, dict[str, Any]]:
    return {each["model"]: each for each in run(*arguments)["models"]}


@pytest.mark.parametrize(
    ("size", "parameters", "kv_bytes"),
    [
        ("0.5B", 438_349_312, 20_480),
        ("1.5B", 1_510_019_072, 32_768),
        ("4B", 3_825_361_920, 98_304),
        ("8B", 8_053_338_112, 131_072),
        ("70B", 70_599_864_320, 327_680),
    ],
)
def test_geometries_are_the_published_ones(size: str, parameters: int, kv_bytes: int) -> None:
    """Parameters and bytes of keys and values per token as their makers state them."""
    for name in (name for name, (other, _) in RELEASED.items() if other == size):
        config = expected_inventory(name).config
        assert parameter_count(config) == parameters
        heads = config.num_key_value_heads * config.head_dim
        assert 2 * 2 * config.num_hidden_layers * heads == kv_bytes


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("Apertus-v1.1-1.5B-Instruct", 3.020),
        ("Apertus-v1.1-4B-Instruct", 7.651),
        ("Apertus-8B-Instruct-2509", 16.107),
        ("Apertus-70B-Instruct-2509", 141.2),
        ("Apertus-v1.1-0.5B-Instruct-MLX-INT4", 0.28),
        ("Apertus-v1.1-1.5B-Instruct-MLX-INT4", 0.98),
        ("Apertus-v1.1-4B-Instruct-MLX-INT4", 2.353),
    ],
)
def test_sizes_are_the_published_ones(name: str, gigabytes: float) -> None:
    weights_bytes = expected_download_bytes(f"swiss-ai/{name}") - 17_078_480
    assert weights_bytes / 1e9 == pytest.approx(gigabytes, rel=5e-3)


def test_the_list_asks_nobody(server: HubServer, run: Callable[..., Any]) -> None:
    found = listed(run)
    assert set(found) == {*RELEASED, "embedded"}
    assert all(found[name]["directory"] is None for name in RELEASED)
    assert found["embedded"]["fits"] and found["embedded"]["download_bytes"] == 0
    assert listed(run, "--offline") == found
    assert not server.requests


def test_what_fits_depends_on_the_device_and_the_context(
    server: HubServer, run: Callable[..., Any]
) -> None:
    assert not any(each["fits"] for each in listed(run, "--device", "1MB").values())
    large = listed(run, "--device", "64GB")
    assert [name for name, each in large.items() if not each["fits"]] == [
        "swiss-ai/Apertus-70B-Instruct-2509"
    ]
    name = "swiss-ai/Apertus-8B-Instruct-2509"
    longer = listed(run, "--device", "64GB", "--context", "60000")
    assert longer[name]["memory_bytes"] > large[name]["memory_bytes"] + 50_000 * 131_072
    # Weights alone take this much.
    assert large[name]["memory_bytes"] > 16.1e9


def test_download_and_removal(server: HubServer, run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("--download", TINY)
    directory = Path(done["directory"])
    assert (directory / "model.safetensors").is_file()
    run("--download", OTHER)
    found = listed(run, "--device", "64GB")
    size = sum(path.stat().st_size for path in directory.iterdir())
    for name, released in ((TINY, True), (OTHER, False)):
        each = found[name]
        assert (each["released"], each["download_bytes"], each["disk_bytes"]) == (released, 0, size)
        best = plan(Path(each["directory"]), device="64GB", context=512).best
        assert each["memory_bytes"] == best.total_bytes and each["fits"]
    with pytest.raises(UsageError, match="nothing is removed; --yes"):
        run("--remove", TINY)
    assert directory.is_dir()
    assert run("--remove", TINY, "--yes") == {"model": TINY, "freed_bytes": size}
    assert not directory.exists()
    found = listed(run)
    # The other one stays, though its commit has the same id.
    assert found[TINY]["directory"] is None and found[OTHER]["disk_bytes"] == size
    with pytest.raises(NotFoundError, match="not in the Hub's cache"):
        run("--remove", TINY, "--yes")


@pytest.mark.parametrize(("answer", "gone"), [("y\n", True), ("n\n", False), ("", False)])
def test_removal_asks_whoever_is_there(
    server: HubServer,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    gone: bool,
) -> None:
    directory = Path(run("--download", TINY)["directory"])
    person = io.StringIO(answer)
    monkeypatch.setattr(person, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", person)
    if gone:
        run("--remove", TINY)
    else:
        with pytest.raises(UsageError, match="nothing is removed"):
            run("--remove", TINY)
    assert directory.exists() is not gone


def test_only_apertus_models_of_the_cache_are_removed(
    server: HubServer, run: Callable[..., Any], tmp_path: Path
) -> None:
    run("--download", OTHER)
    cache = tmp_path / "home" / "hub"
    llama = cache / "models--somebody--Llama"
    shutil.copytree(cache / "models--somebody--Apertus-tuned", llama, symlinks=True)
    (config,) = llama.glob("snapshots/*/config.json")
    config.unlink()
    config.write_text('{"model_type": "llama"}')
    assert LLAMA not in listed(run)
    folder = tmp_path / "work" / "mine"
    write_checkpoint(folder, config_4x())
    refused: list[tuple[str, type[ApertusError]]] = [
        (LLAMA, UsageError),
        ("mine", UsageError),
        ("../home", UsageError),
        (str(folder), UsageError),
        ("work/mine", NotFoundError),
    ]
    for name, kind in refused:
        with pytest.raises(kind):
            run("--remove", name, "--yes")
    assert config.is_file() and (folder / "config.json").is_file()


def test_what_is_not_whole_is_listed_and_can_go(server: HubServer, run: Callable[..., Any]) -> None:
    directory = Path(run("--download", OTHER)["directory"])
    (directory / "model.safetensors").unlink()
    each = listed(run)[OTHER]
    assert each["problem"] == f"{OTHER}: its download is unfinished"
    assert (each["directory"], each["fits"]) == (None, None)
    run("--remove", OTHER, "--yes")
    assert OTHER not in listed(run)


def test_own_conversions_in_the_current_folder(
    server: HubServer, run: Callable[..., Any], tmp_path: Path
) -> None:
    done = convert_model(tmp_path / "model", bits=4, group_size=32)
    each = listed(run)[str(done.output)]
    assert each["fits"] and not each["released"]
    assert each["disk_bytes"] == sum(path.stat().st_size for path in done.output.iterdir())


def test_words(server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    app(["models", "--device", "6GB", "--context", "512"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "on", "disk", "download", "memory", "fits"]
    assert len(lines) == 1 + len(RELEASED) + 1 + 2
    assert "512 tokens of context; 6GB: 6.00 GB for the process" in lines[-1]
    (row,) = [line for line in lines if line.startswith("swiss-ai/Apertus-8B-Instruct-2509")]
    assert row.split()[1:4] == ["-", "16.12", "GB"] and row.endswith("no")


def test_both_at_once(run: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="one at a time"):
        run("--download", TINY, "--remove", TINY)
