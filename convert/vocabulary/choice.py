"""Which tokens a conversion keeps, and what their texts cost afterwards, for each language."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.generation_config import read_generation_config
from apertus_mlx.convert.evaluation.texts import (
    Document,
    OpenText,
    TextSet,
    encode,
    open_text,
    read_texts,
)
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.vocabulary.byte_pairs import Ids, read_byte_pairs
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.text.template import ChatTemplate
from apertus_mlx.text.tokenizer import Tokenizer
from apertus_mlx.text.tokenizer_file import parse_backend
from apertus_mlx.text.vocabulary import LibraryVocabulary


@dataclass(frozen=True, slots=True)
class Inflation:
    """Tokens of the texts of one language, before and after."""

    language: str
    before: int
    after: int

    @property
    def factor(self) -> float:
        """How many times as many there are."""
        return self.after / self.before


@dataclass(frozen=True, slots=True)
class Cut:
    """A vocabulary of fewer tokens.

    Attributes:
        kept: ids of the whole vocabulary, ascending; the place of each is its new id.
        whole: how many tokens there were.
        texts: what the tokens were chosen for; None where they are the first ones.
        tokenizer: the new `tokenizer.json`.
        measured: the texts by which `inflation` was measured.
        inflation: of each language.
    """

    kept: Ids
    whole: int
    texts: str | None
    tokenizer: bytes
    measured: str
    inflation: tuple[Inflation, ...]

    @property
    def sha256(self) -> str:
        """Of the kept ids."""
        return hashlib.sha256(self.kept.astype("<i8").tobytes()).hexdigest()

    @property
    def note(self) -> str:
        """What to tell about it."""
        how = "the first ids" if self.texts is None else f"those that {self.texts} uses"
        return f"vocabulary of {len(self.kept):,} tokens of {self.whole:,}: {how}"

    def as_json(self) -> dict[str, Any]:
        """For `--json` and the manifest."""
        return {
            "tokens": len(self.kept),
            "source_tokens": self.whole,
            "chosen_by": self.texts or "prefix",
            "kept_ids_sha256": self.sha256,
            "inflation_text": self.measured,
            "inflation": {
                found.language: {
                    "tokens_before": found.before,
                    "tokens_after": found.after,
                    "factor": round(found.factor, 4),
                }
                for found in self.inflation
            },
        }


def choose_tokens(
    directory: Path, config: ModelConfig, request: Request, texts: Sequence[Path]
) -> Cut:
    """The tokens that `request` keeps of the checkpoint in `directory`.

    Args:
        directory: the checkpoint.
        config: its config.
        request: with `vocab` or `vocab_for`.
        texts: files and folders to measure by; without any, the project's own.

    Raises:
        UsageError: more tokens than there are, or fewer than have to be kept.
        RejectedError: the tokenizer is none that can be cut, or a text is damaged.
        NotFoundError: there is no such text.
    """
    path = directory / "tokenizer.json"
    pairs = read_byte_pairs(path)
    tokenizer, template = open_text(directory)
    _require_below(directory, config, pairs.floor)
    if request.vocab is not None:
        if request.vocab > config.vocab_size:
            raise UsageError(
                f"--vocab {request.vocab}: the vocabulary has {config.vocab_size} tokens"
            )
        kept, name = pairs.prefix(request.vocab), None
    else:
        corpus = read_texts([Path(each) for each in request.vocab_for])
        used = {i for document in corpus.documents for i in encode(document, tokenizer, template)}
        kept, name = pairs.closure(used, config.vocab_size), corpus.name
    cut = pairs.cut(kept)
    measured = read_texts(texts)
    after = _tokenizer(path, cut, len(kept), tokenizer)
    inflation = tuple(_inflation(measured, (tokenizer, after)))
    return Cut(kept, config.vocab_size, name, cut, measured.name, inflation)


def open_cut(directory: Path, cut: Cut) -> OpenText:
    """The cut tokenizer of the checkpoint in `directory`, and its chat template if it has one."""
    whole, _ = open_text(directory)
    tokenizer = _tokenizer(directory / "tokenizer.json", cut.tokenizer, len(cut.kept), whole)
    return tokenizer, ChatTemplate.load(directory, tokenizer)


def _tokenizer(path: Path, data: bytes, size: int, whole: Tokenizer) -> Tokenizer:
    return Tokenizer(
        LibraryVocabulary(parse_backend(path, data)), name=f"{path}, cut",
        vocab_size=size, bos_id=whole.bos_id, roles=whole.roles,
    )  # fmt: skip


def _require_below(directory: Path, config: ModelConfig, floor: int) -> None:
    """Refuse ids that mean something to the model and might be cut or moved.

    Raises:
        RejectedError: names the id.
    """
    stops = read_generation_config(directory, config.vocab_size).eos_token_ids
    for token_id in (config.bos_token_id, config.pad_token_id, *config.eos_token_ids, *stops):
        if token_id is not None and token_id >= floor:
            raise RejectedError(
                f"{directory}: token {token_id} is used by the config and is no control token; "
                "its vocabulary cannot be cut"
            )


def _inflation(texts: TextSet, tokenizers: Sequence[Tokenizer]) -> list[Inflation]:
    counts: dict[str, list[int]] = {}
    for document in texts.documents:
        found = counts.setdefault(document.language, [0] * len(tokenizers))
        for text in _texts(document):
            for index, tokenizer in enumerate(tokenizers):
                found[index] += len(tokenizer.encode(text))
    return [
        Inflation(language, before, after) for language, (before, after) in counts.items() if before
    ]


def _texts(document: Document) -> list[str]:
    """The text, or what was said in a conversation."""
    if isinstance(document.content, str):
        return [document.content]
    contents = [message.get("content") for message in document.content]
    return [content for content in contents if isinstance(content, str)]
