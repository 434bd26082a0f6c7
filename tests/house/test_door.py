"""Files are opened at one door (`apertus_mlx.system.model_files`), except for what is ours."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.house.test_house import ROOT, SOURCES

DOOR = ROOT / "apertus_mlx" / "system" / "model_files.py"
METHODS = {
    "open", "read_bytes", "read_text", "fdopen", "fromfile", "memmap", "load_file", "safe_open",
    "from_file", "from_pretrained",
}  # fmt: skip
FUNCTIONS = {
    "mx.load", "np.load", "shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree",
    "shutil.move", "mmap.mmap",
}  # fmt: skip
# All that opens files in a module: what is ours or the system's, or has been through the door.
ALLOWED = {
    # The system.
    "apertus_mlx/backend/hardware.py": {"read_text"},
    "apertus_mlx/backend/metal/verdict.py": {"read_bytes", "open"},
    # What the user has typed, in a file of ours.
    "apertus_mlx/cli/chat_history.py": {"open"},
    # Nowhere.
    "apertus_mlx/cli/surroundings.py": {"open"},
    "apertus_mlx/cli/sink.py": {"open"},
    "apertus_mlx/system/rust_panics.py": {"open"},
    # The package itself, and what its kernels leave behind.
    "apertus_mlx/backend/metal/text.py": {"read_text"},
    "apertus_mlx/memory/devices.py": {"read_text"},
    "apertus_mlx/measure/doctor/visit.py": {"read_bytes"},
    "apertus_mlx/measure/tasks/own_tasks.py": {"read_bytes"},
    # Appended to; read through the door.
    "apertus_mlx/measure/tasks/kept_answers.py": {"open"},
    # What a download has just written.
    "apertus_mlx/hub/transfer.py": {"open"},
    # By name, after `checked`.
    "apertus_mlx/checkpoint/header.py": {"safe_open"},
    "apertus_mlx/backend/mlx.py": {"load"},
    "apertus_mlx/generation/prompt_cache.py": {"load", "open"},
    # What has just been written.
    "apertus_mlx/system/whole_file.py": {"open"},
    # The output that is being written.
    "convert/write/keep.py": {"load"},
    "convert/write/execute.py": {"open"},
    "convert/write/workspace.py": {"open", "read_text"},
    "convert/distill/run.py": {"open"},
    "convert/distill/training.py": {"load"},
}


def opening_names(path: Path) -> set[str]:
    """Whatever opens files, called or handed to something that calls it."""
    tree = ast.parse(path.read_text())
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            named = ast.unparse(node)
            named = imported.get(named, named)
            name = named.rsplit(".", 1)[-1]
            if name in METHODS or named in FUNCTIONS:
                found.add(name)
    return found


def test_files_are_opened_at_the_door() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): names
        for path in SOURCES
        if path != DOOR and (names := opening_names(path))
    }
    beside = {
        name: names - ALLOWED.get(name, set())
        for name, names in found.items()
        if names - ALLOWED.get(name, set())
    }
    assert not beside, "open it through apertus_mlx.system.model_files"
    assert found == ALLOWED, "what is no longer opened is no longer allowed"


def test_what_opens_files_is_seen_wherever_it_is_named(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    for text, name in (
        ("guarded(safe_open, path)", "safe_open"),
        ("path.read_bytes()", "read_bytes"),
        ("reader = partial(np.load, mmap_mode='r')", "load"),
        ("from shutil import copyfile as take\ntake(a, b)", "copyfile"),
        ("from safetensors import safe_open as look\nlook(a)", "safe_open"),
    ):
        module.write_text(text)
        assert opening_names(module) == {name}
    module.write_text("json.load(file)\nopener(path)")
    assert not opening_names(module)


def test_children_run_nothing_from_the_current_folder() -> None:
    """`-m` puts the current folder first among the places of modules; `-P` does not."""
    commands = [
        (path, [ast.unparse(element) for element in node.elts])
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.List)
    ]
    children = [(path, words) for path, words in commands if words[:1] == ["sys.executable"]]
    assert len(children) >= 2
    for path, words in children:
        assert words[1] == "'-P'", path
