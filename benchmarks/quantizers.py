"""What quantization costs in quality: this package's quantizers beside mlx-lm's, at equal bytes.

    python -m benchmarks.quantizers [--bits 2 3 4 6] [--models embedded trained]
        [--windows 48] [--no-dwq] [--auto-round] [--json FILE] [--plot FILE]
    python -m benchmarks.quantizers --model DIR --text DIR [--windows 128] ...

Two models: the embedded one, and one that `tests.trained_model` trains first (half a minute). All
methods calibrate on the same windows of documents from the embedded model's recipe, and are judged
on others, whose seed was drawn for this benchmark and has never been tuned on. Groups have 64
weights, scales and biases are bfloat16, and every model is judged by the same float32 arithmetic on
its dequantized weights against the original. mlx-lm's GPTQ has 2, 4 and 8 bits and leaves the
embedding to rounding; its DWQ sees the windows once (batches of 4, Adam, the best of three rates).
An allocation may take what the uniform width takes, not more, and groups of 128 as well.

`--model` takes a checkpoint instead, such as `benchmarks.witness` trains, and `--text` a folder
with texts in `calibration` (a quarter of which an allocation is checked on) and others in `judged`.
`--auto-round` adds AutoRound's export for MLX with its defaults (200 iterations, here with biases),
at 2, 3, 4 and 8 bits; it too leaves the embedding to rounding. pip builds an environment for it in
`--environments`, where it is kept.

Each method runs in a process of its own: seconds are its wall clock without imports (where other
programs use the machine, look at those of CPU), memory is what its peak grew by from there.
`--json` grows with every row; `--plot` draws a file for each model, and where there are two their
names are added to FILE.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apertus_mlx.hub.demo import model_dir

# No array library here: on Linux a child's peak starts from what its parent holds.
ROOT = Path(__file__).resolve().parents[1]
# Length of windows by model, as each was trained.
LENGTHS = {"embedded": 256, "trained": 128}
CALIBRATION_LENGTH = 256
STOCK = ("mlx-lm rtn", "mlx-lm gptq", "mlx-lm dwq")
STOCK_GPTQ_BITS = (2, 4, 8)
AUTO_ROUND = "AutoRound"
AUTO_ROUND_BITS = (2, 3, 4, 8)
OURS = (
    "search", "gptq", "gptq + smooth", "gptq + rotate", "gptq + allocation", "gptq + tune",
    "gptq + allocation + tune",
)  # fmt: skip
# Most that our best may have of the divergence of mlx-lm's best, by bits.
BARS = {2: 0.45, 3: 0.40, 4: 0.60, 6: 0.60}
# The name of a model given by its folder, and its bars.
WITNESS = "witness"
WITNESS_BARS = {2: 0.30, 3: 0.35, 4: 0.45, 6: 0.45}
COLUMNS = (
    "model", "bits", "method", "bytes", "KL mean", "median", "p90", "top-1", "perplexity",
    "seconds", "of CPU", "memory, MB",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One method on one model, with the length and the number of its calibration windows.

    Attributes:
        text: a folder with `calibration` and `judged`; None is the embedded model's recipe.
        environments: where AutoRound's is.
        judge_seed: of other documents to judge by; None are those that nothing was tuned on.
    """

    method: str
    directory: Path
    bits: int
    length: int
    windows: int
    text: Path | None = None
    environments: Path | None = None
    judge_seed: int | None = None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--models", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--model", type=Path, help="a checkpoint instead of --models")
    parser.add_argument("--text", type=Path, help="of --model: folder of calibration and judged")
    parser.add_argument("--methods", nargs="+", choices=(*STOCK, *OURS), default=[*STOCK, *OURS])
    parser.add_argument("--auto-round", action="store_true", help="AutoRound as well")
    parser.add_argument("--environments", type=Path, help="folder to keep AutoRound's in")
    parser.add_argument(
        "--windows", type=int, default=48, help=f"of {CALIBRATION_LENGTH} tokens, or as many tokens"
    )
    parser.add_argument(
        "--judge-seed", type=int, help="judge by other documents, such as a design is chosen by"
    )
    parser.add_argument("--no-dwq", action="store_true", help="spare the slowest of mlx-lm's")
    parser.add_argument("--json", type=Path, help="write all figures into this file")
    parser.add_argument("--plot", type=Path, help="draw divergence against bytes: SVG, PNG or PDF")
    parser.add_argument("--work", type=Path, help="folder to keep the trained model in")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.text is None):
        parser.error("--model and --text go together")
    methods = [m for m in arguments.methods if not (arguments.no_dwq and m == "mlx-lm dwq")]
    methods = [*methods, *[AUTO_ROUND] * arguments.auto_round]
    found: list[dict[str, Any]] = []
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        place = (arguments.environments or work / "environments").resolve()
        for name in [WITNESS] if arguments.model else arguments.models:
            directory = arguments.model or (model_dir() if name == "embedded" else train(work))
            for bits in arguments.bits:
                for case in _cases(
                    methods, name, directory, bits, arguments.windows, arguments.text, place,
                    arguments.judge_seed,
                ):  # fmt: skip
                    found.append({"model": name, "bits": bits, "method": case.method, **_run(case)})
                    print(_row(found[-1]), flush=True)
                    if arguments.json:
                        text = json.dumps({"results": found}, indent=2)
                        arguments.json.write_text(text + "\n")
    print()
    for line in verdicts(found):
        print(line)
    if arguments.plot:
        _draw(found, arguments.plot)


