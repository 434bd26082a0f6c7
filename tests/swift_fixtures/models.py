"""Tiny checkpoints in all forms, with the logits that Python computes from them, bit by bit.

`models/NAME/` is the folder. `expected.safetensors` in `models/NAME.expected/` holds `ids` (a
prompt), `exact` (its logits in float64, by NumPy alone), and, for each type that is computed in
(`float32.`, `bfloat16.`): `prompt` (logits `[L, vocabulary]` of one pass) and `steps` (logits
`[N, vocabulary]` of the next tokens, one at a time). In float32 also `greedy` and `sampled.CASE`
ids and, for each form of cache, `form.CASE.logits` and `.greedy`; the cases are in `cases.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.cache import CacheConfig
from apertus_mlx.generation.decode import decode, prefill
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.model.apertus import Model
from tests.builders import LLAMA3, config_4x, config_5x, random_weights, write_checkpoint
from tests.swift_fixtures.exact_logits import exact_logits
from tests.swift_fixtures.sizes import NIGHTLY

PROMPT = 150
STEPS = 4
DRAWN = 20
# Long enough to turn rings and to move several blocks of 32 to codes.
TOKENS = 60
AFFINE = {2: (32, 128), 3: (32, 64), 4: (32, 64, 128), 5: (64,), 6: (64, 128), 8: (32, 128)}
if not NIGHTLY:
    AFFINE = {2: (32,), 3: (64,), 4: (64, 128), 6: (128,), 8: (32,)}
SAMPLED = {
    "default": {},
    "top-k": {"top_p": 1.0, "top_k": 7, "temperature": 1.3},
    "min-p": {"top_p": 1.0, "min_p": 0.05, "temperature": 0.6},
    "penalty": {"repetition_penalty": 1.3, "top_k": 50},
    "greedy-penalty": {"temperature": 0.0, "repetition_penalty": 1.2},
    "answer-penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.7},
    "greedy-frequency": {"temperature": 0.0, "frequency_penalty": -0.3, "presence_penalty": 0.4},
}
SAMPLED_FROM = ("float32-sharded", "affine-4-64")
FORMS_OF = ("affine-4-64", "llama3-head-dim") if NIGHTLY else ("affine-4-64",)
FORMS = {
    "full": {},
    "bounded": {"bound": 40},
    "bounded-no-sinks": {"bound": 33, "sinks": 0},
    "codes-8": {"key_bits": 8, "value_bits": 8},
    "codes-4-bounded": {"key_bits": 4, "value_bits": 4, "bound": 180, "window": 32},
    "codes-3-6": {"key_bits": 3, "value_bits": 6, "window": 0, "sinks": 2},
    "codes-16-2": {"key_bits": 16, "value_bits": 2, "window": 16},
    "codes-plain": {"key_bits": 6, "value_bits": 16, "rotate": False},
}


def write_model_fixtures(out: Path) -> None:
    """Write the folders described above."""
    for name, write in _models():
        folder = out / "models" / name
        write(folder)
        _write_expected(folder)


def _models() -> Iterator[tuple[str, Callable[[Path], object]]]:
    wide = {"hidden_size": 128, "intermediate_size": 256}
    yield "bf16", lambda path: write_checkpoint(path, config_4x(), dtype=mx.bfloat16)
    yield "float32-sharded", lambda path: write_checkpoint(path, config_4x(), shards=3)
    tied = config_4x(tie_word_embeddings=True)
    yield "tied", lambda path: write_checkpoint(path, tied, dtype=mx.bfloat16)
    yield "tied-head-stored", lambda path: write_checkpoint(path, tied, _with_stored_head(tied))
    rope = config_5x(rope_scaling=LLAMA3, rope_theta=12000000, head_dim=32)
    yield "llama3-head-dim", lambda path: write_checkpoint(path, rope)
    linear = config_4x(rope_scaling={"rope_type": "linear", "factor": 3.0})
    yield "linear-steep", lambda path: write_checkpoint(path, linear, _steep(linear))
    bare = config_4x()
    yield "no-constants", lambda path: write_checkpoint(path, bare, _without_constants(bare))
    for bits, groups in AFFINE.items():
        for group in groups:
            config = config_4x(**wide, tie_word_embeddings=bits == 4)
            yield f"affine-{bits}-{group}", _quantized(config, bits=bits, group_size=group)
    yield "mxfp4", _quantized(config_4x(), bits=4, group_size=32, mode="mxfp4")
    yield "mxfp8", _quantized(config_4x(), bits=8, group_size=32, mode="mxfp8")
    yield "nvfp4", _quantized(config_4x(), bits=4, group_size=16, mode="nvfp4")
    yield "mixed", _mixed
    yield "factors", _with_factors


def _steep(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Slopes as the released 8B's first layer has them, before softplus."""
    weights = random_weights(config)
    for name in weights:
        if ".0." in name and name.endswith(("alpha_p", "alpha_n")):
            weights[name] = np.full((1,), 166.0 if name.endswith("alpha_n") else 40.75, np.float32)
    return weights


def _with_stored_head(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    weights = random_weights(config)
    return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}


