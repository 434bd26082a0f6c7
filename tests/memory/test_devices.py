"""The table of devices: figures against published ones, names as people write them, overviews."""

from __future__ import annotations

import json
import logging
import re
from itertools import pairwise
from typing import Any

import pytest
from typer.testing import CliRunner

from apertus_mlx.cli.app import app
from apertus_mlx.errors import UsageError
from apertus_mlx.memory import parse_device, parse_size
from apertus_mlx.memory.devices import known_devices

# Transfers per second of the memory in millions, over a bus of 64 bits.
LPDDR_RATES = {"A14": 4266, "A15": 4266, "A16": 6400, "A17 Pro": 6400, "A18": 7500, "A19": 8533,
               "A19 Pro, 5 GPU cores": 8533}  # fmt: skip
# Apple's announcements.
APPLE_GB_PER_S = {
    "m1-8gb": 68.25, "m1-pro-16gb": 200, "m1-max-64gb": 400, "m1-ultra-128gb": 800,
    "m2-8gb": 100, "m2-pro-32gb": 200, "m2-max-96gb": 400, "m2-ultra-192gb": 800,
    "m3-24gb": 100, "m3-pro-36gb": 150, "m3-max-36gb": 300, "m3-max-128gb": 400,
    "m3-ultra-512gb": 819,
    "m4-16gb": 120, "m4-pro-64gb": 273, "m4-max-36gb": 410, "m4-max-128gb": 546,
    "m5-32gb": 153, "m5-pro-48gb": 307, "m5-max-36gb": 460, "m5-max-128gb": 614,
    "macbook-neo": 60, "iphone-17": 68.3, "iphone-air": 68.3, "iphone-17-pro": 75.8,
    "ipad-air-m4": 120, "ipad-pro-m5-16gb": 153,
}  # fmt: skip
# GiB of RAM: all iPhones with an A14 or later, and iPads with that or an M chip.
MOBILE_RAM = {
    "iphone-12-mini": 4, "iphone-12": 4, "iphone-12-pro": 6, "iphone-12-pro-max": 6,
    "iphone-13-mini": 4, "iphone-13": 4, "iphone-13-pro": 6, "iphone-13-pro-max": 6,
    "iphone-se-3": 4, "iphone-14": 6, "iphone-14-plus": 6, "iphone-14-pro": 6,
    "iphone-14-pro-max": 6, "iphone-15": 6, "iphone-15-plus": 6, "iphone-15-pro": 8,
    "iphone-15-pro-max": 8, "iphone-16e": 8, "iphone-16": 8, "iphone-16-plus": 8,
    "iphone-16-pro": 8, "iphone-16-pro-max": 8, "iphone-17e": 8, "iphone-17": 8, "iphone-air": 12,
    "iphone-17-pro": 12, "iphone-17-pro-max": 12,
    "ipad-10": 4, "ipad-a16": 6, "ipad-mini-6": 4, "ipad-mini-a17-pro": 8, "ipad-air-4": 4,
    "ipad-air-5": 8, "ipad-air-m2": 8, "ipad-air-m3": 8, "ipad-air-m4": 12,
    "ipad-pro-m1-8gb": 8, "ipad-pro-m1-16gb": 16, "ipad-pro-m2-8gb": 8, "ipad-pro-m2-16gb": 16,
    "ipad-pro-m4-8gb": 8, "ipad-pro-m4-16gb": 16, "ipad-pro-m5-12gb": 12, "ipad-pro-m5-16gb": 16,
}  # fmt: skip
# GiB of RAM -> GB that an app got with the entitlement; see the table's sources.
MEASURED_GB = {4: 2.4, 6: 4.2, 8: 6.0}


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_figures_are_those_published() -> None:
    for device in known_devices():
        rate = LPDDR_RATES.get(device.chip or "")
        if rate:
            assert device.bandwidth == pytest.approx(rate * 8 * 1e6, rel=0.001), device.name
    for name, gb_per_s in APPLE_GB_PER_S.items():
        assert parse_device(name).bandwidth == gb_per_s * 1e9
    mobile = [each for each in known_devices() if each.name.startswith(("iphone", "ipad"))]
    assert {each.name: (each.ram_bytes or 0) >> 30 for each in mobile} == MOBILE_RAM
    for device in mobile:
        ram_gib = MOBILE_RAM[device.name]
        assert device.memory_bytes <= MEASURED_GB.get(ram_gib, 2 / 3 * ram_gib * 1.074) * 1e9
    # What Metal recommended on real machines.
    assert parse_device("m5-32gb").memory_bytes == pytest.approx(21_845 * 2**20, rel=1e-4)
    assert parse_device("m5-pro-48gb").memory_bytes <= 40_200 * 2**20


