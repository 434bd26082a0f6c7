"""Texts to calibrate and judge with: the project's own or a user's, cut into windows of tokens.

A file `.txt` or `.md` is one text, labelled with its name where that looks like a language tag
(`de.txt`, `pt-BR.md`). A file `.jsonl` holds one object per line with `text` or `messages`, and
optionally `language`; `.json` is one such object. Texts without a label count as `und`.
"""

from __future__ import annotations

import hashlib
import random
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from apertus_mlx.checkpoint.config import read_config
from apertus_mlx.errors import NotFoundError, RejectedError, UsageError
from apertus_mlx.system.model_files import read_own_file
from apertus_mlx.system.strict_json import parse_object
from apertus_mlx.text.messages import read_messages
from apertus_mlx.text.template import ChatTemplate, Message
from apertus_mlx.text.tokenizer import Tokenizer

Tokens = npt.NDArray[np.int64]
DEFAULT_DIRECTORY = Path(__file__).with_name("data")
DEFAULT_NAME = "default"
UNKNOWN_LANGUAGE = "und"
SUFFIXES = (".txt", ".md", ".jsonl", ".json")
MAX_FILE_BYTES = 64 * 2**20
# One part in so many is kept to judge by.
HELD_OUT = 4
# Lines, sentences and stretches are held out in blocks, of which a language has at most so many;
# a stretch has at least so many characters.
MOST_BLOCKS, LEAST_STRETCH = 32, 40
_paragraphs = re.compile(r"\n[ \t\r]*\n").split
_SENTENCES = re.compile(r"(?<=[.!?\u06d4\u0964])\s+|(?<=[\u3002\uff01\uff1f])")
# What BCP 47 tags look like; whether the language exists is the user's affair.
_LANGUAGE_TAG = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8}){0,3}")


Content = str | tuple[Message, ...]
OpenText = tuple[Tokenizer, ChatTemplate | None]


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or the messages of a conversation."""

    language: str
    content: Content


Cut = Callable[[str], list[str]]


@dataclass(frozen=True, slots=True)
class TextSet:
    """Documents with their origin, and a hash of the bytes that they were read from."""

    name: str
    sha256: str
    documents: tuple[Document, ...]
    # Whether they were kept back from what a model is made with.
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """Windows of token ids `[windows, length]`, and how they were chosen."""

    windows: Tokens
    name: str
    sha256: str
    seed: int

    def record(self) -> dict[str, Any]:
        """What a manifest says about it."""
        count, length = self.windows.shape
        return {
            "text": self.name,
            "sha256": self.sha256,
            "seed": self.seed,
            "windows": count,
            "window_tokens": length,
        }


def read_texts(paths: Sequence[Path] = ()) -> TextSet:
    """Read files and folders of texts; without any, the project's own.

    Raises:
        NotFoundError: there is no such file.
        UsageError: a file of another kind, or a folder without texts.
        RejectedError: a file is not what its name says.
    """
    files = _files(paths or [DEFAULT_DIRECTORY])
    digest = hashlib.sha256()
    documents: list[Document] = []
    for file in files:
        data = read_own_file(file, MAX_FILE_BYTES)
        digest.update(hashlib.sha256(data).digest())
        documents += _documents(file, data)
    if not documents:
        raise UsageError(f"{files[0]}: holds no text")
    name = ", ".join(path.name for path in paths) if paths else DEFAULT_NAME
    return TextSet(name, digest.hexdigest(), tuple(documents))


def open_text(directory: Path) -> OpenText:
    """The tokenizer of a checkpoint, and its chat template if it has one.

    Raises:
        ApertusError: a file is missing, damaged or not supported.
    """
    tokenizer = open_tokenizer(directory)
    return tokenizer, ChatTemplate.load(directory, tokenizer)


def open_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Raises:
        ApertusError: a file is missing, damaged or not supported.
    """
    config = read_config(directory)
    return Tokenizer.load(directory, vocab_size=config.vocab_size, bos_token_id=config.bos_token_id)


def same_tokens(first: Tokenizer, second: Tokenizer) -> bool:
    """Whether each id means the same to both; else figures that compare them mean nothing."""
    highest = max(first.vocab_size, second.vocab_size)
    return all(first.id_to_token(i) == second.id_to_token(i) for i in range(highest))