def _cases(
    methods: Sequence[str], name: str, directory: Path, bits: int, windows: int,
    text: Path | None, environments: Path, judge_seed: int | None = None,
) -> Iterator[Case]:  # fmt: skip
    length = LENGTHS.get(name, CALIBRATION_LENGTH)
    offered = {"mlx-lm gptq": STOCK_GPTQ_BITS, AUTO_ROUND: AUTO_ROUND_BITS}
    for method in methods:
        if bits in offered.get(method, (bits,)):
            count = windows * CALIBRATION_LENGTH // length
            yield Case(method, directory, bits, length, count, text, environments, judge_seed)


def train(work: Path) -> Path:
    """The folder of the model that `tests.trained_model` trains, in `work`."""
    done = _child("tests.trained_model", str(work))
    return Path(done.strip().splitlines()[-1])


def _run(case: Case) -> dict[str, Any]:
    values = json.dumps(asdict(case), default=lambda path: str(path.resolve()))
    result: dict[str, Any] = json.loads(
        _child("benchmarks.quantizer_methods", values).strip().splitlines()[-1]
    )
    return result


def _child(module: str, argument: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, argument], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{module} {argument}: failed\n{done.stderr[-2000:]}")
    return done.stdout


def _row(found: Mapping[str, Any]) -> str:
    cells = [
        found["model"],
        str(found["bits"]),
        found["method"],
        f"{found['bytes']:,}",
        f"{found['kl_mean']:.5f}",
        f"{found['kl_median']:.5f}",
        f"{found['kl_p90']:.4f}",
        f"{found['top1_agreement']:.4f}",
        f"{found['perplexity']:.4f}",
        f"{found['wall_s']:.1f}",
        f"{found['cpu_s']:.1f}",
        f"{found['peak_growth_bytes'] / 1e6:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def verdicts(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """For each model and width, our best beside mlx-lm's best, and beside AutoRound."""
    for model, bits in dict.fromkeys((f["model"], f["bits"]) for f in found):
        same = [f for f in found if (f["model"], f["bits"]) == (model, bits)]
        ours = [f for f in same if f["method"] not in (*STOCK, AUTO_ROUND)]
        bars = WITNESS_BARS if model == WITNESS else BARS
        for rivals in (STOCK, (AUTO_ROUND,)):
            theirs = [f for f in same if f["method"] in rivals]
            if theirs and ours:
                best, rival = (min(side, key=lambda f: f["kl_mean"]) for side in (ours, theirs))
                ratio = best["kl_mean"] / rival["kl_mean"]
                bar = f" (bar {bars[bits]:.2f})" if rivals == STOCK and bits in bars else ""
                yield (
                    f"{model}, {bits} bits: {best['method']} has {ratio:.3f} of the divergence of "
                    f"{rival['method']}{bar}"
                )


def _draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    from apertus_mlx.cli.plot import Series, save_plot

    models = list(dict.fromkeys(f["model"] for f in found))
    for model in models:
        same = [f for f in found if f["model"] == model]
        series = []
        for method in dict.fromkeys(f["method"] for f in same):
            points = sorted((f["bytes"] / 1e6, f["kl_mean"]) for f in same if f["method"] == method)
            series.append(Series(method, [x for x, _ in points], [y for _, y in points]))
        file = path if len(models) == 1 else path.with_stem(f"{path.stem}-{model}")
        save_plot(
            file, series, "weights, MB", "mean KL divergence, nats",
            f"Quantizers on the {model} model", log_y=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
