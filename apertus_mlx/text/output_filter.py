"""Output filters: what an answer must not say is replaced before anyone sees it.

A filter is a file of rules (docs/output-filter.md) or an object of a program. Each of the texts
of an answer is a stream of its own for it: the answer, the thoughts, the arguments of each call.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from apertus_mlx.errors import NotFoundError, RejectedError
from apertus_mlx.system.model_files import exists, read_own_file
from apertus_mlx.system.strict_json import parse_object
from apertus_mlx.text.bounded_pattern import MAX_CHARACTERS, most_characters

ENTRY_POINTS = "apertus_mlx.output_filters"
MAX_FILE_BYTES = 2**20
MAX_TEXTS = 10_000

# Arguments are the text of a JSON object.
FilteredKind = Literal["text", "thought", "arguments"]
_HALVES = re.compile("[\ud800-\udfff]")
_KEYS = {
    "texts": list,
    "pattern": str,
    "replacement": str,
    "ignore_case": bool,
    "whole_words": bool,
}


class FilterStream(Protocol):
    """One text on its way through a filter; what both methods return is the filtered text."""

    def push(self, text: str) -> str:
        """Take more of the text; return what is certain now."""
        ...

    def finish(self) -> str:
        """Return what was held back: no text follows."""
        ...


@runtime_checkable
class OutputFilter(Protocol):
    """What filters answers; how a text is split must make no difference to what comes out."""

    def begin(self, kind: FilteredKind) -> FilterStream:
        """Start with a new text."""
        ...


@dataclass(frozen=True, slots=True)
class Rule:
    """What is replaced, and by what.

    Attributes:
        pattern: a regular expression.
        most: characters that it matches at most.
        replacement: the text, with nothing in it that stands for anything else.
    """

    pattern: str
    most: int
    replacement: str


class RuleFilter:
    """Replaces every match of a rule; where several match, the first in the text, then in the list.

    What a rule has put in is not searched again.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        """Filter by `rules`, of which there is at least one."""
        self._pattern = re.compile(
            "|".join(f"(?P<rule{index}>{rule.pattern})" for index, rule in enumerate(rules))
        )
        self._most = max(rule.most for rule in rules)
        self._texts = {f"rule{index}": rule.replacement for index, rule in enumerate(rules)}
        self._json = {
            name: json.dumps(text, ensure_ascii=False)[1:-1] for name, text in self._texts.items()
        }

    def begin(self, kind: FilteredKind) -> FilterStream:
        """Start with a new text; in JSON, a replacement is written as JSON writes it."""
        texts = self._json if kind == "arguments" else self._texts
        return _RuleStream(self._pattern, self._most, texts)


class _RuleStream:
    """Holds back as many characters as the longest match has, and one that shows a word's end."""

    def __init__(self, pattern: re.Pattern[str], most: int, texts: Mapping[str, str]) -> None:
        self._pattern = pattern
        self._most = most
        self._texts = texts
        # The text not yet returned, after the last character of what was: it shows a word's start.
        self._text = ""
        self._start = 0

    def push(self, text: str) -> str:
        self._text += text
        return self._filtered(len(self._text) - self._most)

    def finish(self) -> str:
        return self._filtered(len(self._text) + 1)

    def _filtered(self, end: int) -> str:
        """Return the text up to `end`, or to the end of a match that begins before it."""
        parts, position = [], self._start
        while position < end and (found := self._pattern.search(self._text, position)):
            if found.start() >= end:
                break
            parts += [self._text[position : found.start()], self._texts[str(found.lastgroup)]]
            position = found.end()
        end = max(position, min(end, len(self._text)))
        parts.append(self._text[position:end])
        self._start = min(end, 1)
        self._text = self._text[end - self._start :]
        return "".join(parts)


def load_output_filter(source: str | os.PathLike[str] | OutputFilter) -> OutputFilter:
    """Return the filter that a file of rules, or an installed package by an entry point, has.

    An entry point of the group `apertus_mlx.output_filters` is a function that returns a filter.

    Raises:
        NotFoundError: there is neither.
        RejectedError: the file is no file of rules, or the entry point fails or returns no filter.
    """
    if isinstance(source, OutputFilter):
        return source
    path = Path(source)
    if exists(path):
        return read_rules(path)
    from importlib.metadata import entry_points

    for found in entry_points(group=ENTRY_POINTS, name=str(source)):
        try:
            made = found.load()()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise RejectedError(
                f"output filter {found.name}: {found.value} fails ({reason})"
            ) from error
        if not isinstance(made, OutputFilter):
            raise RejectedError(f"output filter {found.name}: {found.value} returns no filter")
        return made
    raise NotFoundError(
        f"{path}: there is no such file of rules, nor a filter of this name (entry point of "
        f"{ENTRY_POINTS}) in an installed package"
    )


def read_rules(path: Path) -> RuleFilter:
    """Return the filter that a file of rules describes.

    Raises:
        RejectedError: the file is damaged, or a rule is none or has no bounds; says which, and why.
    """
    value = parse_object(read_own_file(path, MAX_FILE_BYTES), str(path))
    rules = value.get("rules")
    if not isinstance(rules, list) or not rules or len(value) != 1:
        raise RejectedError(
            f'{path}: expected {{"rules": [...]}} with a rule or more, no other key'
        )
    made = [_rule(rule, f"{path}: rules[{index}]") for index, rule in enumerate(rules)]
    texts = sum(len(rule.get("texts", ("",))) for rule in rules)
    if texts > MAX_TEXTS:
        raise RejectedError(f"{path}: has {texts} texts and patterns; {MAX_TEXTS} at most")
    return RuleFilter(made)


def _rule(value: Any, where: str) -> Rule:
    if not isinstance(value, dict):
        raise RejectedError(f"{where}: expected an object")
    for key, found in value.items():
        if key not in _KEYS:
            raise RejectedError(f"{where}: unknown key {key[:40]!r}; there are {', '.join(_KEYS)}")
        if not isinstance(found, _KEYS[key]):
            raise RejectedError(f"{where}.{key}: expected {_KEYS[key].__name__}")
        for text in found if isinstance(found, list) else [found]:
            if isinstance(text, str) and _HALVES.search(text):
                raise RejectedError(
                    f"{where}.{key}: has half of a surrogate pair, which is no text"
                )
    if ("texts" in value) == ("pattern" in value):
        raise RejectedError(f"{where}: expected either texts or pattern")
    if "replacement" not in value:
        raise RejectedError(f"{where}: has no replacement; it may be empty")
    if "pattern" in value:
        if "whole_words" in value:
            raise RejectedError(rf"{where}: whole_words is for texts; write \b in a pattern")
        pattern = value["pattern"]
        try:
            most = most_characters(pattern)
        except ValueError as error:
            raise RejectedError(f"{where}.pattern: {error}") from None
    else:
        pattern, most = _alternatives(value["texts"], f"{where}.texts")
    if value.get("whole_words"):
        pattern = rf"(?<!\w)(?:{pattern})(?!\w)"
    if value.get("ignore_case"):
        pattern = f"(?i:{pattern})"
    return Rule(pattern, most, value["replacement"])


def _alternatives(texts: Sequence[Any], where: str) -> tuple[str, int]:
    """A pattern for any of `texts`, the longest first."""
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise RejectedError(f"{where}: expected texts, and none that is empty")
    longest = max(map(len, texts))
    if longest > MAX_CHARACTERS:
        raise RejectedError(f"{where}: one has {longest} characters; {MAX_CHARACTERS} at most")
    ordered = sorted(texts, key=len, reverse=True)
    return "|".join(map(re.escape, ordered)), longest
