"""Compiles translated kernels with the host's C++ compiler, each text once.

The environment variable METAL_HARNESS_CXX names the compiler; without it the first of g++ and
clang++ that is installed. Compiled kernels lie in the cache of pytest, named by what they were
made from; processes that compile the same kernel at the same time do not disturb each other.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import TranslationError

CPP = Path(__file__).parent / "cpp"
CACHE = Path(__file__).parents[2] / ".pytest_cache" / "metal_harness"
KEPT_S = 3 * 24 * 3600
LANGUAGE = ("-std=c++17", "-fPIC", f"-I{CPP}", "-fno-strict-aliasing")
OPTIMIZATION = "-O1"
# Each of them ends the launch: a trap is a signal, and the runtime catches it.
CHECKS = (
    "-fsanitize=alignment,shift,integer-divide-by-zero,bounds,signed-integer-overflow,"
    "float-cast-overflow",
    "-fsanitize-undefined-trap-on-error",
)
# A variable that is read before it is written holds a number far from all others.
UNWRITTEN = "-ftrivial-auto-var-init=pattern"
# Of all warnings, what is wrong in Metal too.
WARNINGS = ("-Werror=uninitialized", "-Werror=return-type")


@dataclass(frozen=True, slots=True)
class Options:
    """How the host computes what Metal leaves open."""

    # Whether a * b + c may be one operation with one rounding, as Metal's compiler may choose.
    contracts: bool = False


@cache
def compiler() -> tuple[str, ...] | None:
    """The command of a C++ compiler; None if there is none."""
    chosen = os.environ.get("METAL_HARNESS_CXX")
    if chosen:
        return tuple(chosen.split())
    found = next(filter(shutil.which, ("g++", "clang++")), None)
    return None if found is None else (found,)


def missing() -> str | None:
    """Why kernels cannot be compiled here; None if they can."""
    if platform.machine() not in ("x86_64", "arm64", "aarch64"):
        return f"the harness has no context switch for {platform.machine()}"
    if compiler() is None:
        return "needs a C++ compiler (g++ or clang++)"
    return None


@cache
def _host_flags() -> tuple[str, ...]:
    """What this compiler and this processor can do beyond the least."""
    flags = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "empty.cpp").touch()
        probe = _run_compiler([UNWRITTEN, "-c", "empty.cpp"], Path(folder))
    if probe.returncode == 0:
        flags.append(UNWRITTEN)
    info = Path("/proc/cpuinfo")
    if platform.machine() == "x86_64" and info.exists():
        features = set(info.read_text().split())
        flags += [f"-m{feature}" for feature in ("f16c", "fma") if feature in features]
    return tuple(flags)


def _run_compiler(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = compiler()
    assert command is not None, missing()
    return subprocess.run(
        [*command, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def library(cpp: str, options: Options) -> Path:
    """The shared library of a translated kernel.

    Raises:
        TranslationError: the compiler refuses the text.
    """
    contraction = f"-ffp-contract={'fast' if options.contracts else 'off'}"
    flags = (OPTIMIZATION, contraction, *LANGUAGE, *_host_flags(), *CHECKS, *WARNINGS)
    return _cached(cpp, flags, (*map(str, _runtime()), "-shared", "-lm"), ".so")


@cache
def _runtime() -> tuple[Path, ...]:
    flags = ("-O2", *LANGUAGE, "-c")
    sources = sorted((CPP / "runtime").glob("*.cpp"))
    return tuple(_cached(source.read_text(), flags, (), ".o") for source in sources)


@cache
def _shim() -> str:
    return "".join(path.read_text() for path in sorted(CPP.rglob("*")) if path.is_file())


def _cached(cpp: str, flags: Sequence[str], link: Sequence[str], suffix: str) -> Path:
    """What the compiler makes of `cpp`, made now unless it lies in the cache."""
    ingredients = "\0".join((*(compiler() or ()), *flags, *link, _shim(), cpp))
    path = CACHE / (hashlib.sha256(ingredients.encode()).hexdigest()[:24] + suffix)
    if path.exists():
        path.touch()
        return path
    _prepare_cache()
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="build-") as temporary:
        folder = Path(temporary)
        (folder / "kernel.cpp").write_text(cpp)
        made = "kernel" + suffix
        # Relative names, so that equal texts make equal files.
        run = _run_compiler([*flags, "kernel.cpp", *link, "-o", made], folder)
        if run.returncode:
            raise TranslationError(_first_errors(run.stderr))
        (folder / made).replace(path)
    return path


@cache
def _prepare_cache() -> None:
    """Once per process: what was not used for days goes."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.iterdir():
        try:
            if time.time() - old.stat().st_mtime > KEPT_S:
                old.unlink()
        except OSError:
            # A folder, or another process was quicker.
            continue


def _first_errors(messages: str) -> str:
    errors = [line for line in messages.splitlines() if "error" in line]
    return "does not compile: " + "\n".join(errors[:4] or messages.splitlines()[:4])
