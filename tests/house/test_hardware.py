"""Hardware is asked for in one module, and never when something is imported."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.house.test_house import ROOT, SOURCES

HARDWARE = ROOT / "apertus_mlx" / "backend" / "hardware.py"
QUESTIONS = {
    "cpu_count", "default_device", "device_count", "find_spec", "get_peak_memory", "getrusage",
    "is_available", "mx.device_info", "sched_getaffinity", "sysconf", "sysctlbyname",
}  # fmt: skip


def questions(path: Path) -> set[str]:
    """What a module asks for, called or not, by the last part of its name."""
    tree = ast.parse(path.read_text())
    named = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = "mx" if node.module == "mlx.core" else node.module
            named |= {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in named if name in QUESTIONS or name.rsplit(".", 1)[-1] in QUESTIONS}


def test_hardware_is_asked_for_in_one_module() -> None:
    found = {path.name: questions(path) for path in SOURCES if path != HARDWARE}
    beside = {name: asked for name, asked in found.items() if asked}
    assert not beside, "ask apertus_mlx.backend.hardware"
    assert questions(HARDWARE)


def test_nothing_is_asked_at_import() -> None:
    """Nor is a function of the module called where another module is only imported."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        inside = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.FunctionDef | ast.Lambda)
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and id(node) not in inside:
                called = ast.unparse(node.func)
                assert not called.startswith("hardware.") and called not in (
                    "has_gpu", "has_metal", "has_library", "available_bytes", "physical_cores",
                ), f"{path}: {called}"  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "on = mx.default_device() != mx.cpu",
        "from importlib.util import find_spec",
        "from mlx.core import device_info",
        "ask = mx.metal.is_available",
        "os.sysconf('SC_PAGE_SIZE')",
    ],
)
def test_a_question_is_seen(text: str, tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(text)
    assert questions(module)
    module.write_text("from apertus_mlx.backend.hardware import device_info, has_gpu\nhas_gpu()")
    assert not questions(module)
