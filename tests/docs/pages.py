"""Reads the fenced blocks of a page, and the commands in them and in its sentences.

How a block is meant follows from its language, as in the pages themselves:

- `sh`: commands, run as they stand; a block without language right below it is what they print.
- `console`: commands behind `$ `, each with what it prints. Behind `apertus-mlx chat`, lines that
  begin with `> ` are what a person types. A line `...` stands for any lines.
- `python`: run in order, with the names of the blocks before; a program of its own if it is a file.
- any language, below a sentence that ends with a file's name, as "This is `tools.json`:": the file.

`<!-- shown: parsed -->` right above a block: its commands are for another machine, or its code
needs what the page does not have; they are read and not run. `<!-- shown: nightly -->`: too long
for every day.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from tests.house.test_house import ROOT

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# Made by a command from the code, and compared with it elsewhere.
GENERATED = {"docs/commands.md"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- shown: (parsed|nightly) -->\n$")
_FILE = re.compile(r"`([\w.-]+\.(?:json|jsonl|py|toml|txt))`:\n\n$")
_INLINE = re.compile(r"(?<!`)`((?:\$ )?(?:apertus-mlx|python -m)\s[^`]+)`(?!`)")
_INDENTED = re.compile(r"^    ((?:apertus-mlx|python -m) .+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, text and line, its mark, the file that it is, its output."""

    kind: str
    text: str
    line: int
    mark: str | None
    file: str | None
    output: str | None


@dataclass(frozen=True, slots=True)
class Shown:
    """A line that a reader types, what a person types into it, and what it prints, if shown."""

    line: str
    typed: str
    output: str | None


def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text("utf-8")


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page, in order; what a block prints belongs to it."""
    found = list(_FENCE.finditer(text))
    printed = None
    for fence, following in zip_longest(found, found[1:]):
        if fence is printed:
            continue
        output = None
        if following and fence[1] == "sh" and not following[1]:
            between = text[fence.end() : following.start()]
            printed = None if between.strip() else following
            output = printed and printed[2]
        before = text[: fence.start()]
        mark, file = _MARK.search(before), _FILE.search(before)
        yield Block(
            fence[1], fence[2], text.count("\n", 0, fence.start()) + 1,
            mark and mark[1], file and file[1], output,
        )  # fmt: skip


def shown(block: Block) -> Iterator[Shown]:
    """The lines of an `sh` or `console` block."""
    if block.kind == "sh":
        lines = list(_whole_lines(block.text.splitlines()))
        for number, line in enumerate(lines, 1):
            yield Shown(line, "", block.output if number == len(lines) else None)
        return
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, *rest = part.splitlines()
        is_chat = line.split()[:2] == ["apertus-mlx", "chat"]
        typed = [each[2:] for each in rest if is_chat and each.startswith("> ")]
        output = [each for each in rest if not (is_chat and each.startswith("> "))]
        yield Shown(line, "".join(f"{each}\n" for each in typed), "".join(f"{o}\n" for o in output))


def _whole_lines(lines: list[str]) -> Iterator[str]:
    """Commands, each in one piece: a line that ends with a backslash goes on."""
    held = ""
    for line in lines:
        held += line
        if held.endswith("\\"):
            held = held[:-1]
        elif held.strip() and not held.lstrip().startswith("#"):
            yield held.strip()
            held = ""
        else:
            held = ""


def mentioned(text: str) -> Iterator[str]:
    """Commands in sentences, cells of tables and indented lines."""
    prose = _FENCE.sub("", text)
    for found in [*_INLINE.finditer(prose), *_INDENTED.finditer(prose)]:
        yield " ".join(found[1].removeprefix("$ ").replace("\\|", "|").split())


def pipelines(line: str) -> Iterator[list[list[str]]]:
    """What a line runs: commands joined by `&&`, each a list of what `|` joins, as words.

    `>` and `<` stay, as words of their own.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    stages: list[list[str]] = [[]]
    for word in lexer:
        if word == "&&":
            yield stages
            stages = [[]]
        elif word == "|":
            stages.append([])
        else:
            stages[-1].append(word)
    if stages != [[]]:
        yield stages
