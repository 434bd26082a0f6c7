"""What the embedded model still knows at 16, 6, 4, 3 and 2 bits: its exam of 100 questions.

    python -m benchmarks.embedded_exam [--bits 6 4 3 2] [--group-size 64] [--json]

The questions are wordings that training never saw (recipes/demo/exam.py); answers
are greedy. Each width is converted as `apertus-mlx convert --bits N` does it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import SamplingOptions
from apertus_mlx.generation.run import Generation
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.text.template import Message
from recipes.demo import exam
from recipes.demo.facts import LANGUAGES


def sit(loaded: LoadedModel) -> exam.Report:
    """Let a model answer all questions."""

    def answer(question: str, language: str) -> str:
        assert loaded.folder.template is not None
        prompt = loaded.folder.template.render([Message(role="user", content=question)])
        generation = Generation(loaded, prompt, SamplingOptions(temperature=0, max_tokens=40))
        return "".join(piece.text for piece in generation)

    return exam.run(answer)


def main() -> None:
    """Print one row per width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="*", default=[6, 4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [_row("bf16", model_dir())]
    with tempfile.TemporaryDirectory() as scratch:
        for bits in arguments.bits:
            target = Path(scratch) / f"{bits}bit"
            request = Request(QuantSpec(bits, arguments.group_size))
            convert(prepare(model_dir(), request, "embedded"), target, False, lambda _: None)
            rows.append(_row(f"{bits} bits", target))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        languages = ", ".join(f"{name} {row[name]}" for name in LANGUAGES)
        print(
            f"{row['weights']}: {row['right']} of {row['questions']} "
            f"(held-out combinations {row['combination']}, held-out wordings {row['template']}; "
            f"{languages}), {row['weights_bytes']:,} bytes"
        )


def _row(name: str, directory: Path) -> dict[str, str | int]:
    report = sit(open_folder(directory).load())
    right, count = report.score()
    row: dict[str, str | int] = {"weights": name, "right": right, "questions": count}
    for half in exam.HALVES:
        row[half] = "{} of {}".format(*report.score(half=half))
    for language in LANGUAGES:
        row[language] = report.score(language=language)[0]
    row["weights_bytes"] = (directory / "model.safetensors").stat().st_size
    return row


if __name__ == "__main__":
    main()
