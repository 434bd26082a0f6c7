"""Makes the corpus with whatever of the tools is installed, and prints how it is read.

    python -m benchmarks.neighbours FOLDER [--make-only]

Tools that exclude each other (transformers 4 and 5) take turns: run it once in each environment on
the same FOLDER, with `--make-only` where this package's own dependencies are too old. What is there
already is not made again. Ends with 1 if a folder is read wrongly.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from datetime import date
from pathlib import Path

from benchmarks.neighbours.corpus import make

MODULES = {
    "mlx_lm": "with_mlx_lm", "transformers": "with_transformers",
    "compressed_tensors": "with_compressed_tensors", "gptqmodel": "with_gptqmodel",
    "auto_round": "with_auto_round", "numpy": "rebuilt",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make-only", action="store_true")
    parser.add_argument("--only", choices=MODULES, help="make only what this tool writes")
    options = parser.parse_args()
    for package, name in MODULES.items():
        if options.only in (None, package) and importlib.util.find_spec(package):
            module = importlib.import_module(f"benchmarks.neighbours.{name}")
            make(module.TOOL, module.PACKAGE, module.cases(), options.folder)
    return 0 if options.make_only else report(options.folder)


def report(folder: Path) -> int:
    """Print the table; returns 1 if something is read wrongly."""
    from benchmarks.neighbours.check import check

    print(f"\n{date.today()}, {platform.system()} {platform.machine()}\n")
    print("| tool | version | form | result |\n|---|---|---|---|")
    faults = 0
    for row in check(folder):
        faults += bool(row.fault)
        result = f"**{row.result}: {row.fault}**" if row.fault else row.result
        print(f"| {row.tool} | {row.version} | {row.form} | {result} |", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
