"""A corpus of folders that neighbouring tools have written, each with the values it stands for."""

from __future__ import annotations

import importlib.metadata
import json
import re
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
DIED = "the process died"
# Characters of an error that the table shows.
MOST_SAID = 240


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
    """Write those of `cases` that are not there yet; what fails leaves the reason."""
    version = _version(package)
    base = write_base(corpus / "base")
    for case in cases:
        place = _place(tool, version, case, corpus)
        if _is_made(place):
            continue
        # A process that dies leaves this behind.
        _begin(place, tool, version, case, DIED)
        try:
            values = case.make(base, place / "model")
        except Exception as error:  # of any library
            said = f"{type(error).__name__}: {error}"
            _begin(place, tool, version, case, _one_line(said, corpus))
            print(f"{tool} {version}: {case.form}: not made: {said:.400}", flush=True)
            continue
        np.savez(place / EXPECTED, **values)  # type: ignore[arg-type]
        _tell(place, tool, version, case)
        print(f"{tool} {version}: {case.form}: made", flush=True)


def leave_out(tool: str, package: str, cases: list[Case], corpus: Path, reason: str) -> None:
    """Say why none of `cases` is made, as of a tool that cannot be installed."""
    for case in cases:
        _begin(_place(tool, "-", case, corpus), tool, "-", case, _one_line(reason, corpus))
    print(f"{tool} ({package}): left out: {reason}", flush=True)


def tell_death(corpus: Path, reason: str) -> None:
    """Write into the form at which a process died what it died of."""
    for path in corpus.glob(f"*/*/{ABOUT}"):
        about = json.loads(path.read_text())
        if about.get("not_made") == DIED:
            about["not_made"] = _one_line(f"{DIED}: {reason}", corpus)
            path.write_text(json.dumps(about))


def _version(package: str | None) -> str:
    if package is None:
        return "rebuilt"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _place(tool: str, version: str, case: Case, corpus: Path) -> Path:
    return corpus / f"{tool} {version}" / case.form.replace("/", " ")


def _is_made(place: Path) -> bool:
    about = place / ABOUT
    return about.exists() and "not_made" not in json.loads(about.read_text())


def _begin(place: Path, tool: str, version: str, case: Case, reason: str) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    _tell(place, tool, version, case, not_made=reason)


def _tell(place: Path, tool: str, version: str, case: Case, **more: str) -> None:
    about = {"tool": tool, "version": version, "form": case.form, "dtype": case.dtype}
    (place / ABOUT).write_text(json.dumps(about | more))


def _one_line(message: str, corpus: Path) -> str:
    """What of an error fits in the table: its first lines, without places on this machine."""
    words = " ".join(message.replace(str(corpus), "FOLDER").replace("|", "/").split())
    words = re.sub(r"/\S+/", "", words)
    return words if len(words) <= MOST_SAID else words[:MOST_SAID].rpartition(" ")[0] + " ..."


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