def _without_constants(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    weights = random_weights(config)
    return {k: v for k, v in weights.items() if not k.endswith((".beta", ".eps"))}


def _quantized(
    config: Mapping[str, Any],
    *,
    exceptions: Mapping[str, Any] | None = None,
    factors: Mapping[str, mx.array] | None = None,
    shards: int = 1,
    **spec: Any,
) -> Callable[[Path], object]:
    """A writer of MLX's own form: `quantization` in the config, codes beside scales."""

    def write(folder: Path) -> None:
        arrays: dict[str, mx.array] = {}
        special = exceptions or {}
        for name, value in random_weights(config).items():
            path, _, kind = name.rpartition(".")
            array = mx.array(value).astype(mx.bfloat16)
            form = special.get(path, spec)
            if kind != "weight" or path.endswith("norm") or form is False:
                arrays[name] = array
                continue
            parts = mx.quantize(array, **form)
            for part, stored in zip(("weight", "scales", "biases"), parts, strict=False):
                arrays[f"{path}.{part}"] = stored
        arrays.update(factors or {})
        block = {**spec, **special}
        write_checkpoint(
            folder, {**config, "quantization": block}, arrays, dtype=mx.bfloat16, shards=shards
        )

    return write


def _mixed(folder: Path) -> None:
    """Other bits for some modules, plain weights for one, more positions than one file."""
    special = {
        "model.embed_tokens": {"bits": 6, "group_size": 64},
        "model.layers.0.self_attn.k_proj": {"bits": 8, "group_size": 32},
        "model.layers.1.mlp.down_proj": False,
        "lm_head": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    }
    config = config_4x(hidden_size=128, intermediate_size=256)
    _quantized(config, exceptions=special, shards=2, bits=3, group_size=128)(folder)


def _with_factors(folder: Path) -> None:
    """Factors of rows and of a whole matrix, as FP8 and NVFP4 sources leave them."""
    rows = mx.array(np.linspace(0.5, 2, 64), mx.float32)
    factors = {
        "model.layers.0.self_attn.q_proj.output_scale": rows,
        "model.layers.1.mlp.down_proj.output_divisor": mx.array([3.0]),
    }
    _quantized(config_4x(), factors=factors, bits=8, group_size=64)(folder)


def _write_expected(folder: Path) -> None:
    sampled: dict[str, Any] = SAMPLED if folder.name in SAMPLED_FROM else {}
    forms: dict[str, Any] = FORMS if folder.name in FORMS_OF else {}
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 384, PROMPT)
    exact = exact_logits(folder, ids).astype(np.float32)
    arrays = {"ids": mx.array(ids.astype(np.int32)), "exact": mx.array(exact)}
    for dtype in ("float32", "bfloat16"):
        model = load_model(folder, dtype)
        tokens = [int(token) for token in ids]
        found = _plain_run(model, tokens)
        if dtype == "float32":
            greedy = SamplingParams(temperature=0.0, seed=0)
            found["greedy"] = _drawn(model, tokens, greedy, DRAWN)
            for name, values in sampled.items():
                params = SamplingParams(**{"seed": 7, **values})
                found[f"sampled.{name}"] = _drawn(model, tokens, params, DRAWN)
            for name, form in forms.items():
                run = _in_form(model, tokens, CacheConfig(**form))
                found |= {f"form.{name}.{key}": value for key, value in run.items()}
        arrays |= {f"{dtype}.{key}": value for key, value in found.items()}
    beside = folder.with_name(f"{folder.name}.expected")
    beside.mkdir(exist_ok=True)
    mx.save_safetensors(str(beside / "expected.safetensors"), arrays)
    cases = {"sampled": sampled, "forms": forms}
    (beside / "cases.json").write_text(json.dumps(cases, indent=1), encoding="utf-8")


def _plain_run(model: Model, ids: list[int]) -> dict[str, mx.array]:
    cache = model.make_cache()
    prompt = model(mx.array([ids]), cache)[0]
    steps, token = [], mx.argmax(prompt[-1])
    for _ in range(STEPS):
        logits = model.next_token_logits(token.reshape(1, 1), cache).values
        steps.append(logits)
        token = mx.argmax(logits)
    return {"prompt": prompt, "steps": mx.stack(steps)}


def _drawn(model: Model, ids: list[int], params: SamplingParams, count: int) -> mx.array:
    cache = model.make_cache()
    logits = prefill(model, ids, cache, step=64)
    sampler = Sampler(params, ids, model.config.output_vocab_size)
    return mx.array(list(decode(model, logits, cache, sampler, count)), mx.int32)


def _in_form(model: Model, ids: list[int], form: CacheConfig) -> dict[str, mx.array]:
    """Logits after the prompt, read in chunks of 64, and after each of the likeliest tokens."""
    cache = model.make_cache(form)
    logits = [prefill(model, ids, cache, step=64)]
    for _ in range(TOKENS):
        token = mx.argmax(logits[-1]).reshape(1, 1)
        logits.append(model.next_token_logits(token, cache).values)
    rows = mx.stack(logits)
    return {"logits": rows, "greedy": mx.argmax(rows[:TOKENS], axis=-1).astype(mx.int32)}
