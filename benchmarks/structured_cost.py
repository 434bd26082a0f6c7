"""What a schema costs per token at the vocabulary of the released models, and to prepare.

    python -m benchmarks.structured_cost [--rounds 5] [--json]

Builds the released tokenizer from mistral-common and a tiny model with its 131,072 rows; lets
random logits answer a schema, by each compute, with and without the schema. Times are medians of
rounds; where decoding can overlap rules and model, `per token` shows what is left.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from apertus_mlx.generation.decode import decode, prefill
from apertus_mlx.generation.grammar import Engine, check_grammar, schema_grammar
from apertus_mlx.generation.json_schema import read_schema
from apertus_mlx.generation.model_folder import LoadedModel, ModelFolder, open_folder
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.generation.structured import AnswerRules, require_schema
from apertus_mlx.model.language_model import NextTokenLogits
from tests.builders import config_4x, write_checkpoint
from tests.real_tokenizers import VOCAB_SIZE, write_real_tokenizers

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string"}},
            "required": ["street"],
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
ANSWER = (
    '{"name": "Zürich Hauptbahnhof, täglich 🏔️ geöffnet", "age": 123, "tags": ["eins", "zwei", '
    '"Bücher und mehr"], "address": {"street": "Bahnhofstrasse 1", "zip": "8001"}}'
)
FREE = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}


def main() -> None:
    """Measure, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        report = measure(folder, arguments.rounds, arguments.tokens)
    finally:
        shutil.rmtree(folder)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        for name, value in report.items():
            print(f"{name}: {value}")


def measure(folder: Path, rounds: int, tokens: int) -> dict[str, Any]:
    """Milliseconds by name."""
    write_real_tokenizers({"v1": folder / "tokenizer"})
    config = config_4x(vocab_size=VOCAB_SIZE, num_hidden_layers=1)
    write_checkpoint(folder / "model", config, tokenizer=False)
    shutil.copy(folder / "tokenizer/tokenizer.json", folder / "model")
    opened = open_folder(folder / "model")
    report = preparation(opened, rounds)
    report |= masks(opened)
    for compute in ("mlx", "cpu"):
        options = RunOptions(compute=compute)  # type: ignore[arg-type]
        report |= tokens_of(opened.load(options), compute, rounds, tokens)
    return report


def preparation(folder: ModelFolder, rounds: int) -> dict[str, Any]:
    """What is done once."""
    started = time.perf_counter()
    engine = Engine(folder.tokenizer, VOCAB_SIZE, folder.stop_ids)
    tokenizer_ms = 1e3 * (time.perf_counter() - started)

    def compiled() -> None:
        check_grammar.cache_clear()
        require_schema(SCHEMA)
        engine._grammars.clear()
        engine.matcher(schema_grammar(read_schema(SCHEMA)))

    return {
        "tokenizer, once, ms": round(tokenizer_ms),
        "schema, check and compile, ms": round(median_ms(compiled, rounds), 2),
        "schema, second use, ms": round(
            median_ms(lambda: engine.matcher(schema_grammar(require_schema(SCHEMA))), rounds), 3
        ),
    }


def masks(folder: ModelFolder) -> dict[str, Any]:
    """Microseconds of the rules for each token of an answer, the second time it is written."""
    schema = require_schema(SCHEMA)
    for _ in range(2):
        rules = AnswerRules(folder.tokenizer, VOCAB_SIZE, folder.stop_ids, schema=schema)
        times = []
        for token in folder.tokenizer.encode(ANSWER):
            started = time.perf_counter()
            rules.accept(token)
            times.append(1e6 * (time.perf_counter() - started))
    return {
        "rules per token, median us": round(statistics.median(times)),
        "rules per token, mean us": round(statistics.mean(times)),
        "rules per token, most us": round(max(times)),
    }


def tokens_of(loaded: LoadedModel, compute: str, rounds: int, tokens: int) -> dict[str, Any]:
    """Milliseconds per token of a run, free and under a schema, and of the masked draw alone."""
    folder, model = loaded.folder, loaded.model
    schema = require_schema(FREE)
    report: dict[str, Any] = {}
    for name, params in (
        ("greedy", SamplingParams(temperature=0)),
        ("temperature 0.8, top-p 0.9", SamplingParams(temperature=0.8, top_p=0.9, seed=1)),
    ):
        free, bound = [], []
        for _ in range(rounds):
            for times, text in ((free, None), (bound, schema)):
                rules = None
                if text is not None:
                    rules = AnswerRules(folder.tokenizer, VOCAB_SIZE, folder.stop_ids, schema=text)
                cache = model.make_cache()
                logits = prefill(model, [1, 2000, 3000], cache)
                sampler = Sampler(params, [], VOCAB_SIZE)
                started = time.perf_counter()
                count = sum(1 for _ in decode(model, logits, cache, sampler, tokens, rules))
                times.append(1e3 * (time.perf_counter() - started) / count)
        report[f"{compute}, {name}, free, ms per token"] = round(statistics.median(free), 2)
        report[f"{compute}, {name}, with schema, ms per token"] = round(statistics.median(bound), 2)
    mask = mx.array(np.arange(VOCAB_SIZE) % 3 == 0)
    given = NextTokenLogits(mx.random.normal((VOCAB_SIZE,)))
    sampler = Sampler(SamplingParams(temperature=0), [], VOCAB_SIZE)
    report["mask on logits, ms"] = round(
        median_ms(lambda: mx.eval(sampler(given, mask)), 50)
        - median_ms(lambda: mx.eval(sampler(given)), 50),
        3,
    )
    return report


def median_ms(work: Callable[[], object], rounds: int) -> float:
    """The median milliseconds of `work`, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
