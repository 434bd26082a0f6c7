"""docs/troubleshooting.md shows lines that the package prints, word by word.

A line is made of texts that stand in one module, and of values: names and figures.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.markdown import tokens
from tests.house.test_house import ROOT, SOURCES

PAGE = ROOT / "docs" / "troubleshooting.md"
LINES = [
    line.removeprefix("error: ")
    for token in tokens(PAGE)
    if token.type == "fence" and token.info == "text"
    for line in token.content.splitlines()
]
# What stands on the page for names, and for figures.
NAMES = re.compile(
    r"'?organisation/model'?|https://huggingface\.co|Apertus-8B|/Volumes/disk|\.model-MLX-4bit\.partial"
    r"|Apple M4 Pro|macOS 26\.\d \(25\w+\)|No module named 'onnxruntime'|no route to host"
    r"|\[quantized_matmul\] No implementation for problem shape: 1x64x300x8|MLX_ENABLE_TF32"
    r"|KeyError|'x'|'gptq'|^model|\(revision main\)|--schema|0123456789ab"
)
FIGURES = re.compile(r"\b\d[\d.,]*( tokens| bits| [kMG]B| s)?|(?<=\0)s\b|[\s():;,./\0]")
TEXTS = {path: path.read_text("utf-8") for path in SOURCES}
PIECE_OF_FORMAT = re.compile(r"%\.?\d?[sdf]")


@cache
def pieces(path: Path) -> frozenset[str]:
    """What stands in the texts of a module, between values."""
    return frozenset(
        piece
        for node in ast.walk(ast.parse(TEXTS[path]))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for piece in PIECE_OF_FORMAT.split(node.value)
        if len(piece) > 3
    )


def left_over(line: str, path: Path) -> str:
    """What of a line stands in no text of a module, and is no value."""
    line = NAMES.sub("\0", line)
    found = sorted((piece for piece in pieces(path) if piece in line), key=len, reverse=True)
    for piece in found:
        line = line.replace(piece, "\0")
    return FIGURES.sub("", line)


def candidates(line: str) -> list[Path]:
    """The modules that hold three words of a line in a row: the others need not be parsed."""
    words = line.split()
    threes = [" ".join(words[at : at + 3]) for at in range(len(words) - 2)]
    return [path for path, text in TEXTS.items() if any(three in text for three in threes)]


def is_printed(line: str) -> bool:
    return any(not left_over(line, path) for path in candidates(line))


@pytest.mark.parametrize("line", LINES)
def test_the_package_prints_the_line(line: str) -> None:
    left = [left_over(line, path) for path in candidates(line)]
    assert "" in left, left


def test_a_line_with_another_word_is_found_out() -> None:
    assert len(LINES) > 15
    for line in LINES[:4]:
        assert not is_printed(line + " again"), line
        # The words alone do not make it up.
        assert not is_printed(" ".join(reversed(line.split()))), line
