"""What is printed: everything through one sink, and nothing in it that a terminal obeys."""

from __future__ import annotations

import ast
import json
import logging
import unicodedata
import warnings
from pathlib import Path

import pytest

from apertus_mlx.cli import sink
from tests.house.test_house import SOURCES, module_name
from tests.text.test_text_stream import FAMILY

SINK = "apertus_mlx.cli.sink"
# Those that look at the standard streams or mend them, without a word.
MAY_NAME_STREAMS = {
    SINK, "apertus_mlx.cli.surroundings", "apertus_mlx.cli.prompt_text", "apertus_mlx.cli.output",
    "apertus_mlx.cli.chat", "apertus_mlx.cli.chat_lines", "apertus_mlx.cli.line_editor",
    "apertus_mlx.cli.generate", "apertus_mlx.cli.progress",
}  # fmt: skip
# All that the sink may not let through: controls, separators of lines, overrides of direction.
OBEYED = [
    chr(code)
    for code in range(0x110000)
    if unicodedata.category(chr(code)) in ("Cc", "Cs", "Zl", "Zp")
    or unicodedata.bidirectional(chr(code))
    in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
]


def test_what_a_terminal_obeys_is_escaped() -> None:
    assert len(OBEYED) == 65 + 2048 + 2 + 9
    for character in OBEYED:
        shown = sink.printable(f"a{character}b")
        assert shown.isprintable() and shown.startswith("a\\") and shown.endswith("b")
        assert ast.literal_eval(f'"{shown}"') == f"a{character}b"
    assert sink.printable("\x1b[31mred\x9b2J\r") == "\\x1b[31mred\\x9b2J\\r"


def test_text_stays() -> None:
    text = f"é {FAMILY} \xa0 שלום\u200f عربي\u200c 日本 \\x1b \U0001f3f4\U000e0067\U000e007f"
    assert sink.printable(text) == text
    assert sink.printable("a\tb\nc", keep=sink.LAYOUT) == "a\tb\nc"
    assert sink.printable("a\tb\nc") == "a\\tb\\nc"


def test_json_keeps_its_value() -> None:
    value = {f"a{character}b": [f"{character} é日"] for character in OBEYED}
    text = sink.printable_json(json.dumps(value, ensure_ascii=False, indent=2))
    assert json.loads(text) == value
    assert text.count("é日") == len(OBEYED)
    assert all(line.isprintable() for line in text.split("\n"))


def test_messages_of_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    shown, handlers = warnings.showwarning, logging.root.handlers[:]
    try:
        logging.root.handlers = []
        sink.take_messages()
        logging.getLogger("anybody").warning("a %s", "\x1b]0;title\x07")
        warnings.showwarning("b \x9b31m", RuntimeWarning, "file", 1)
    finally:
        warnings.showwarning, logging.root.handlers = shown, handlers
    out, err = capsys.readouterr()
    assert (out, err) == ("", "a \\x1b]0;title\\x07\nRuntimeWarning: b \\x9b31m\n")


def _printing(path: Path) -> list[str]:
    """What in a file prints by itself: `print`, `echo`, and the standard streams by name."""
    module = module_name(path)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        named = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
        if named in ("print", "pprint") or named.endswith((".echo", ".secho", ".print_exc")):
            found.append(named)
        elif named in ("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"):
            found += [named] * (module not in MAY_NAME_STREAMS)
        elif named.startswith(("sys.stdout.", "sys.stderr.")) and module != SINK:
            allowed = named.endswith((".isatty", ".encoding", ".fileno", ".buffer"))
            found += [named] * (not allowed)
    return found


def test_nothing_else_prints() -> None:
    # The program that renders templates answers in its stdout, which is a pipe.
    program = "apertus_mlx.text.template.sandbox"
    for path in SOURCES:
        if module_name(path) not in (SINK, program):
            assert not _printing(path), path
