"""What a template has in hand in place of a text that contains control tokens.

It can be moved, joined, stripped of blanks and printed. Whatever looks at its characters is
refused, by Python itself: it is no `str`, and each operation that would look raises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import jinja2


class ControlTextError(jinja2.TemplateError):
    """The template looks at the text of a control token."""


class ControlToken(NamedTuple):
    """A special token that a template writes."""

    id: int
    name: str


class ControlText:
    """Plain texts and control tokens in order, at least one of these among them.

    Attributes:
        parts: The texts, none empty and no two side by side, and tokens.
        size: Its bytes, about.
    """

    METHODS = ("lstrip", "rstrip", "strip")

    def __init__(self, parts: list[str | ControlToken]):
        self.parts = parts
        self.size = sum(sys.getsizeof(part) for part in parts)

    def refuse(self, *_: object) -> NoReturn:
        """Raise the error for whatever looks at the text."""
        name = next(part.name for part in self.parts if isinstance(part, ControlToken))
        raise ControlTextError(
            f"it looks at the text of control token {name!r}, which is not supported"
        )

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = refuse
    __contains__ = __getitem__ = __iter__ = __len__ = __str__ = __repr__ = refuse

    def __bool__(self) -> bool:
        return True

    def __add__(self, other: object) -> Any:
        return concat([self, other]) if isinstance(other, str | ControlText) else NotImplemented

    def __radd__(self, other: object) -> Any:
        return concat([other, self]) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: int) -> Any:
        return concat([self] * count)

    __rmul__ = __mul__

    def lstrip(self) -> Any:
        """Return it without blanks in front."""
        first, *rest = self.parts
        return concat([self._stripped(first, str.lstrip), *rest])

    def rstrip(self) -> Any:
        """Return it without blanks behind."""
        *rest, last = self.parts
        return concat([*rest, self._stripped(last, str.rstrip)])

    def strip(self) -> Any:
        """Return it without blanks around it."""
        return self.lstrip().rstrip()

    def _stripped(self, part: str | ControlToken, strip: Callable[[str], str]) -> object:
        if any(
            isinstance(part, ControlToken) and part.name.strip() != part.name for part in self.parts
        ):
            self.refuse()
        return strip(part) if isinstance(part, str) else part

    def shown(self) -> str:
        """Return it for an error message."""
        return "".join(part if isinstance(part, str) else repr(part.name) for part in self.parts)


def concat(values: Iterable[Any]) -> Any:
    """Join texts, `ControlText`s and tokens: a `str` unless there is a token among them."""
    parts: list[str | ControlToken] = []
    plain: list[str] = []
    for value in values:
        for part in value.parts if isinstance(value, ControlText) else (value,):
            if isinstance(part, ControlToken):
                parts += [*filter(None, ["".join(plain)]), part]
                plain = []
            else:
                plain.append(part)
    text = "".join(plain)
    return ControlText([*parts, *filter(None, [text])]) if parts else text
