"""What is installed: the same files from wheel and sdist, under one name each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.house.test_house import MODULES, ROOT

# Stands beside a script of the user's; ours must not take its place, nor it ours.
OWN_MODULE = "WHOSE = 'the user'\n"
SCRIPT = """
import convert, quant
import apertus_mlx.convert.job, apertus_mlx.quant.spec
assert convert.WHOSE == quant.WHOSE == "the user"
from apertus_mlx import load
with load() as model:
    print(model.generate("What is the capital of France?", temperature=0).text)
"""


def build(project: Path, kind: str, target: Path) -> Path:
    """The wheel or sdist of `project`, built without asking an index."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)],
        cwd=project, check=True, capture_output=True,
    )  # fmt: skip
    [package] = target.iterdir()
    return package


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))) as archive:
        archive.extractall(folder, filter="data")
    [project] = folder.iterdir()
    return project


def files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name)


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    names = files(wheel)
    modules = {name for name in names if name.endswith(".py")}
    as_modules = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in modules
    }
    assert as_modules == set(MODULES)
    assert all(name.startswith("apertus_mlx/") for name in names)
    data = {Path(name).suffix for name in names if name not in modules}
    page = {".css", ".html", ".js"}
    assert data == page | {".json", ".jinja", ".md", ".metal", ".safetensors", ".txt", ".typed"}
    assert {"apertus_mlx/py.typed", "apertus_mlx/hub/demo/model/model.safetensors"} <= set(names)


def test_the_sdist_makes_the_same_wheel(wheel: Path, unpacked_sdist: Path, tmp_path: Path) -> None:
    assert files(build(unpacked_sdist, "wheel", tmp_path)) == files(wheel)


def test_the_sdist_has_the_tests_and_no_links(unpacked_sdist: Path) -> None:
    assert (unpacked_sdist / "tests" / "house" / "test_packages.py").is_file()
    assert (unpacked_sdist / "README.md").is_file()
    assert not [path for path in unpacked_sdist.rglob("*") if path.is_symlink()]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, and what it depends on from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    shutil.unpack_archive(wheel, own, "zip")
    # A path that a .pth names is searched last, and .pth files in it, as of this checkout, are not.
    (own / "dependencies.pth").write_text(str(Path(np.__file__).parents[1]))
    return folder / "bin" / "python"


def test_installed_beside_modules_of_the_same_names(installed: Path, tmp_path: Path) -> None:
    for name in ("quant.py", "convert.py"):
        (tmp_path / name).write_text(OWN_MODULE)
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [installed, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "Paris" in run.stdout


@pytest.mark.parametrize("name", ["convert", "quant", "benchmarks", "recipes", "tests"])
def test_no_common_name_is_installed(installed: Path, tmp_path: Path, name: str) -> None:
    run = subprocess.run(
        [installed, "-c", f"import {name}"], cwd=tmp_path, capture_output=True, text=True,
        check=False, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert "ModuleNotFoundError" in run.stderr


def test_every_module_is_loaded_under_one_name(installed: Path, tmp_path: Path) -> None:
    names = [name for name in MODULES if not name.endswith("__main__") and ".peer" not in name]
    script = (
        "import importlib, sys, os\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "files = [os.path.realpath(m.__file__) for m in list(sys.modules.values())\n"
        "         if getattr(m, '__file__', None) and 'apertus_mlx' in m.__file__]\n"
        "assert len(files) == len(set(files)), sorted(files)\n"
        "print(len(files))"
    )
    for python, where in ((installed, tmp_path), (Path(sys.executable), ROOT)):
        run = subprocess.run(
            [python, "-c", script], cwd=where, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        assert int(run.stdout) >= len(names)
