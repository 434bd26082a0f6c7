"""Whether all that is public of the Swift package is documented: types, functions, initializers.

    python -m tests.swift_fixtures.documented FOLDER

FOLDER holds what `swift symbolgraph-extract` wrote. What has no words is printed, and ends this
with exit code 1. Properties and cases may share those of the type, or of the one before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

KINDS = {
    f"swift.{kind}"
    for kind in ("class", "struct", "enum", "protocol", "func", "init", "method", "type.method")
}


def main() -> None:
    """Look at every graph."""
    graphs = sorted(Path(sys.argv[1]).glob("*.symbols.json"))
    symbols = [
        (graph.name.split(".")[0], symbol)
        for graph in graphs
        for symbol in json.loads(graph.read_text(encoding="utf-8"))["symbols"]
    ]
    if len(symbols) < 300:
        sys.exit(f"{sys.argv[1]}: {len(symbols)} symbols are too few")
    bare = [
        f"{module}.{'.'.join(symbol['pathComponents'])}"
        for module, symbol in symbols
        if symbol["kind"]["identifier"] in KINDS and "docComment" not in symbol
    ]
    if bare:
        sys.exit("without a word: " + ", ".join(bare))


main()
