"""Owns the embedded model's tokenizer: a byte-level BPE with the Apertus control tokens."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from recipes.demo.corpus import documents

__all__ = ["CONTROL_TOKENS", "VOCAB_SIZE", "build", "save"]

VOCAB_SIZE: Final = 1792
_CORPUS_SEED: Final = 1
_CORPUS_DOCUMENTS: Final = 20_000

_NAMED: Final = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "<pad>",
    4: "[/INST]",
    5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]",
    7: "[TOOL_RESULTS]",
    8: "[/TOOL_RESULTS]",
    9: "[TOOL_CALLS]",
    11: "[PREFIX]",
    12: "[MIDDLE]",
    13: "[SUFFIX]",
    32: "<think>",
    33: "</think>",
    61: "<|system_start|>",
    62: "<|system_end|>",
    63: "<|developer_start|>",
    64: "<|developer_end|>",
    65: "<|user_start|>",
    66: "<|user_end|>",
    67: "<|assistant_start|>",
    68: "<|assistant_end|>",
    69: "<|inner_prefix|>",
    70: "<|inner_suffix|>",
    71: "<|tools_prefix|>",
    72: "<|tools_suffix|>",
}
CONTROL_TOKENS: Final = tuple(_NAMED.get(number, f"<SPECIAL_{number}>") for number in range(74))

# Words split at case changes, digits one by one, punctuation together with a leading blank.
_WORDS: Final = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def _texts() -> Iterator[str]:
    control = re.compile("|".join(re.escape(token) for token in CONTROL_TOKENS))
    for document in islice(documents(_CORPUS_SEED), _CORPUS_DOCUMENTS):
        for segment in document:
            yield from filter(None, control.split(segment.text))


def build() -> Tokenizer:
    """Train the tokenizer on the corpus; the result depends on the recipe alone."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in CONTROL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the corpus yields only {tokenizer.get_vocab_size()} tokens")
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    # Without indentation, because the folder has a size limit.
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact + "\n", encoding="utf-8")
    settings = {
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|assistant_end|>",
        "model_max_length": 2048,
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
