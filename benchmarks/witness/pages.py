"""From a page to its paragraphs: roff of manual pages, HTML, and Mallard, GNOME's XML."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from html.parser import HTMLParser

from benchmarks.witness.sources import Form

# Shorter ones, and those with few letters, are options, names and tables.
LEAST_CHARACTERS, LEAST_LETTERS = 24, 0.6
# Requests that begin a paragraph, with or without a text of their own.
_BREAKS = re.compile(r"\.\s*(SH|SS|PP|LP|P|TP|TQ|IP|HP|Pp|Sh|Ss|It|br|sp|RS|RE)\b")
# What stands in their arguments is text.
_TEXTS = re.compile(r"\.\s*(SH|SS|B|I|BR|RB|IR|RI|BI|IB|SM|SB)\s+(.*)")
# From each of these to its end there is no prose.
_SKIPPED = {"TS": "TE", "nf": "fi", "EX": "EE", "de": ".", "ig": ".", "EQ": "EN"}
# An escape: of a comment, of how letters look, of a letter by its name, of a string; or any other.
_ESCAPE = re.compile(
    r"""\\(?:".*|[fm](?:\[[^\]]*\]|\(..|[^\[(])|s[-+]?\d+|\*(?:\[[^\]]*\]|\(..|[^\[(])"""
    r"""|\[(?P<long>[^\]]*)\]|\((?P<short>..)|(?P<one>.)|$)"""
)
_NAMED = {
    "lq": '"', "rq": '"', "dq": '"', "aq": "'", "cq": "'", "oq": "'", "Fo": "«", "Fc": "»",
    "bu": "•", "en": "–", "em": "—", "hy": "-", "mi": "-", "co": "©", "ss": "ß", "ha": "^",
    "ti": "~", "rs": "\\", "ga": "`",
}  # fmt: skip
_ACCENTS = {
    "'": "\u0301", "`": "\u0300", "^": "\u0302", ":": "\u0308", "~": "\u0303", ",": "\u0327"
}  # fmt: skip
# What a character after a backslash stands for; others stand for themselves.
_SINGLE = {"e": "\\", "0": " ", "~": " "} | dict.fromkeys("&,/:%|^c)", "")


def paragraphs(data: bytes, form: Form) -> list[str]:
    """The prose of a page."""
    text = data.decode("utf-8", "replace")
    found = (" ".join(part.split()) for part in _READERS[form](text))
    return [part for part in found if is_prose(part)]


def is_prose(paragraph: str) -> bool:
    """Whether it is long enough, and mostly of letters (marks and blanks count as such)."""
    if len(paragraph) < LEAST_CHARACTERS or "\ufffd" in paragraph:
        return False
    letters = sum(
        letter.isalpha() or letter.isspace() or ord(letter) > 0x2FF for letter in paragraph
    )
    return letters >= LEAST_LETTERS * len(paragraph)


def _roff(text: str) -> list[str]:
    found: list[list[str]] = [[]]
    end = ""
    for line in text.replace("\\\n", "").splitlines():
        if end:
            if line.startswith(f".{end}"):
                end = ""
            continue
        request = re.match(r"[.']\s*(\w+)", line)
        if request and request[1] in _SKIPPED:
            end = _SKIPPED[request[1]]
        elif not line.strip() or _BREAKS.match(line):
            found.append([])
        if said := _TEXTS.match(line):
            found[-1].append(_unescaped(said[2].replace('"', "")))
        elif line.strip() and line[0] not in ".'":
            found[-1].append(_unescaped(line))
    return [" ".join(lines) for lines in found]


def _unescaped(line: str) -> str:
    return _ESCAPE.sub(_letter, line)


def _letter(escape: re.Match[str]) -> str:
    if (one := escape["one"]) is not None:
        return _SINGLE.get(one, one)
    name = escape["long"] or escape["short"] or ""
    if re.fullmatch("u[0-9A-F]{4,5}", name):
        return chr(int(name[1:], 16))
    if len(name) == 2 and name[0] in _ACCENTS:
        return unicodedata.normalize("NFC", name[1] + _ACCENTS[name[0]])
    return _NAMED.get(name, "")


class _Blocks(HTMLParser):
    """Texts of the blocks of a page, without those elements that are no prose."""

    BLOCKS: frozenset[str] = frozenset({
        "p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "td", "th", "div", "title",
        "desc", "item", "section", "steps", "list", "terms", "note",
    })  # fmt: skip
    SKIPPED: frozenset[str] = frozenset({"head", "script", "style", "pre", "info", "screen"})
    CLASSES: frozenset[str] = frozenset({"navheader", "navfooter", "toc", "docnav", "titlepage"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = [""]
        self._skipped: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = (dict(attrs).get("class") or "").split()
        if self._skipped:
            if tag == self._skipped[0]:
                self._skipped.append(tag)
        elif tag in self.SKIPPED or not self.CLASSES.isdisjoint(classes):
            self._skipped.append(tag)
        elif tag in self.BLOCKS:
            self.found.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Such an element holds nothing."""

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            if tag == self._skipped[0]:
                self._skipped.pop()
        elif tag in self.BLOCKS:
            self.found.append("")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.found[-1] += data


def _blocks(text: str) -> list[str]:
    parser = _Blocks()
    parser.feed(text)
    parser.close()
    return parser.found


_READERS: Mapping[Form, Callable[[str], list[str]]] = {
    "roff": _roff, "html": _blocks, "mallard": _blocks,
}  # fmt: skip
