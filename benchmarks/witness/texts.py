"""From pages to three sets of documents that share no paragraph: to train, calibrate and judge.

A page is held out in all languages at once, by a hash of its name, so that no judged page has been
read in translation. A paragraph counts once, wherever it stands again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.witness.fetching import fetch, files
from benchmarks.witness.pages import paragraphs
from benchmarks.witness.sources import PACKAGES, language_tag

# Of a thousand pages.
HELD_OUT = {"judged": 30, "calibration": 30}
PARTS = ("training", *HELD_OUT)
# Characters of a language: fewer are left out, more are not taken.
LEAST_CHARACTERS, MOST_CHARACTERS = 150_000, 4_000_000
LEAST_PARAGRAPHS = 3


@dataclass(frozen=True, slots=True)
class Page:
    """A page's paragraphs; `name` is the same in all languages."""

    language: str
    name: str
    paragraphs: list[str]


# Texts by language, of each part.
Corpus = Mapping[str, Mapping[str, list[str]]]


def divide(pages: Iterable[Page]) -> Corpus:
    """Documents by part and language; languages with little text are left out."""
    found: dict[str, dict[str, list[str]]] = {part: {} for part in PARTS}
    taken: dict[str, int] = {}
    known: set[bytes] = set()
    for page in pages:
        if taken.get(page.language, 0) >= MOST_CHARACTERS:
            continue
        kept = [text for text in page.paragraphs if _is_new(text, known)]
        if len(kept) >= LEAST_PARAGRAPHS:
            text = "\n\n".join(kept)
            found[part_of(page.name)].setdefault(page.language, []).append(text)
            taken[page.language] = taken.get(page.language, 0) + len(text)
    languages = sorted(
        language for language, characters in taken.items()
        if characters >= LEAST_CHARACTERS and all(language in found[part] for part in PARTS)
    )  # fmt: skip
    return {part: {tag: found[part][tag] for tag in languages} for part in PARTS}


def part_of(name: str) -> str:
    """Which part a page belongs to."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % 1000
    for part, share in HELD_OUT.items():
        if number < share:
            return part
        number -= share
    return "training"


def prepare_texts(folder: Path) -> Path:
    """`text/PART/TAG.jsonl` in `folder`, made from the packages unless it is there."""
    target, partial = folder / "text", folder / "text.partial"
    if target.exists():
        return target
    shutil.rmtree(partial, ignore_errors=True)
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for part, languages in divide(_pages(packages)).items():
        (partial / part).mkdir(parents=True)
        for language, texts in languages.items():
            lines = [
                json.dumps({"language": language, "text": text}, ensure_ascii=False)
                for text in texts
            ]
            (partial / part / f"{language}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    partial.rename(target)
    return target


def read_part(folder: Path, part: str) -> dict[str, list[str]]:
    """Texts by language."""
    return {
        path.stem: [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
        for path in sorted((folder / part).glob("*.jsonl"))
    }


def _pages(packages: Path) -> Iterator[Page]:
    for package in PACKAGES:
        path = fetch(package, packages)
        print(f"{package.name}: reading its pages", file=sys.stderr, flush=True)
        found = []
        for name, data in files(path):
            if match := package.pages.fullmatch(name):
                language = language_tag(match["language"])
                found.append(Page(language, match["page"], paragraphs(data, package.form)))
        # What a translation leaves in English is known by then.
        yield from sorted(found, key=lambda page: (page.language != "en", page.language, page.name))


def _is_new(text: str, known: set[bytes]) -> bool:
    key = hashlib.sha256("".join(text.split()).casefold().encode()).digest()[:12]
    if key in known:
        return False
    known.add(key)
    return True
