"""Making text and numbers inside a chat template, each operation charged before it is done."""

from __future__ import annotations

import re
import string
import sys
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.sandbox

from apertus_mlx.text.template.budget import (
    OBJECT_BYTES,
    SCALARS,
    SEQUENCES,
    Budget,
    LimitError,
)
from apertus_mlx.text.template.marks import look_past

MAX_INTEGER_BITS = 256
TEXT_METHODS = frozenset(
    """
    capitalize casefold count endswith find format format_map index isalnum isalpha isascii
    isdecimal isdigit islower isnumeric isspace istitle isupper join lower lstrip partition
    removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines
    startswith strip swapcase title upper
    """.split()  # noqa: SIM905
)


def as_text(budget: Budget, value: Any) -> str:
    """Return `value` as a template prints it, charged."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | dict):
        count, text_bytes = budget.weigh(value, "printing a list")
        budget.hold(10 * text_bytes + 80 * count)
    elif not isinstance(value, SCALARS):
        raise LimitError(f"it prints a {type(value).__name__}")
    return str(value)


def character_bytes(value: str | list[Any] | tuple[Any, ...]) -> int:
    """Return the most bytes that one character or element of `value` takes."""
    if not isinstance(value, str):
        return 8
    return 1 if value.isascii() else 4


def join_texts(budget: Budget, separator: str, texts: list[str]) -> str:
    """Return `separator.join(texts)`."""
    length = sum(map(len, texts)) + len(separator) * max(len(texts) - 1, 0)
    wide = max((character_bytes(text) for text in (separator, *texts)), default=1)
    budget.step(length >> 10)
    budget.hold(OBJECT_BYTES + wide * length)
    return separator.join(texts)


def bounded(value: Any) -> Any:
    """Return `value`, refusing an integer of more than `MAX_INTEGER_BITS`."""
    if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise LimitError("it makes a very large number")
    return value


def percent_format(budget: Budget, text: str, values: Any) -> str:
    """Compute `text % values`, refusing wide fields."""
    if re.search(r"%[^a-zA-Z%]*(\*|\d{4})", text):
        raise LimitError("it asks for a very wide field")
    plain = "%" not in re.sub("%[%s]", "", text)
    count, text_bytes = budget.weigh(values, None if plain else "formatting")
    places = text.count("%")
    budget.step(places)
    budget.hold(sys.getsizeof(text) + places * (1000 + 10 * text_bytes + 80 * count))
    result: str = text % values
    return result


class Formatter(jinja2.sandbox.SandboxedFormatter):
    """`str.format` in the sandbox, refusing wide fields."""

    def __init__(self, environment: jinja2.Environment, budget: Budget):
        super().__init__(environment)
        self._charge = budget

    def format_field(self, value: Any, format_spec: str) -> Any:
        """Format one field, charged."""
        self._charge.step()
        if format_spec:
            look_past(value, "formatting")
        if len(format_spec) > 64 or re.search(r"\d{4}", format_spec):
            raise LimitError("it asks for a very wide field")
        return self._charge.text(
            format(value if format_spec else as_text(self._charge, value), format_spec)
        )

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """Apply `!s`, `!r` or `!a`, charged."""
        if conversion is None:
            return value
        look_past(value, "formatting")
        self._charge.hold(10 * sys.getsizeof(as_text(self._charge, value)))
        return string.Formatter.convert_field(self, value, conversion)


def call_text_method(
    budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return `text.name(*args, **kwargs)`, for a name in `TEXT_METHODS`."""
    if name == "join":
        return join_texts(budget, text, _texts_to_join(budget, *args, **kwargs))
    if name == "replace":
        return replace_text(budget, text, *args, **kwargs)
    strips_blanks = name in ("strip", "lstrip", "rstrip") and not args
    doing = None if strips_blanks else f"the method {name}"
    budget.weigh((text, *args, *kwargs.values()), doing)
    if name in ("split", "rsplit", "splitlines"):
        budget.hold(80 * pieces_of_split(text, name, *args, **kwargs) + sys.getsizeof(text))
    elif name in ("lower", "upper", "title", "capitalize", "casefold", "swapcase"):
        budget.hold(3 * sys.getsizeof(text))
    elif name not in ("count", "find", "index"):
        budget.hold(sys.getsizeof(text))
    return getattr(text, name)(*args, **kwargs)


def _texts_to_join(budget: Budget, values: Any, /) -> list[str]:
    """Return the texts to join, as `str.join` demands them."""
    if not isinstance(values, (Iterator, str, dict, *SEQUENCES)):
        raise TypeError("can only join a list of texts")
    look_past(values, "the method join")
    if not isinstance(values, Iterator):
        budget.weigh(values)
    texts = list(values)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("can only join texts")
    return texts


def pieces_of_split(text: str, name: str, sep: Any = None, maxsplit: Any = -1, **_: Any) -> int:
    """Return at least the number of pieces that a split makes."""
    if name == "splitlines":
        return 1 + sum(map(text.count, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"))
    if isinstance(maxsplit, int) and maxsplit >= 0:
        return maxsplit + 1 if maxsplit < len(text) else len(text) + 1
    if isinstance(sep, str) and sep:
        return 1 + text.count(sep)
    if text.isascii():
        return 1 + sum(map(text.count, " \t\n\r\v\f\x1c\x1d\x1e\x1f"))
    return 1 + len(text) // 2


def replace_text(budget: Budget, text: str, old: Any, new: Any, count: Any = -1) -> str:
    """Return `text.replace(old, new, count)`."""
    old, new = as_text(budget, old), as_text(budget, new)
    budget.weigh((text, old), "replace")
    budget.weigh(new)
    places = text.count(old)
    wide = max(character_bytes(text), character_bytes(new))
    budget.hold(OBJECT_BYTES + wide * (len(text) + places * max(len(new) - len(old), 0)))
    return text.replace(old, new, -1 if count is None else count)