def test_every_figure_has_a_source() -> None:
    for device in known_devices():
        for source in (device.ram_source, device.memory_source, device.bandwidth_source):
            # An address that somebody has seen, or the word that nobody has.
            assert source and re.search(r"https://[a-z0-9.-]+\.[a-z]+/|not looked up", source)
    names = [device.name for device in known_devices()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("iphone-15-pro", "iphone-15-pro"),
        ("iPhone 15 Pro", "iphone-15-pro"),
        (" iphone15pro ", "iphone-15-pro"),
        ("iPhone 15 Pro 8GB", "iphone-15-pro"),
        ("iPhone SE (3rd generation)", "iphone-se-3"),
        ("iPad Pro 11-inch (M4)", "ipad-pro-m4-8gb"),
        ("iPad Pro M4 16 GB", "ipad-pro-m4-16gb"),
        ("iPad Air (5th generation)", "ipad-air-5"),
        ("iPad mini (A17 Pro)", "ipad-mini-a17-pro"),
        ("M3 Max", "m3-max-36gb"),
        ("Apple M4 Pro", "m4-pro-24gb"),
        ("M1-8GB", "m1-8gb"),
        ("MacBook Pro M4 Max 128GB", "m4-max-128gb"),
        ("MacBook Neo", "macbook-neo"),
    ],
)
def test_names_as_people_write_them(text: str, name: str) -> None:
    assert parse_device(text).name == name


def test_a_name_without_memory_says_which_it_was_taken_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "apertus_mlx"):
        parse_device("M3 Max")
    assert "taken as m3-max-36gb" in caplog.text and "m3-max-128gb" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("iphone 15 por", "nearest are iphone-15-pro"),
        ("m9-8gb", "m1-8gb"),
        ("m4-max-100gb", "m4-max-128gb"),
        ("iPad", "ipad-a16"),
        ("iPhone 11", "GPU family 7"),
        ("iPad (9th generation)", "GPU family 7"),
        ("galaxy s24", "plan --device all lists them"),
        ("", "plan --device all"),
        ("-5GB", "is no known device"),
        ("5 apples", "expected a size"),
        ("nan", "is no known device"),
        ("1e9GB", "expected a size"),
        ("0GB", "expected a size"),
    ],
)
def test_near_misses_get_suggestions(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_device(text)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_sizes() -> None:
    assert parse_device("1.5 GiB").memory_bytes == 3 * 2**29
    for wrong in ("GB", "-1", "inf", "1_0", "9" * 30):
        with pytest.raises(UsageError, match="--memory-limit"):
            parse_size(wrong, "--memory-limit")


def test_one_model_on_all_devices() -> None:
    shown = run("plan", "--device", "all")
    assert shown.exit_code == 0
    rows = json.loads(run("plan", "--device", "all", "--json").stdout)["rows"]
    assert [row["device"]["name"] for row in rows] == [each.name for each in known_devices()]
    for row in rows:
        line = next(
            x for x in shown.output.splitlines() if x.startswith(row["device"]["name"] + " ")
        )
        assert (
            ("yes" in line) is row["fits"] is (row["total_bytes"] <= row["device"]["memory_bytes"])
        )
    alone = json.loads(run("plan", "--device", "iPhone 15 Pro", "--json").stdout)
    [same] = [row for row in rows if row["device"]["name"] == "iphone-15-pro"]
    for key in ("total_bytes", "form", "prefill_step", "largest_context", "decode_tokens_per_s"):
        assert same[key] == alone["best"][key]
    assert same["context"] == alone["context"]


def test_all_released_models_on_one_device() -> None:
    rows = json.loads(run("plan", "--all", "--device", "iphone-15-pro", "--json").stdout)["rows"]
    by_name = {row["model"].removeprefix("swiss-ai/Apertus-"): row for row in rows}
    # Of 8.05 billion weights, 16 bits each.
    big = by_name["8B-Instruct-2509"]
    assert big["weights_bytes"] == pytest.approx(2 * 8.05e9, rel=0.005)
    assert not big["fits"] and big["decode_tokens_per_s"] is None
    small = [by_name[f"v1.1-0.5B-Instruct-MLX-INT{bits}"] for bits in (3, 4, 6)]
    assert all(row["fits"] and row["is_estimate"] for row in small)
    assert all(a["decode_tokens_per_s"] > b["decode_tokens_per_s"] for a, b in pairwise(small))
    shown = run("plan", "--all", "--context", "9000", "--device", "m3-max-64gb")
    assert "8B-Instruct-2509" in shown.output and "9,000 tokens of context" in shown.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--all", "--device", "All"), "leave out --device all"),
        (("some/model", "--all"), "leave out 'some/model'"),
    ],
)
def test_too_much_at_once_is_refused(arguments: tuple[str, ...], words: str) -> None:
    refused = run("plan", *arguments)
    assert isinstance(refused.exception, UsageError) and words in str(refused.exception)
