"""Makes the corpus with the tools themselves, and prints how each folder is read.

    python -m benchmarks.neighbours FOLDER [--environments DIR] [--only MODULE ...]

Each group of tools runs in a virtual environment (`environments.py`), which pip builds in DIR. What
is there already is not made again. A form that a tool refuses to make, or dies at, is a row that
says why. Ends with 1 if a folder is read wrongly.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.neighbours import environments
from benchmarks.neighbours.check import check
from benchmarks.neighbours.corpus import leave_out, tell_death

OWN_PACKAGES = "this package with the extras test and parity"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--environments", type=Path, help="where they are; default: FOLDER/environments"
    )
    modules = sorted({name for each in environments.ENVIRONMENTS for name in each.modules})
    parser.add_argument("--only", nargs="+", choices=modules, help="make only what these write")
    options = parser.parse_args()
    folder = options.folder.resolve()
    place = (options.environments or folder / "environments").resolve()
    for each in environments.ENVIRONMENTS:
        make(each, place, folder, options.only)
    return 1 if report(folder) else 0


def make(
    environment: environments.Environment, place: Path, folder: Path, only: list[str] | None
) -> None:
    """Have an environment's tools write their folders."""
    modules = [name for name in environment.modules if only is None or name in only]
    if not modules:
        return
    try:
        python = environments.build(environment, place)
    except RuntimeError as error:
        for name in modules:
            module = tool(name)
            leave_out(module.TOOL, module.PACKAGE, module.cases(), folder, str(error))
        return
    for name in modules:
        if reason := environments.run(python, name, folder):
            print(f"{environment.name}: {name}: the process died: {reason}", file=sys.stderr)
            tell_death(folder, reason)


def tool(name: str) -> Any:
    """The module of a tool."""
    return importlib.import_module(f"benchmarks.neighbours.{name}")


def report(folder: Path) -> int:
    """Print the tables; returns how many folders are read wrongly."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    print(f"\n{date.today()}, {machine}, Python {platform.python_version()}\n")
    print("| environment | packages | makes the rows of |\n|---|---|---|")
    for each in environments.ENVIRONMENTS:
        tools = ", ".join(tool(name).TOOL for name in each.modules)
        print(f"| {each.name} | {', '.join(each.packages) or OWN_PACKAGES} | {tools} |")
    print("\n| tool | version | form | result |\n|---|---|---|---|")
    seen: Counter[str] = Counter()
    for row in check(folder):
        seen[row.kind] += 1
        result = f"**{row.result}: {row.fault}**" if row.fault else row.result
        print(f"| {row.tool} | {row.version} | {row.form} | {result} |", flush=True)
    print("\n" + "; ".join(f"{count} {kind}" for kind, count in sorted(seen.items())))
    return seen["read wrongly"]


if __name__ == "__main__":
    sys.exit(main())
