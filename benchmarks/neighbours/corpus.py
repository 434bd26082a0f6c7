"""A corpus of folders that neighbouring tools have written, each with the values it stands for."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests import convert_builders as build

Values = dict[str, NDArray[np.float32]]
# The type that a library computes its values in -> the relative error of a few roundings to it.
ROUNDING = {"float32": 2.0**-21, "float16": 2.0**-10, "bfloat16": 2.0**-7}
EXPECTED, ABOUT = "expected.npz", "about.json"


@dataclass(frozen=True)
class Case:
    """One form: `make(base, folder)` writes it and returns what each weight matrix means."""

    form: str
    make: Callable[[Path, Path], Values]
    dtype: str = "float32"


def write_base(folder: Path) -> Path:
    """The unquantized model that all forms are made from, as transformers 4 would write it."""
    if not (folder / "config.json").exists():
        build.write_checkpoint(folder, build.config())
    return folder


def make(tool: str, package: str | None, cases: list[Case], corpus: Path) -> None:
    """Write those of `cases` that are not there yet; what fails is said and left out."""
    version = importlib.metadata.version(package) if package else "rebuilt"
    base = write_base(corpus / "base")
    for case in cases:
        place = corpus / f"{tool} {version}" / case.form.replace("/", " ")
        if (place / ABOUT).exists():
            continue
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            values = case.make(base, place / "model")
        except Exception as error:  # of any library
            print(f"{tool} {version}: {case.form}: could not be made: {error!r:.200}")
            continue
        np.savez(place / EXPECTED, **values)  # type: ignore[arg-type]
        about = {"tool": tool, "version": version, "form": case.form, "dtype": case.dtype}
        (place / ABOUT).write_text(json.dumps(about))
        print(f"{tool} {version}: {case.form}: made")


def base_values(base: Path) -> Values:
    """What each weight matrix of the unquantized model means."""
    return matrices(build.read_folder(base))


def matrices(tensors: Mapping[str, build.Raw]) -> Values:
    """The weight matrices among the tensors of an unquantized folder, by module path."""
    return {
        name.removesuffix(".weight"): build.floats(tensor).astype(np.float32)
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2
    }
