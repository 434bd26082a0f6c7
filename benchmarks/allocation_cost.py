"""What allocating bits adds to a conversion: whole conversions of both kinds, from the same text.

    python -m benchmarks.allocation_cost [--bits 2 3 4] [--rounds 3] [--documents 1500]
        [--model DIR ...]

`convert --bits N --method gptq` and `convert --target-size`, with the bytes of the former, one
after the other in each round. Seconds are those of the processor for the whole process, which
reads the texts, calibrates, writes and judges; the least of all rounds. Models are those of
`--model`, else the embedded one and that which `tests.trained_model` trains first (half a minute).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from apertus_mlx.hub.demo import model_dir
from benchmarks.quantizer_methods import CALIBRATION_SEED, recipe_texts
from benchmarks.quantizers import ROOT, train


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--model", type=Path, nargs="+", default=[])
    arguments = parser.parse_args()
    print("| model | bits | uniform, s | `--target-size`, s | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        text = _text(work / "text.jsonl", arguments.documents)
        models = [(model.name, model.resolve()) for model in arguments.model]
        for name, model in models or [("embedded", model_dir()), ("trained", train(work))]:
            sums = [0.0, 0.0]
            for bits in arguments.bits:
                seconds = _both(model, bits, text, work, arguments.rounds)
                sums = [total + more for total, more in zip(sums, seconds, strict=True)]
                print(_row(name, str(bits), seconds), flush=True)
            print(_row(name, "all", sums), flush=True)


def _both(model: Path, bits: int, text: Path, work: Path, rounds: int) -> list[float]:
    """Seconds of a uniform conversion, and of an allocation of as many bytes."""
    uniform = ["--bits", str(bits)]
    planned = _convert([str(model), str(work / "planned"), *uniform, "--plan", "--json"])[0]
    size = ["--target-size", str(json.loads(planned)["output_bytes"])]
    least = [float("inf")] * 2
    for _ in range(rounds):
        for kind, form in enumerate((uniform, size)):
            with tempfile.TemporaryDirectory(dir=work) as place:
                arguments = [str(model), f"{place}/model", *form, "--calibration", str(text)]
                least[kind] = min(least[kind], _convert([*arguments, "--method", "gptq"])[1])
    return least


def _convert(arguments: Sequence[str]) -> tuple[str, float]:
    """What `convert` says on stdout, and how many seconds of the processor it took."""
    before = _children_s()
    done = subprocess.run(
        [sys.executable, "-m", "apertus_mlx", "convert", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return done.stdout, _children_s() - before


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _text(file: Path, count: int) -> Path:
    """Documents of the embedded model's recipe, in the form that `--calibration` reads."""
    with file.open("w") as lines:
        for document in islice(recipe_texts(CALIBRATION_SEED), count):
            key = "text" if isinstance(document.content, str) else "messages"
            lines.write(json.dumps({key: document.content}) + "\n")
    return file


def _row(name: str, bits: str, seconds: Sequence[float]) -> str:
    uniform, allocated = seconds
    return f"| {name} | {bits} | {uniform:.2f} | {allocated:.2f} | {allocated / uniform:.2f} |"


if __name__ == "__main__":
    main()
