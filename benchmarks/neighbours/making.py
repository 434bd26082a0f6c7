"""Has one tool write its folders: `python -m benchmarks.neighbours.making MODULE FOLDER`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from benchmarks.neighbours.corpus import make

if __name__ == "__main__":
    module = import_module(f"benchmarks.neighbours.{sys.argv[1]}")
    make(module.TOOL, module.PACKAGE, module.cases(), Path(sys.argv[2]))
