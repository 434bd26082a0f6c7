"""The shape of the house: its rooms, who imports whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "apertus_mlx"
# `apertus_mlx/convert` and `apertus_mlx/quant` are links to folders beside it.
FOLDERS = (ROOT / PACKAGE, ROOT / "convert", ROOT / "quant")
SOURCES = sorted({path.resolve() for folder in FOLDERS for path in folder.rglob("*.py")})
CLI, CONVERT = "apertus_mlx.cli", "apertus_mlx.convert"
# From the ground up: a room knows only those named before it.
ROOMS = (
    "errors",
    "quant",
    "system",
    "text",
    "cache",
    "checkpoint",
    "hub",
    "model",
    "backend",
    "memory",
    "generation",
    "measure",
    "api",
    "convert",
    "tools",
    "server",
    "cli",
    "__main__",
)
# Loose modules at the root: the doors, and the errors that come out of them.
AT_THE_ROOT = {"__init__", "__main__", "api", "tools", "errors"}
# Heavy or foreign packages, and the only modules that may import them.
OUTSIDERS = {
    "transformers": (),
    "torch": (),
    "mlx_lm": ("apertus_mlx.measure.bench.peer",),
    "compressed_tensors": (),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in ("convert", "quant"):
        parts = (PACKAGE, *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Modules that `path` imports, each with whether it is imported when the file is."""
    tree = ast.parse(path.read_text())
    later = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef) or _is_type_checking(block)
        for node in ast.walk(block)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [(name, id(node) not in later) for name in names]
    return found


def _is_type_checking(node: ast.AST) -> bool:
    """`if TYPE_CHECKING:`, which never runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imported_modules(path: Path) -> set[str]:
    """Modules of ours that `path` imports, those for types alone included."""
    found = set()
    for name, _ in imports(path):
        if within(name, PACKAGE):
            found.add(name if name in MODULES else name.rpartition(".")[0])
    return found - {PACKAGE, module_name(path)}


def floor(module: str) -> int:
    """How high the room of `module` lies; the package itself only hands on what others define."""
    parts = module.split(".")
    return ROOMS.index(parts[1]) if len(parts) > 1 else len(ROOMS)


def test_every_room_knows_only_those_below() -> None:
    for module, path in MODULES.items():
        for imported in imported_modules(path):
            assert floor(imported) <= floor(module), f"{module} imports {imported}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    # A package's own file may hand on the names of its modules.
    graph = {
        module: imported_modules(path)
        for module, path in MODULES.items()
        if path.name != "__init__.py"
    }
    TopologicalSorter(graph).prepare()


def test_the_root_has_only_doors_and_rooms() -> None:
    root = ROOT / PACKAGE
    assert {path.stem for path in root.glob("*.py")} == AT_THE_ROOT
    folders = {path.parent.name for path in root.glob("*/__init__.py")}
    assert folders | AT_THE_ROOT - {"__init__"} == set(ROOMS)
    assert len({"__init__", *ROOMS, "benchmarks", "recipes"}) <= 21


def test_the_attention_is_read_in_one_file() -> None:
    """All that its file takes from others is the cache, the config and how matrices are kept."""
    path = ROOT / "apertus_mlx" / "model" / "apertus.py"
    assert imported_modules(path) == {
        "apertus_mlx.cache",
        "apertus_mlx.cache.attention",
        "apertus_mlx.cache.protocol",
        "apertus_mlx.checkpoint.config",
        "apertus_mlx.model.embedding",
        "apertus_mlx.model.language_model",
        "apertus_mlx.model.linear",
    }


def test_commands_import_convert_only_when_they_run() -> None:
    for module, path in MODULES.items():
        if floor(module) > floor(CONVERT):
            early = [name for name, at_once in imports(path) if at_once and within(name, CONVERT)]
            assert not early, f"{path}: {early}"


def test_outsiders_stay_out() -> None:
    for module, path in MODULES.items():
        for imported, _ in imports(path):
            for outsider, homes in OUTSIDERS.items():
                if within(imported, outsider):
                    assert any(within(module, home) for home in homes), f"{module}: {imported}"


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    names = set(run.stdout.splitlines()[-1].split())
    return names | {name.split(".")[0] for name in names}


def test_importing_the_package_is_cheap() -> None:
    loaded = loaded_after("import apertus_mlx")
    assert not loaded & {"mlx", "numpy", "tokenizers", "huggingface_hub", "typer", CONVERT}


def test_the_command_line_starts_light() -> None:
    loaded = loaded_after("import apertus_mlx.cli.app")
    assert not loaded & {"mlx", "numpy", "tokenizers", "jinja2", "huggingface_hub", CONVERT}


def test_first_token_without_transformers() -> None:
    loaded = loaded_after(
        "from apertus_mlx import load\n"
        "with load() as model:\n"
        "    next(iter(model.stream('What is the capital of France?')))"
    )
    assert "mlx" in loaded
    assert not loaded & {"transformers", "torch", "mlx_lm", "huggingface_hub", CONVERT}


def test_no_pickle_anywhere() -> None:
    forbidden = (
        "import pickle",
        "torch.load",
        "allow_pickle=True",
        "trust_remote_code=True",
        "shell=True",
    )
    for path in SOURCES:
        text = path.read_text()
        assert not [word for word in forbidden if word in text], path
