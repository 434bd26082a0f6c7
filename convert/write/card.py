"""The output's README.md: what the folder is, from what and how it was made."""

from __future__ import annotations

import re
from pathlib import Path

from apertus_mlx.convert.evaluation.evaluate import FLOOR, Evaluation
from apertus_mlx.convert.plan.plan import DTYPE_NAMES, Plan
from apertus_mlx.system.model_files import exists, open_file

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LICENSE = re.compile(r"^license:[ \t]*([\w.\-]{1,60})[ \t]*$", re.MULTILINE)
MAX_CARD_BYTES = 2**20


def make_card(
    plan: Plan,
    name: str,
    source: str,
    commit: str | None,
    license_id: str | None,
    quality: Evaluation | None = None,
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
    if plan.request.rotate or plan.request.smooth:
        names = ("rotated", "smoothed")
        chosen = zip(names, (plan.request.rotate, plan.request.smooth), strict=True)
        lines.insert(-1, f"| Change of basis | {', '.join(name for name, on in chosen if on)} |")
    if quality is not None:
        lines += divergence_table(quality)
    if plan.notes:
        lines += ["", "Notes of the conversion:", "", *(f"- {note}" for note in plan.notes)]
    lines += [
        "",
        "`apertus_mlx_manifest.json` holds the hash of each file; "
        "`apertus-mlx verify DIR` checks them.",
        "",
    ]
    return "\n".join(lines)


def divergence_table(quality: Evaluation) -> list[str]:
    """Markdown lines: what the model lost against its source, for each language and over all."""
    lines = ["", f"Predictions beside those of the source, on texts ({quality.text_name}):", ""]
    lines += ["| | Tokens | KL mean | median | p90 | Noise floor | Top-1 |", "|---" * 7 + "|"]
    rows = {**quality.languages, "all": (quality.overall, quality.overall_floor)}
    lines += [
        f"| {label} | {found.tokens} | {found.kl_mean:.5f} | {found.kl_median:.5f} | "
        f"{found.kl_p90:.5f} | {floor.kl_mean:.1e} | {found.top1_agreement:.2%} |"
        for label, (found, floor) in rows.items()
    ]
    return [*lines, "", f"Divergences in nats. Noise floor: {FLOOR}."]


def license_of(directory: Path) -> str | None:
    """The licence that the source's README names in its front matter, if any."""
    path = directory / "README.md"
    if not exists(path):
        return None
    with open_file(path) as file:
        text = file.read(MAX_CARD_BYTES).decode("utf-8", "replace")
    if not text.startswith("---"):
        return None
    found = _LICENSE.search(text.split("\n---", 1)[0])
    return found[1] if found else None
