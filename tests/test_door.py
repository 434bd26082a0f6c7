"""Nothing opens a file beside the door (`apertus_mlx.model_files`), except for what is ours."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOOR = ROOT / "apertus_mlx" / "model_files.py"
RECIPE = ROOT / "apertus_mlx" / "embedded" / "recipe"
METHODS = {
    "open", "read_bytes", "read_text", "fdopen", "fromfile", "memmap", "load_file", "safe_open",
    "from_file", "from_pretrained",
}  # fmt: skip
FUNCTIONS = {
    "mx.load", "np.load", "shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree",
    "shutil.move", "mmap.mmap",
}  # fmt: skip
# The calls of a module that open what is ours or the system's, or has been through the door.
ALLOWED = {
    # The system.
    "apertus_mlx/cpu/runtime.py": {"read_text"},
    "apertus_mlx/memory/machine.py": {"read_text"},
    "apertus_mlx/metal/verdict.py": {"read_bytes", "open"},
    "apertus_mlx/cli/output.py": {"open"},
    # Nowhere.
    "apertus_mlx/rust_panics.py": {"open"},
    # Channels to children.
    "apertus_mlx/bench/sides.py": {"fdopen"},
    # The package itself, and what its kernels leave behind.
    "apertus_mlx/metal/text.py": {"read_text"},
    "apertus_mlx/doctor/trace.py": {"read_bytes"},
    # What a download has just written.
    "apertus_mlx/hub/transfer.py": {"open"},
    # By name, after `checked`.
    "apertus_mlx/safetensors_header.py": {"safe_open"},
    "apertus_mlx/load.py": {"load"},
    "apertus_mlx/prompt_cache.py": {"load"},
    # The output that is being written.
    "convert/execute.py": {"open"},
    "convert/workspace.py": {"open", "read_text"},
    "convert/transformed.py": {"load_file"},
    "convert/calibration/calibrated.py": {"load"},
    "convert/calibration/gradients.py": {"memmap"},
    "convert/distill/run.py": {"open"},
    "convert/distill/teacher_cache.py": {"load"},
    "convert/distill/training.py": {"load"},
}


def opening_calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            name = called.rsplit(".", 1)[-1]
            if name in METHODS or called in FUNCTIONS:
                yield name


def test_files_are_opened_at_the_door() -> None:
    for package in ("apertus_mlx", "convert", "quant"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path == DOOR or RECIPE in path.parents:
                continue
            name = path.relative_to(ROOT).as_posix()
            beside = set(opening_calls(path)) - ALLOWED.get(name, set())
            assert not beside, f"{name}: {beside}: open it through apertus_mlx.model_files"


def test_children_run_nothing_from_the_current_folder() -> None:
    """`-m` puts the current folder first among the places of modules; `-P` does not."""
    commands = [
        (path, [ast.unparse(element) for element in node.elts])
        for package in ("apertus_mlx", "convert", "quant")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.List)
    ]
    children = [(path, words) for path, words in commands if words[:1] == ["sys.executable"]]
    assert len(children) >= 2
    for path, words in children:
        assert words[1] == "'-P'", path
