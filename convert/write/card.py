"""The output's README.md: what the folder is, from what and how it was made, what it lost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apertus_mlx.convert.evaluation.evaluate import FLOOR
from apertus_mlx.convert.evaluation.receipt import SHOWN, TOKENS, Receipt
from apertus_mlx.convert.plan.plan import DTYPE_NAMES, Plan
from apertus_mlx.system.model_files import exists, open_file

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LICENSE = re.compile(r"^license:[ \t]*([\w.\-]{1,60})[ \t]*$", re.MULTILINE)
CARD = "README.md"
_MAX_BYTES = 2**20


def make_card(
    plan: Plan,
    name: str,
    source: str,
    commit: str | None,
    license_id: str | None,
    quality: Receipt | None = None,
) -> str:
    """Markdown with the front matter that the Hugging Face Hub reads."""
    specs = plan.specs
    front = ["library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx", "- apertus"]
    if license_id:
        front.insert(0, f"license: {license_id}")
    if _HUB_ID.fullmatch(source):
        front.append(f"base_model: {source}")
        if specs:
            front.append("base_model_relation: quantized")
    origin = f"`{source}`" + (f" at commit `{commit}`" if commit else "")
    lines = ["---", *front, "---", "", f"# {name}", ""]
    lines += [f"Apertus weights in MLX form, converted from {origin} ({plan.source.format}).", ""]
    lines += ["| | |", "|---|---|"]
    counts: dict[str, int] = {}
    for step in plan.steps:
        if step.matrix is not None:
            text = str(step.spec) if step.spec else f"{DTYPE_NAMES[plan.dtype]}, not quantized"
            counts[text] = counts.get(text, 0) + 1
    lines += [f"| {text} | {count} weight matrices |" for text, count in counts.items()]
    lines += [
        f"| Bits per weight | {plan.bits_per_weight:.3f} |",
        f"| Weights | {plan.weight_bytes:,} bytes |",
        f"| Parameters | {plan.parameters:,} |",
        f"| License | {license_id or 'see the source'} |",
    ]
    if any(step.method != "rtn" for step in plan.steps):
        lines.insert(-1, f"| Method | {plan.request.method} |")
    changes = {"rotated": plan.request.rotate, "smoothed": plan.request.smooth}
    if any(changes.values()):
        lines.insert(-1, f"| Change of basis | {', '.join(n for n, on in changes.items() if on)} |")
    if quality is not None:
        lines += _divergence_table(quality)
    if plan.notes:
        lines += ["", "Notes of the conversion:", "", *(f"- {note}" for note in plan.notes)]
    lines += [
        "",
        "`apertus_mlx_manifest.json` holds the hash of each file; "
        "`apertus-mlx verify DIR` checks them.",
        "",
    ]
    return "\n".join(lines)


def make_distilled_card(
    student: Path,
    name: str,
    manifest: Mapping[str, Any],
    record: Mapping[str, Any],
    quality: Receipt,
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
    accepted = quality.held_out.overall.acceptance
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
        f"| As a draft | {accepted:.1%} of its guesses can be accepted |",
        f"| License | {license_of(student) or 'see the source'} |",
    ]  # fmt: skip
    lines += _divergence_table(quality)
    lines += [
        "",
        "`apertus_mlx_manifest.json` holds the hash of each file and the whole record; "
        "`apertus-mlx verify DIR` checks them.",
        "",
    ]
    return "\n".join(lines)


def _divergence_table(receipt: Receipt) -> list[str]:
    """Markdown lines: what the model lost against its source, for each language and over all."""
    quality = receipt.held_out
    lines = ["", f"Predictions beside those of the source, on texts ({quality.text_name}):", ""]
    lines += ["| | Tokens | KL mean | median | p90 | Noise floor | Top-1 |", "|---" * 7 + "|"]
    rows = {**quality.languages, "all": (quality.overall, quality.overall_floor)}
    lines += [
        f"| {label} | {found.tokens} | {found.kl_mean:.5f} | {found.kl_median:.5f} | "
        f"{found.kl_p90:.5f} | {floor.kl_mean:.1e} | {found.top1_agreement:.2%} |"
        for label, (found, floor) in rows.items()
    ]
    lines += ["", f"Divergences in nats. Noise floor: {FLOOR}."]
    found = receipt.by_language
    if found is None:
        return lines
    return [
        *lines,
        "",
        f"On {TOKENS} tokens of the same text in each of {len(found.languages)} languages the "
        f"median of the means is {receipt.median_kl:.5f} nats. These lose most:",
        "",
        "| | KL mean | Noise floor | Top-1 |",
        "|---" * 4 + "|",
        *(
            f"| {tag} | {own.kl_mean:.5f} | {floor.kl_mean:.1e} | {own.top1_agreement:.2%} |"
            for tag in receipt.ranked[:SHOWN]
            for own, floor in [found.languages[tag]]
        ),
    ]


def license_of(directory: Path) -> str | None:
    """The licence that the source's README names in its front matter, if any."""
    found = _LICENSE.search("\n".join(_front_matter(directory)))
    return found[1] if found else None


def _front_matter(directory: Path) -> list[str]:
    """The lines between and with the two rules at the top of a folder's card, if it has any."""
    if not exists(directory / CARD):
        return []
    with open_file(directory / CARD) as file:
        lines = file.read(_MAX_BYTES).decode("utf-8", "replace").splitlines()
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return []
    return [*lines[: lines.index("---", 1) + 1], ""]
