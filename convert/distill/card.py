"""The README.md of a distilled model: what it is, from what and how it was made, what it lost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apertus_mlx.convert.evaluation.evaluate import Evaluation
from apertus_mlx.convert.job import CARD
from apertus_mlx.convert.write.card import MAX_CARD_BYTES, divergence_table, license_of
from apertus_mlx.system.model_files import exists, open_file


def make_card(
    student: Path,
    name: str,
    manifest: Mapping[str, Any],
    record: Mapping[str, Any],
    quality: Evaluation,
) -> str:
    """Markdown for `student` after its distillation, with the front matter of its own card.

    Args:
        student: the folder that learned.
        name: of the new folder.
        manifest: of the student.
        record: of the distillation.
        quality: the new model beside its teacher.
    """
    texts = record["texts"]
    what = {"weights": "codes, scales, biases and norms", "scales": "scales, biases and norms"}
    lines = [*_front_matter(student), f"# {name}", ""]
    lines += [
        f"Quantized Apertus weights in MLX form that learned from `{record['teacher']}`, in the "
        f"format and at the size of `{record['student']}`.", "",
        "| | |", "|---|---|",
        f"| Bits per weight | {manifest['bits_per_weight']:.3f} |",
        f"| Weights | {manifest['weight_bytes']:,} bytes |",
        f"| Parameters | {manifest['parameters']:,} |",
        f"| Method | {manifest['method']}, then distillation of {what[record['trained']]} |",
        f"| Distilled on | {texts['windows'] * texts['window_tokens']:,} tokens ({texts['text']}), "
        f"{record['tokens_seen']:,} with repetitions |",
        f"| License | {license_of(student) or 'see the source'} |",
    ]  # fmt: skip
    lines += divergence_table(quality)
    lines += [
        "",
        "`apertus_mlx_manifest.json` holds the hash of each file and the whole record; "
        "`apertus-mlx verify DIR` checks them.",
        "",
    ]
    return "\n".join(lines)


def _front_matter(student: Path) -> list[str]:
    """The lines between and with the two rules at the top of the student's card, if it has any."""
    if not exists(student / CARD):
        return []
    with open_file(student / CARD) as file:
        lines = file.read(MAX_CARD_BYTES).decode("utf-8", "replace").splitlines()
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return []
    return [*lines[: lines.index("---", 1) + 1], ""]
