"""How often drafts are right, by three rules, and what they do to speed; mlx-lm's beside it.

    python -m benchmarks.speculation [MODEL] [DRAFT] [--tokens 64] [--ahead 3]
    python -m benchmarks.speculation --estimates

By default the embedded model and its 2-bit form, converted on the spot. Acceptance is a mean over
the tokens of the model's answers, up to their end: of a guess drawn with the same key, over 32 keys
each; of the rejection rule (the sum of min(p, q), in float64); of a guess that is drawn apart (the
sum of p q). Speed is of greedy answers, computed by MLX in float32; a round plays all ways one
after the other, and medians of rounds are shown.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.decode import draw_tokens
from apertus_mlx.generation.draft_model import require_draft
from apertus_mlx.generation.draft_pace import FixedPace, MeasuredPace, Pace
from apertus_mlx.generation.drafts import LookupDraft, ModelDraft
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.generation.sampling import Sampler, SamplingParams, filter_logits
from apertus_mlx.generation.speculate import Draft, Speculator
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.model.language_model import NextTokenLogits
from apertus_mlx.tools import convert_model

QUESTIONS = (
    "What is the capital of France?",
    "Tell me about the mountains of Switzerland.",
    "Who are you?",
    "How many people live in Italy?",
    "What is the currency of Japan?",
    "Which language do people speak in Brazil?",
)
KEYS = 32
SETTINGS = {
    "temperature 1": SamplingParams(temperature=1.0, top_p=1.0, seed=0),
    "temperature 0.8, top-p 0.9": SamplingParams(temperature=0.8, top_p=0.9, seed=0),
}


# A pass over 1, 2, ... rows in passes over one, at 4 bits: ml-explore/mlx#3852; ml-explore/mlx PR
# 3791 (70B, 2 and 4 rows between its neighbours); ml-explore/mlx#4265 (4 rows; 2 and 3 likewise).
ROWS = {
    "M4 Pro": (1.0, 0.99, 1.13, 1.43, 1.75),
    "M5 Max": (1.0, 1.06, 1.12, 1.30, 1.49),
    "M3 Ultra": (1.0, 1.75, 2.51, 3.26),
    "rows one by one": (1.0, 2.0, 3.0, 4.0, 5.0),
}
# Bytes that a token reads: 0.5B beside 8B, both at 4 bits.
DRAFT_COST = 247 / 4228
RIGHT = (0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> None:
    """Measure, and print lines or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("draft", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--ahead", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-acceptance", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--estimates", action="store_true", help="no measurement: a table")
    arguments = parser.parse_args()
    if arguments.estimates:
        print("\n".join(estimates()))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or model_dir()
        small = arguments.draft or Path(scratch) / "2-bit"
        if arguments.draft is None:
            convert_model(folder, small, bits=2, group_size=32, requantize=True)
        options = RunOptions(compute="mlx", dtype="float32")
        model, draft = open_folder(folder).load(options), open_folder(small).load(options)
        require_draft(model.folder, draft.folder)
        report: dict[str, Any] = {}
        for name, params in SETTINGS.items():
            report |= acceptance(model, draft, params, name, arguments.tokens)
        if not arguments.only_acceptance:
            report |= speed(model, draft, arguments.tokens, arguments.ahead, arguments.rounds)
            report |= peer(folder, small, model, arguments)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        for name, value in report.items():
            print(f"{name}: {value}")


def estimates() -> Iterator[str]:
    """Tokens a second in plain decoding's, with the best number of guesses; not measured."""
    yield f"| chip | {' | '.join(map(str, RIGHT))} |"
    yield "|---" * (len(RIGHT) + 1) + "|"
    for chip, rows in ROWS.items():
        cells = []
        for share in RIGHT:
            gains = [
                sum(share**i for i in range(k + 1)) / (rows[k] + k * DRAFT_COST)
                for k in range(1, len(rows))
            ]
            best = max(gains)
            cells.append(f"{best:.2f} ({gains.index(best) + 1})" if best > 1 else "off")
        yield f"| {chip} | {' | '.join(cells)} |"


def draft_of(model: LoadedModel, draft: LoadedModel) -> ModelDraft:
    """A draft with nothing in its cache."""
    width = model.folder.config.output_vocab_size
    return ModelDraft(draft.model, draft.folder.context_length, width)


def speculator_of(
    model: LoadedModel, draft: Draft, pace: Pace, prompt: list[int], params: SamplingParams
) -> tuple[Speculator, mx.array]:
    """What draws an answer, and the logits it begins with."""
    prefix = CachedPrefix(model.model)
    prefix.allow_cut(pace.most)
    run = prefix.begin(prompt)
    logits = run.read()
    sampler = Sampler(params, prompt, model.folder.config.output_vocab_size)
    return Speculator(run, draft, pace, prompt, sampler), logits


def acceptance(
    model: LoadedModel, draft: LoadedModel, params: SamplingParams, name: str, tokens: int
) -> dict[str, float]:
    """Shares of guesses that are right."""
    keys = mx.random.split(mx.random.key(1), KEYS)
    same, rejection, apart = [], [], []
    for question in QUESTIONS:
        prompt = model.folder.prompt_ids(question)
        found, logits = speculator_of(model, draft_of(model, draft), FixedPace(1), prompt, params)
        answer = list(found.tokens(logits, tokens))
        ends = [at for at, token in enumerate(answer) if token in model.folder.stop_ids]
        answer = answer[: ends[0] + 1] if ends else answer
        ids = mx.array([[*prompt, *answer]])
        rows = [each.model(ids)[0, len(prompt) - 1 : -1] for each in (model, draft)]
        for pair in zip(*rows, strict=True):
            kept = [filter_logits(NextTokenLogits(row), params) for row in pair]
            ours, theirs = (
                np.array(mx.stack([mx.random.categorical(each, key=key) for key in keys]))
                for each in kept
            )
            p, q = (probabilities(each) for each in kept)
            same.append(np.mean(ours == theirs))
            rejection.append(np.minimum(p, q).sum())
            apart.append((p * q).sum())
    return {
        f"{name}: positions": len(same),
        f"{name}: same key": round(float(np.mean(same)), 3),
        f"{name}: rejection rule": round(float(np.mean(rejection)), 3),
        f"{name}: drawn apart": round(float(np.mean(apart)), 3),
    }


def probabilities(kept: mx.array) -> np.ndarray:
    """What is drawn from, in float64."""
    weights = np.exp(np.array(kept, np.float64))
    return np.asarray(weights / weights.sum())


def speed(
    model: LoadedModel, draft: LoadedModel, tokens: int, ahead: int, rounds: int
) -> dict[str, str]:
    """Tokens a second of greedy answers."""
    greedy = SamplingParams(temperature=0.0, seed=0)
    vocabulary = model.folder.config.output_vocab_size

    def plain(prompt: list[int]) -> Callable[[], list[int]]:
        run = CachedPrefix(model.model).begin(prompt)
        logits = run.read()
        sampler = Sampler(greedy, prompt, vocabulary)
        return lambda: list(draw_tokens(run.step, logits, sampler, tokens))

    def drafted(
        make: Callable[[], Draft], pace: Pace, prompt: list[int]
    ) -> Callable[[], list[int]]:
        found, logits = speculator_of(model, make(), pace, prompt, greedy)
        return lambda: list(found.tokens(logits, tokens))

    def small() -> Draft:
        return draft_of(model, draft)

    measured, looked = MeasuredPace(), MeasuredPace()
    ways: dict[str, Callable[[list[int]], Callable[[], list[int]]]] = {
        "plain": plain,
        f"draft, always {ahead} ahead": lambda prompt: drafted(small, FixedPace(ahead), prompt),
        "draft, as far as it pays": lambda prompt: drafted(small, measured, prompt),
        "lookup, as far as it pays": lambda prompt: drafted(LookupDraft, looked, prompt),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            seconds = 0.0
            for question in QUESTIONS:
                draw = way(model.folder.prompt_ids(question))
                started = time.perf_counter()
                draw()
                seconds += time.perf_counter() - started
            if round_:
                rates[name].append(tokens * len(QUESTIONS) / seconds)
    report = {f"{name}, tokens/s": f"{statistics.median(each):.1f}" for name, each in rates.items()}
    costs = ", ".join(f"{k}: {1e3 * each:.2f}" for k, each in measured.seconds.items())
    return report | {"passes by guesses, ms": costs, "right": f"{measured.share:.2f}"}


def peer(
    folder: Path, small: Path, model: LoadedModel, arguments: argparse.Namespace
) -> dict[str, str]:
    """The same greedy answers by mlx-lm, alone and with the draft."""
    if importlib.util.find_spec("mlx_lm") is None:
        return {"mlx-lm": "not installed"}
    import mlx_lm
    from mlx_lm.generate import generate_step, speculative_generate_step

    try:
        loaded: list[Any] = [mlx_lm.load(str(each))[0] for each in (folder, small)]
    except Exception as error:
        return {"mlx-lm": f"cannot load these: {error}"}
    for each in loaded:
        each.set_dtype(mx.float32)
    ways: dict[str, Callable[[mx.array], Any]] = {
        "plain": lambda ids: generate_step(ids, loaded[0], max_tokens=arguments.tokens),
        f"draft, {arguments.ahead} ahead": lambda ids: speculative_generate_step(
            ids, *loaded, num_draft_tokens=arguments.ahead, max_tokens=arguments.tokens
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(arguments.rounds + 1):
        for name, way in ways.items():
            seconds, count = 0.0, 0
            for question in QUESTIONS:
                steps = iter(way(mx.array(model.folder.prompt_ids(question))))
                next(steps)
                started = time.perf_counter()
                count += sum(1 for _ in steps)
                seconds += time.perf_counter() - started
            if round_:
                rates[name].append(count / seconds)
    return {
        f"mlx-lm {mlx_lm.__version__}, {name}, tokens/s": f"{statistics.median(each):.1f}"
        for name, each in rates.items()
    }


if __name__ == "__main__":
    main()