def hold_out(texts: TextSet) -> tuple[TextSet, TextSet]:
    """Texts to calibrate on, and a quarter to judge by; nothing is in both.

    Of each language every fourth document is held out; where there are fewer, every fourth
    paragraph, else line, sentence or stretch of words. What is repeated, in whatever language,
    counts once. Where nothing can be held out both are all texts, and the latter's name says so.
    """
    for first in range(len(CUTS)):
        seen, judged = _divided(texts, list(CUTS)[first:])
        if seen and judged:
            return (
                replace(texts, documents=tuple(seen)),
                TextSet(f"{texts.name}, held out", texts.sha256, tuple(judged), held_out=True),
            )
    name = f"{texts.name}, which it was made with: too short to hold a part out"
    return texts, replace(texts, name=name)


def sample_windows(
    texts: TextSet,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    length: int,
    count: int,
    seed: int,
) -> Sample:
    """Windows of `length` tokens from all documents in a random order, one after the other.

    Where the texts are shorter there are fewer windows; shorter than one, it is a window of what
    there is.

    Raises:
        UsageError: fewer than two tokens in all.
        RejectedError: conversations, but the model has no chat template.
    """
    order = random.Random(seed)
    documents = list(texts.documents)
    order.shuffle(documents)
    ids: list[int] = []
    for document in documents:
        ids += encode(document, tokenizer, template)
    if len(ids) < 2:
        raise UsageError(f"{texts.name}: too little text to calibrate with")
    length = min(length, len(ids))
    windows = np.array(ids[: len(ids) // length * length], np.int64).reshape(-1, length)
    chosen = sorted(order.sample(range(len(windows)), min(count, len(windows))))
    return Sample(windows[chosen], texts.name, texts.sha256, seed)


def language_windows(
    texts: TextSet,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    length: int,
    most_tokens: int,
) -> dict[str, list[Tokens]]:
    """For each language its windows `[windows, length]`, those of a text's end shorter.

    A window never spans two documents. `most_tokens` bounds each language. Of a document of a
    single token, as with nothing but the one that starts a text, there is none.
    """
    found: dict[str, list[list[int]]] = {}
    for document in texts.documents:
        rows = found.setdefault(document.language, [])
        left = most_tokens - sum(map(len, rows))
        ids = encode(document, tokenizer, template)[: max(left, 0)]
        if len(ids) >= 2:
            rows += [ids[start : start + length] for start in range(0, len(ids), length)]
    result = {}
    for language, rows in found.items():
        by_length: dict[int, list[list[int]]] = {}
        for row in rows:
            by_length.setdefault(len(row), []).append(row)
        if by_length:
            result[language] = [np.array(same, np.int64) for same in by_length.values()]
    return result


def encode(document: Document, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    """The token ids of a document as the model would meet it.

    Raises:
        RejectedError: a conversation, but no template for it.
    """
    if isinstance(document.content, str):
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return start + tokenizer.encode(document.content)
    if template is None:
        raise RejectedError("the model has no chat template; give texts instead of conversations")
    return template.render(document.content, add_generation_prompt=False)


def _divided(texts: TextSet, cuts: Sequence[Cut]) -> tuple[list[Document], list[Document]]:
    """Documents to calibrate on and to judge by, cut in the coarsest way that gives enough."""
    seen: list[Document] = []
    judged: list[Document] = []
    known: set[str] = set()
    for language in dict.fromkeys(document.language for document in texts.documents):
        own = [document for document in texts.documents if document.language == language]
        _deal(own, cuts, known, seen, judged)
    # Documents that differ may have lines in common.
    lines = {_key(line) for d in seen for line in _parts(d, str.splitlines)}
    return seen, [kept for d in judged if (kept := _without(d, lines)) is not None]


def _deal(
    documents: Sequence[Document],
    cuts: Sequence[Cut],
    known: set[str],
    seen: list[Document],
    judged: list[Document],
) -> None:
    """Give each part of a language's documents that is not `known` yet to one of the two."""
    found = {
        cut: {_key(part) for d in documents for part in _parts(d, cut)} - known for cut in cuts
    }
    most = max(cuts, key=lambda cut: len(found[cut]))
    cut = next((cut for cut in cuts if len(found[cut]) >= HELD_OUT), most)
    total = len(found[cut])
    # Of fewer parts than four the last one; fine parts in blocks, for the sake of their context.
    size = 1 if cut in (_whole, _paragraphs) else -(-total // MOST_BLOCKS)
    every = min(HELD_OUT, max(-(-total // size), 2))
    count = 0
    for document in documents:
        blocks: dict[int, list[Content]] = {}
        for part in _parts(document, cut):
            if (key := _key(part)) not in known:
                known.add(key)
                blocks.setdefault(count // size, []).append(part)
                count += 1
        rest = []
        for number, parts in blocks.items():
            if number % every == every - 1:
                judged.append(_joined(document.language, parts, cut))
            else:
                rest += parts
        if rest:
            seen.append(_joined(document.language, rest, cut))


def _joined(language: str, parts: Sequence[Content], cut: Cut) -> Document:
    texts = [part for part in parts if isinstance(part, str)]
    return Document(language, CUTS[cut].join(texts) if texts else parts[0])


def _without(document: Document, lines: set[str]) -> Document | None:
    """The document without some lines; None where nothing is left."""
    own = _parts(document, str.splitlines)
    kept = [line for line in own if _key(line) not in lines]
    if len(kept) == len(own):
        return document
    texts = [line for line in kept if isinstance(line, str)]
    return Document(document.language, "\n".join(texts)) if texts else None


def _key(content: Content) -> str:
    """What two parts have in common that differ in white space alone."""
    return " ".join(str(content).split())


def _parts(document: Document, cut: Cut) -> list[Content]:
    """The parts of a text that are not blank; a conversation stays whole."""
    if cut is _whole or not isinstance(document.content, str):
        return [document.content]
    return [part for part in cut(document.content) if part.strip()]


def _whole(text: str) -> list[str]:
    return [text]


def _sentences(text: str) -> list[str]:
    return [part for line in text.splitlines() for part in _SENTENCES.split(line) if part.strip()]


def _stretches(text: str) -> list[str]:
    # Each sentence once, or what repeats would be cut into parts that only look different.
    text = " ".join(dict.fromkeys(_sentences(text)))
    size = max(LEAST_STRETCH, -(-len(text) // MOST_BLOCKS))
    if len(text) < 2 * LEAST_STRETCH or len(set(text)) == 1:
        return [text]
    return textwrap.wrap(text, size)


# Ways to cut a text, coarse ones first, with what joins the parts again.
CUTS: dict[Cut, str] = {
    _whole: "", _paragraphs: "\n\n", str.splitlines: "\n", _sentences: " ", _stretches: " ",
}  # fmt: skip


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inner = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
            if not inner:
                raise UsageError(f"{path}: no texts; expected files {', '.join(SUFFIXES)}")
            files += inner
        elif not path.is_file():
            raise NotFoundError(f"{path}: no such file or folder")
        elif path.suffix not in SUFFIXES:
            raise UsageError(f"{path}: expected a file {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    return files


def _documents(path: Path, data: bytes) -> list[Document]:
    stem = path.stem
    label = stem if _LANGUAGE_TAG.fullmatch(stem) else UNKNOWN_LANGUAGE
    if path.suffix == ".json":
        return [_parsed(parse_object(data, str(path)), str(path), label)]
    if path.suffix == ".jsonl":
        return [
            _parsed(parse_object(line, f"{path}: line {number}"), f"{path}: line {number}", label)
            for number, line in enumerate(data.splitlines(), 1)
            if line.strip()
        ]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RejectedError(f"{path}: is not UTF-8 text") from None
    return [Document(label, text)] if text.strip() else []


def _parsed(values: Mapping[str, Any], name: str, label: str) -> Document:
    language = values.get("language", label)
    if not isinstance(language, str) or not _LANGUAGE_TAG.fullmatch(language):
        raise RejectedError(
            f"{name}: language: expected a tag such as de or pt-BR, found {str(language)[:40]!r}"
        )
    text, messages = values.get("text"), values.get("messages")
    if isinstance(text, str) and messages is None:
        return Document(language, text)
    if not isinstance(messages, list) or not messages or text is not None:
        raise RejectedError(f"{name}: expected a string `text` or a list `messages`")
    try:
        read_messages(messages, f"{name}: messages")
    except UsageError as error:
        raise RejectedError(str(error)) from None
    return Document(language, tuple(messages))
