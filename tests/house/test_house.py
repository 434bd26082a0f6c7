"""The shape of the house: who imports whom, what importing costs, and the rules of style."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "apertus_mlx"
# `apertus_mlx/convert` and `apertus_mlx/quant` are links to folders beside it.
FOLDERS = (ROOT / PACKAGE, ROOT / "convert", ROOT / "quant")
SOURCES = sorted({path.resolve() for folder in FOLDERS for path in folder.rglob("*.py")})
CLI, CONVERT = "apertus_mlx.cli", "apertus_mlx.convert"
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


def floor(module: str) -> int:
    """The ground floor is quant, then the runtime, then convert, then the command line."""
    if within(module, CLI) or module in ("apertus_mlx.__main__", "apertus_mlx.tools"):
        return 3
    if within(module, CONVERT):
        return 2
    return 0 if within(module, "apertus_mlx.quant") else 1


def test_every_floor_knows_only_those_below() -> None:
    for path in SOURCES:
        module = module_name(path)
        for imported, _ in imports(path):
            if within(imported, PACKAGE):
                assert floor(imported) <= floor(module), f"{module} imports {imported}"


def test_commands_import_convert_only_when_they_run() -> None:
    for path in SOURCES:
        if floor(module_name(path)) == 3:
            early = [name for name, at_once in imports(path) if at_once and within(name, CONVERT)]
            assert not early, f"{path}: {early}"


def test_outsiders_stay_out() -> None:
    for path in SOURCES:
        module = module_name(path)
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
        "from apertus_mlx.generation.options import SamplingOptions\n"
        "from apertus_mlx.generation.run import *\n"
        "from apertus_mlx.generation.model_folder import open_folder\n"
        "from apertus_mlx.demo import model_dir\n"
        "loaded = open_folder(model_dir()).load()\n"
        "next(iter(Generation(loaded, [1, 100], SamplingOptions())))"
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


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]],
    ids=["lint", "format", "types"],
)
def test_style(command: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
