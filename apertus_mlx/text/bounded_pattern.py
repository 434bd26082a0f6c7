"""Regular expressions that match so many characters at most, in so many steps at most.

A text that comes in pieces can be searched for them, whatever it says and wherever it is split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from re import _parser  # type: ignore[attr-defined]
from typing import Any

MAX_CHARACTERS = 256
# Ways to try a match at one place of a text; each takes some ten nanoseconds a character.
MAX_WAYS = 50_000

_CHARACTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
_WORD_EDGES = ("AT_BOUNDARY", "AT_NON_BOUNDARY")
_REFUSED = {
    "AT": r"`^`, `$`, `\A` and `\Z`, since a text comes in pieces",
    "ASSERT": r"look-ahead and look-behind, but for `\b`",
    "ASSERT_NOT": r"look-ahead and look-behind, but for `\b`",
    "GROUPREF": "references to groups",
    "GROUPREF_EXISTS": "references to groups",
}
# The fewest and the most characters of a part, and the ways to match it.
_Size = tuple[int, int, int]


def most_characters(pattern: str) -> int:
    """Return how many characters a match of `pattern` has at most.

    Raises:
        ValueError: it is no regular expression, or one without such bounds; says why.
    """
    try:
        tree = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression ({error})") from None
    if tree.state.groupdict:
        raise ValueError("names a group; no group can be referred to")
    if tree.state.flags & ~re.UNICODE.value:
        raise ValueError("sets flags for all of it; write `ignore_case`, or `(?s:...)`")
    try:
        least, most, _ = _size(tree)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not least:
        raise ValueError("matches where there is nothing")
    return most


def _size(parts: Iterable[tuple[Any, Any]]) -> _Size:
    """Measure parts that follow each other."""
    least, most, ways = 0, 0, 1
    for operation, argument in parts:
        part = _part_size(str(operation), argument)
        least, most, ways = least + part[0], most + part[1], ways * part[2]
        _require_small(most, ways)
    return least, most, ways


def _part_size(operation: str, argument: Any) -> _Size:
    if operation in _CHARACTERS:
        return 1, 1, 1
    if operation == "AT" and str(argument) in _WORD_EDGES:
        return 0, 0, 1
    if operation == "BRANCH":
        sizes = [_size(branch) for branch in argument[1]]
        return min(s[0] for s in sizes), max(s[1] for s in sizes), sum(s[2] for s in sizes)
    if operation in ("SUBPATTERN", "ATOMIC_GROUP"):
        return _size(argument[-1] if operation == "SUBPATTERN" else argument)
    if operation in _REPEATS:
        fewest, times, part = argument
        if times > MAX_CHARACTERS:
            raise ValueError(
                f"repeats a part more than {MAX_CHARACTERS} times or without end; write `{{0,50}}` "
                "for `*` and `{1,50}` for `+`"
            )
        least, most, ways = _size(part)
        total = 0
        for count in range(fewest, times + 1):
            total += ways**count
            _require_small(0, total)
        return least * fewest, most * times, total
    raise ValueError(f"has {_REFUSED.get(operation, operation.lower())}")


def _require_small(characters: int, ways: int) -> None:
    if characters > MAX_CHARACTERS:
        raise ValueError(f"can match more than {MAX_CHARACTERS} characters")
    if ways > MAX_WAYS:
        raise ValueError(
            f"can be tried in more than {MAX_WAYS} ways at one place; repeat fewer parts, or less"
        )
