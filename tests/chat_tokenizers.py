"""Tiny byte-level BPE tokenizers with the Apertus special tokens, for the tokenizer's tests."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from apertus_mlx.text.byte_alphabet import CHARACTER_OF_BYTE
from apertus_mlx.text.messages import read_messages
from apertus_mlx.text.template import ChatTemplate, Message
from apertus_mlx.text.tokenizer import Tokenizer

_NAMED = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "<pad>", 32: "<think>", 33: "</think>"}
_V1_ROLES = [
    f"<|{role}_{side}|>"
    for role, sides in {
        "system": ("start", "end"),
        "developer": ("start", "end"),
        "user": ("start", "end"),
        "assistant": ("start", "end"),
        "inner": ("prefix", "suffix"),
        "tools": ("prefix", "suffix"),
    }.items()
    for side in sides
]
_WORDS = ["the", "Ġthe", "Hello", "Ġworld", "ĠZurich", "ation", "Ġcapital", "dis", "abled"]


def special_names(version: str) -> list[str]:
    names = [_NAMED.get(i, f"<SPECIAL_{i}>") for i in range(74)]
    if version != "v1.1":
        names[61:73] = _V1_ROLES
    if version == "v1.5":
        names[73:] = ["<|tool_output_start|>", "<|tool_output_end|>"]
    return names


@functools.cache
def backend_json(version: str) -> str:
    """A tokenizer.json whose first 74 ids are special, then 256 bytes, then a few merges."""
    names = special_names(version)
    vocab = {name: i for i, name in enumerate(names)}
    for byte in range(256):
        vocab[CHARACTER_OF_BYTE[byte]] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        left = word[0]
        for character in word[1:]:
            if left + character not in vocab:
                vocab[left + character] = len(vocab)
                merges.append((left, character))
            left += character
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]
    )
    backend.add_tokens([tokenizers.AddedToken("\\begin{ x", special=False, normalized=False)])
    text: str = backend.to_str()
    return text


def write_tokenizer(directory: Path, version: str = "v1", **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(backend_json(version), encoding="utf-8")
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def vocab_size(version: str = "v1") -> int:
    size: int = tokenizers.Tokenizer.from_str(backend_json(version)).get_vocab_size()
    return size


def load_tokenizer(directory: Path, version: str = "v1") -> Tokenizer:
    write_tokenizer(directory, version)
    return Tokenizer.load(directory, vocab_size=vocab_size(version), bos_token_id=1)


def encode_with_control(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of trusted text, where a special token's text is its id."""
    ids: list[int] = []
    for piece in tokenizer.split_special(text):
        ids += [piece] if isinstance(piece, int) else tokenizer.encode(piece)
    return ids


def written_by(template: ChatTemplate, messages: Sequence[Message], **how: Any) -> str:
    """What `template` writes, for reading; `how` as for `render`."""
    how = {"think": False, "tools": (), "add_generation_prompt": True, **how}
    pieces = template._render(read_messages(messages), **how)
    names = template._tokenizer.id_to_token
    return "".join(each if isinstance(each, str) else names(each) or "" for each in pieces)


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The text of every special token, with its id."""
    return {tokenizer.id_to_token(i) or "": i for i in sorted(tokenizer.special_ids)}
