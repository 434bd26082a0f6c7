"""Which regular expressions have bounds; that they keep them is what `re` itself finds."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apertus_mlx.text.bounded_pattern import MAX_WAYS, most_characters


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        ("abc", 3),
        (r"\b\d{3}-\d{2}\b", 6),
        ("a|bcd|ef", 3),
        ("x(?:ab?){1,3}", 7),
        (r"[\w.+-]{1,64}@[\w-]{1,64}\.[a-z]{2,10}", 140),
        ("(?i:a)(?>b{1,3})c{1,2}+", 6),
        (r"\Bé.[^a]", 3),
    ],
)
def test_bounds(pattern: str, most: int) -> None:
    assert most_characters(pattern) == most


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("a*", "without end"),
        ("a+b", "without end"),
        ("a{2,}", "without end"),
        ("a{300}", "more than 256 times"),
        ("a{200}b{57}", "more than 256 characters"),
        ("(a{0,9}){0,9}b", "ways"),
        ("(a|a){1,30}b", "ways"),
        ("a{0,50}a{0,50}a{0,50}b", "ways"),
        ("a?", "nothing"),
        ("", "nothing"),
        (r"\b", "nothing"),
        ("^a", "in pieces"),
        ("a$", "in pieces"),
        (r"a\Z", "in pieces"),
        ("a(?=b)", "look-ahead"),
        ("(?<!b)a", "look-behind"),
        (r"(a)\1", "references"),
        ("(a)?(?(1)b|c)", "references"),
        ("(?P<x>a)", "names a group"),
        ("(?i)a", "ignore_case"),
        ("(", "no regular expression"),
        ("a)|(b", "no regular expression"),
        ("[b-a]", "no regular expression"),
        ("(" * 5000 + "a" + ")" * 5000, "recursion"),
    ],
)
def test_refusals(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        most_characters(pattern)


_PATTERNS = st.recursive(
    st.sampled_from(["a", "b", "[ab]", ".", "[^a]", r"\w", r"\b", "ab"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["?", "{2}", "{0,3}", "{1,2}?", "{1,3}+"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(pattern=_PATTERNS, text=st.text("ab-", max_size=20))
def test_no_match_is_longer_or_empty(pattern: str, text: str) -> None:
    try:
        most = most_characters(pattern)
    except ValueError:
        return
    compiled = re.compile(pattern)
    lengths = [
        end - start
        for start in range(len(text))
        for end in range(start, len(text) + 1)
        if compiled.fullmatch(text, start, end)
    ]
    assert all(0 < length <= most for length in lengths)


def test_the_ways_are_counted() -> None:
    """A choice of two, `n` times, has 2 to the `n` ways."""
    most = MAX_WAYS.bit_length() - 1
    most_characters("(?:ab|ba)" * most)
    with pytest.raises(ValueError, match="ways"):
        most_characters("(?:ab|ba)" * (most + 1))
