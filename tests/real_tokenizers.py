"""The released Apertus tokenizers, built from the vocabulary that `mistral-common` ships.

The ranks are those of Mistral's `tekken` file; the names and flags of the first thousand ids are
Apertus' own. What comes out is the released file, byte for byte, which its SHA-256 shows.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from json.encoder import encode_basestring as quoted
from pathlib import Path
from typing import Any

from apertus_mlx.text.byte_alphabet import CHARACTER_OF_BYTE

SHA256 = {
    "v1": "bb201fb226cde11f66c3cf51c5344fb37b1611f00c21e75c324546d854eff2e1",
    "v1.1": "be12f4375d655cc740864e3a9041bcddd8477942f209d9e7f27f6c8767162638",
}
VOCAB_SIZE = 131_072
SPECIAL_TOKENS = 1000
LATEX = {14: "\\begin{", 15: "\\end{", 16: "\\text{", 17: "\\boxed{"}
_FIRST_NAMES = r"""
<unk> <s> </s> <pad> [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]
[TOOL_CALLS] <SPECIAL_10> [PREFIX] [MIDDLE] [SUFFIX] \begin{ \end{ \text{ \boxed{ <filename>
<gh_stars> <issue_start> <issue_comment> <issue_closed> <jupyter_start> <jupyter_text>
<jupyter_code> <jupyter_output> <empty_output> <commit_before> <commit_msg> <commit_after>
<reponame> <think> </think> <answer> </answer> <iban-pii> <email-pii> <ip-pii> <file_sep>
<code_to_intermediate> <intermediate_to_code> <pr> <pr_status> <pr_is_merged> <pr_base> <pr_file>
<pr_base_code> <pr_diff> <pr_diff_hunk> <pr_comment> <pr_event_id> <pr_review> <pr_review_state>
<pr_review_comment> <pr_in_reply_to_review_id> <pr_in_reply_to_comment_id>
<pr_diff_hunk_comment_line> <|fim_begin|> <|fim_hole|> <|fim_end|> <|system_start|> <|system_end|>
<|developer_start|> <|developer_end|> <|user_start|> <|user_end|> <|assistant_start|>
<|assistant_end|> <|inner_prefix|> <|inner_suffix|> <|tools_prefix|> <|tools_suffix|>
""".split()  # noqa: SIM905


def tekken_path() -> Path | None:
    """The vocabulary file of `mistral-common`, None where that is not installed."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "data/tekken_240911.json"
    return path if path.is_file() else None


def special_names(version: str) -> list[str]:
    names = _FIRST_NAMES + [f"<SPECIAL_{i}>" for i in range(len(_FIRST_NAMES), SPECIAL_TOKENS)]
    if version == "v1.1":
        names[61:73] = [f"<SPECIAL_{i}>" for i in range(61, 73)]
        names[3], names[10] = "[INST]", "<pad>"
    return names


def write_real_tokenizers(folders: Mapping[str, Path]) -> None:
    """Write `tokenizer.json` of each version into its folder, where it is not yet."""
    if not all(_is_released(version, folder) for version, folder in folders.items()):
        tekken = tekken_path()
        assert tekken is not None, "mistral-common is not installed"
        source = json.loads(tekken.read_bytes())
        entries = source["vocab"][: VOCAB_SIZE - SPECIAL_TOKENS]
        pieces = [base64.b64decode(entry["token_bytes"]) for entry in entries]
        merges = list(_merges(pieces))
        for version, folder in folders.items():
            value = _tokenizer(version, pieces, merges, source["config"]["pattern"])
            folder.mkdir(parents=True, exist_ok=True)
            text = _indented(value)
            (folder / "tokenizer.json").write_text(text, encoding="utf-8")
            assert _is_released(version, folder), f"{folder} is not the released file"


def _indented(value: dict[str, Any]) -> str:
    """As `json.dumps` with an indent of 2; its Python code would take seconds for long parts."""
    model = value["model"]
    entries = ",\n".join(f"      {quoted(name)}: {i}" for name, i in model["vocab"].items())
    pairs = ",\n".join(
        f"      [\n        {quoted(left)},\n        {quoted(right)}\n      ]"
        for left, right in model["merges"]
    )
    short = {**value, "model": {**model, "vocab": "VOCAB", "merges": "MERGES"}}
    text = json.dumps(short, ensure_ascii=False, indent=2)
    text = text.replace('"VOCAB"', f"{{\n{entries}\n    }}")
    return text.replace('"MERGES"', f"[\n{pairs}\n    ]")


def _is_released(version: str, folder: Path) -> bool:
    path = folder / "tokenizer.json"
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[version]


def _letters(piece: bytes) -> str:
    return piece.decode("latin-1").translate(CHARACTER_OF_BYTE)


def _merges(pieces: list[bytes]) -> Iterator[list[str]]:
    """For each token, in rank order, every split of it into two tokens, in rank order."""
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    letters = [_letters(piece) for piece in pieces]
    for piece in pieces:
        splits = []
        for cut in range(1, len(piece)):
            left, right = ranks.get(piece[:cut]), ranks.get(piece[cut:])
            if left is not None and right is not None:
                splits.append((left, right))
        for left, right in sorted(splits):
            yield [letters[left], letters[right]]


def _tokenizer(
    version: str, pieces: list[bytes], merges: list[list[str]], pattern: str
) -> dict[str, Any]:
    names = special_names(version)
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = [
        {"SpecialToken": {"id": "<s>", "type_id": 1}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id, "content": name, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False,
                "special": version == "v1.1" or token_id not in LATEX,
            }
            for token_id, name in enumerate(names)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                    "invert": False,
                },
                {**byte_level, "add_prefix_space": False, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, *second],
            "special_tokens": {
                "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]},
                "<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]},
            },
        },
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {
                **{name: token_id for token_id, name in enumerate(names)},
                **{_letters(piece): SPECIAL_TOKENS + i for i, piece in enumerate(pieces)},
            },
            "merges": merges,
        },
    }  # fmt: skip
