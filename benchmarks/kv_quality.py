"""What each cache form costs in quality: KL divergence from full precision, beside mlx-lm's.

    python -m benchmarks.kv_quality [MODEL_DIR] [--tokens N] [--random [SIZE ...]]

Text is read in windows of the model's context, in chunks of 64 tokens, so that queries meet
quantized keys as they do in use. Per form: mean KL divergence of the next-token distribution from
that of the full-precision cache (in nats), and how often the most likely token is the same. The
`--random` models have the head geometry of the released sizes, random weights and random tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.cache import FULL_PRECISION, CacheConfig
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.model.apertus import Model

EMBEDDED = model_dir()
CHUNK = 64


def read_windows(directory: Path, tokens: int, context: int) -> list[list[int]]:
    """Conversations and statements that training did not see, cut into windows."""
    from tokenizers import Tokenizer

    from recipes.demo.corpus import documents

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    windows: list[list[int]] = [[]]
    for document in documents(seed=987_654_321):
        for segment in document:
            windows[-1] += tokenizer.encode(segment.text, add_special_tokens=False).ids
        if len(windows[-1]) >= context:
            windows[-1] = windows[-1][:context]
            if sum(map(len, windows)) >= tokens:
                return windows
            windows.append([])
    raise AssertionError


def log_probabilities(model: Any, window: list[int], cache: list[Any]) -> mx.array:
    """Log-probabilities `[L, vocabulary]` after each token, read in chunks."""
    ids = mx.array(window)[None]
    rows = []
    for start in range(0, len(window), CHUNK):
        logits = model(ids[:, start : start + CHUNK], cache)[0].astype(mx.float32)
        rows.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(rows[-1])
    return mx.concatenate(rows)


def compare(reference: list[mx.array], found: Iterator[mx.array]) -> tuple[float, float, float]:
    """Mean and 99th percentile of the KL divergence, and the share of equal top tokens."""
    divergence, same = [], []
    for expected, got in zip(reference, found, strict=True):
        kl = mx.sum(mx.exp(expected) * (expected - got), axis=-1)
        divergence.append(np.array(kl, np.float64))
        same.append(np.array(mx.argmax(expected, -1) == mx.argmax(got, -1)))
    all_kl = np.maximum(np.concatenate(divergence), 0)
    return (
        float(all_kl.mean()),
        float(np.quantile(all_kl, 0.99)),
        float(np.concatenate(same).mean()),
    )


def forms(more: bool) -> dict[str, CacheConfig]:
    """The forms to measure, by name."""
    table = {}
    for bits in (8, 6, 4, 3, 2):
        form = CacheConfig(bits, bits)
        table[f"{bits} bits (default)"] = form
        table[f"{bits} bits, no rotation"] = replace(form, rotate=False)
    if more:
        for bits in (4, 3, 2):
            form = CacheConfig(bits, bits)
            table[f"K {bits} bits alone"] = CacheConfig(bits, 16)
            table[f"K {bits} bits alone, no rotation"] = CacheConfig(bits, 16, rotate=False)
            table[f"V {bits} bits alone"] = CacheConfig(16, bits)
            for sinks, window in ((0, 0), (4, 0), (0, 64), (4, 32), (4, 128), (16, 64)):
                name = f"{bits} bits, sinks {sinks}, window {window}"
                table[name] = replace(form, sinks=sinks, window=window)
        table["K 4, V 3 bits"] = CacheConfig(4, 3)
        table["K 3, V 4 bits"] = CacheConfig(3, 4)
        table["bound 512"] = CacheConfig(bound=512)
        table["bound 512, 4 bits"] = CacheConfig(4, 4, bound=512)
    return table


def measure(name: str, model: Model, theirs: Any, windows: list[list[int]], more: bool) -> None:
    """Print one table: our forms and mlx-lm's, each against full precision of the same code."""
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    print(f"\n{name}: {sum(map(len, windows))} tokens\n")
    print(f"{'cache':34} {'mean KL':>10} {'99 % KL':>10} {'same top':>9} {'x mlx-lm':>9}")
    layers = len(model.layers)
    full = [
        log_probabilities(model, window, model.make_cache(FULL_PRECISION)) for window in windows
    ]
    noise = compare(
        full, (log_probabilities(theirs, w, [KVCache() for _ in range(layers)]) for w in windows)
    )
    print(
        f"{'mlx-lm, full precision (noise)':34} {noise[0]:10.2e} {noise[1]:10.2e} {noise[2]:9.4f}"
    )
    base: dict[int, float] = {}
    for bits in (8, 6, 4, 3, 2):
        caches = ([QuantizedKVCache(64, bits) for _ in range(layers)] for _ in windows)
        found = (
            log_probabilities(theirs, w, cache) for w, cache in zip(windows, caches, strict=True)
        )
        try:
            kl, tail, same = compare(full, found)
        except ValueError as error:
            # Its 6-bit cache does not fit heads of 128.
            print(f"{f'mlx-lm, {bits} bits':34} fails: {error}"[:100], flush=True)
            continue
        base[bits] = kl
        print(f"{f'mlx-lm, {bits} bits':34} {kl:10.2e} {tail:10.2e} {same:9.4f}", flush=True)
    for label, form in forms(more).items():
        found = (log_probabilities(model, w, model.make_cache(form)) for w in windows)
        kl, tail, same = compare(full, found)
        bits = min(form.key_bits, form.value_bits)
        ratio = f"{kl / base[bits]:9.3f}" if bits in base else ""
        print(f"{label:34} {kl:10.2e} {tail:10.2e} {same:9.4f} {ratio}", flush=True)


