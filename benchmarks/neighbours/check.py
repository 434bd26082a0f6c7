"""How each folder of the corpus is read: as it is, or converted, and with which values."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.convert.job import Job, convert, prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.errors import ApertusError, UsageError
from benchmarks.neighbours.corpus import ABOUT, EXPECTED, ROUNDING, matrices
from tests import convert_builders as build


@dataclass(frozen=True)
class Result:
    """One row of the table.

    `fault` is empty where the values are the library's own or where the refusal is meant.
    """

    tool: str
    version: str
    form: str
    result: str
    fault: str = ""

    @property
    def kind(self) -> str:
        """What the sum at the table's end counts it under."""
        if self.fault:
            return "read wrongly"
        return re.split(r"[;:(]", self.result)[0].strip()


def check(corpus: Path) -> Iterator[Result]:
    """Read every folder of the corpus."""
    for about in sorted(corpus.glob(f"*/*/{ABOUT}")):
        said = json.loads(about.read_text())
        place = about.parent
        names = said["tool"], said["version"], said["form"]
        if "not_made" in said:
            yield Result(*names, f"not made: {said['not_made']}")
            continue
        with np.load(place / EXPECTED) as stored:
            expected = dict(stored)
        result, fault = check_folder(place / "model", expected, ROUNDING[said["dtype"]])
        yield Result(*names, result, fault)


def check_folder(folder: Path, expected: dict[str, np.ndarray], rounding: float) -> tuple[str, str]:
    """What happens to a folder, and what is wrong with that (or nothing).

    Args:
        folder: what a tool wrote.
        expected: the values of its weight matrices by module path; empty where none are known.
        rounding: relative error of the type that the tool computes them in.
    """
    how = []
    refusal = ""
    try:
        take_inventory(folder)
        how.append("runs as it is")
    except ApertusError as error:
        refusal = str(error)
    out = folder.with_name("converted")
    shutil.rmtree(out, ignore_errors=True)
    try:
        job = prepare(folder, Request(), folder.name)
        if not how:
            how.append("converts, codes kept" if _keeps(job) else "converts")
        values = _kept_values(job, out)
    except ApertusError as error:
        refusal = str(error)
        try:
            job = prepare(folder, Request(dequantize=True, dtype="F32"), folder.name)
            how.append(f"converts with --dequantize ({_reason(refusal)})")
            values = matrices(build.read_folder(convert(job, out)))
        except ApertusError as second:
            return f"refused: {_reason(str(second))}", ""
    finally:
        # What has been read is in memory.
        shutil.rmtree(out, ignore_errors=True)
    if not expected:
        return f"{how[0]}; values not compared", ""
    worst = _worst(values, expected)
    if worst <= rounding:
        return f"{how[0]}; values equal", ""
    return how[0], f"values differ by {worst:.2g} of the largest in a row"


def _keeps(job: Job) -> bool:
    return any(step.transform == "keep" for step in job.plan.steps)


def _kept_values(job: Job, out: Path) -> dict[str, np.ndarray]:
    """What a conversion that keeps the codes stands for, by a second one that unpacks them."""
    folder = convert(job, out)
    if not _keeps(job):
        return matrices(build.read_folder(folder))
    plain = out.with_name("plain")
    shutil.rmtree(plain, ignore_errors=True)
    request = Request(dequantize=True, dtype="F32")
    try:
        return matrices(build.read_folder(convert(prepare(folder, request, out.name), plain)))
    except UsageError:
        return {}
    finally:
        shutil.rmtree(plain, ignore_errors=True)


def _worst(values: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest difference, relative to the largest value of its row; infinite if one lacks."""
    worst = 0.0
    for path, theirs in expected.items():
        ours = values.get(path)
        if ours is None or ours.shape != theirs.shape:
            return float("inf")
        size = np.abs(theirs).max(1, keepdims=True)
        worst = max(worst, float((np.abs(ours - theirs) / np.maximum(size, 1e-30)).max()))
    return worst


def _reason(message: str) -> str:
    """A message without the folder that it is about."""
    place, _, rest = message.partition("model: ")
    message = rest if rest and "/" in place else message
    message = message.partition("model.safetensors: ")[2] or message
    return message.partition("; --dequantize")[0]
