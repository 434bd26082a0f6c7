"""Marks: what a template has in hand in place of the text of a control token.

A mark can be moved, joined and printed as any text. Whoever looks at its characters would see
others than the token's, so `look_past` refuses, and everything that looks calls it.
"""

from __future__ import annotations

import re

import jinja2

# Noncharacters: OPEN id CLOSE is a mark, ESCAPE keeps a message from writing one.
OPEN, CLOSE, ESCAPE = "\ufdd0", "\ufdd1", "\ufdd2"
MARK = re.compile(f"{OPEN}([0-9]{{1,9}}){CLOSE}")
RESERVED = re.compile(f"[{OPEN}{CLOSE}{ESCAPE}]")


class ControlTextError(jinja2.TemplateError):
    """The template looks at the text of a control token."""


def mark(token_id: int) -> str:
    """Return the mark of a special token."""
    return f"{OPEN}{token_id}{CLOSE}"


def look_past(value: object, doing: str) -> None:
    """Refuse a text that holds a mark; `doing` says what looks at it."""
    if isinstance(value, str) and OPEN in value:
        found = MARK.search(value)
        raise ControlTextError(
            f"it looks at the text of control token {found[0] if found else '?'} ({doing}), "
            "which is not supported"
        )