def load_with_mlx_lm(directory: Path) -> Any:
    """The same checkpoint in mlx-lm's own model class."""
    from mlx_lm.models import apertus

    config = json.loads((directory / "config.json").read_text())
    args = apertus.ModelArgs.from_dict(
        {"attention_bias": False, "mlp_bias": False, "post_norm": False, "qk_norm": True, **config}
    )
    model = apertus.Model(args)
    weights: dict[str, mx.array] = {}
    for file in sorted(directory.glob("*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        weights |= {key: array.astype(mx.float32) for key, array in loaded.items()}
    model.load_weights(list(model.sanitize(weights).items()))
    model.eval()
    return model


def random_directory(size: str, folder: Path) -> Path:
    """A random model of few layers with the head geometry of a released size."""
    from benchmarks.make_checkpoint import GEOMETRIES, config

    heads, kv_heads = GEOMETRIES[size][2:4]
    head_dim = GEOMETRIES[size][0] // heads
    settings = {
        **config(size),
        "num_hidden_layers": 4,
        "num_attention_heads": heads // 4,
        "num_key_value_heads": kv_heads // 4,
        "hidden_size": head_dim * heads // 4,
        "intermediate_size": head_dim * heads // 2,
        "vocab_size": 4096,
    }
    settings.pop("eos_token_id")
    from tests.builders import random_weights, write_checkpoint

    weights = random_weights(settings)
    # Trained models attend sharply; random keys and queries of norm one would not.
    for key in weights:
        if key.endswith(("q_norm.weight", "k_norm.weight")):
            weights[key] = weights[key] * 1.5
    return write_checkpoint(folder, settings, weights, tokenizer=False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=EMBEDDED)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--few", action="store_true", help="only the main forms")
    parser.add_argument(
        "--random", nargs="*", metavar="SIZE", help="random models at real head sizes"
    )
    arguments = parser.parse_args()
    if arguments.random is None:
        context = parse_config(json.loads((arguments.directory / "config.json").read_text()))
        windows = read_windows(
            arguments.directory, arguments.tokens, context.max_position_embeddings
        )
        model = load_model(arguments.directory, "float32")
        theirs = load_with_mlx_lm(arguments.directory)
        measure("embedded model", model, theirs, windows, more=not arguments.few)
        return
    import tempfile

    for size in arguments.random or ("0.5B", "8B"):
        with tempfile.TemporaryDirectory() as folder:
            directory = random_directory(size, Path(folder))
            model, theirs = load_model(directory, "float32"), load_with_mlx_lm(directory)
            rng = np.random.default_rng(0)
            windows = [rng.integers(0, 4096, 2048).tolist()]
            measure(f"random weights, heads as {size}", model, theirs, windows, more=False)


if __name__ == "__main__":
    main()
