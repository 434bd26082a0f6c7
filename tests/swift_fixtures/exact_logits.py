"""Apertus in float64 with NumPy alone, straight from the equations, without the package's model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

Array = np.ndarray[Any, Any]


def exact_logits(folder: Path, ids: Array) -> Array:
    """Logits `[L, vocabulary]` of the token ids `ids` `[L]`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = _weights(folder, config)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    waves = _waves(config, head_dim)
    length, eps = len(ids), config["rms_norm_eps"]
    causal = np.triu(np.full((length, length), -np.inf), 1)
    x = weights["model.embed_tokens.weight"][ids]
    for index in range(config["num_hidden_layers"]):
        layer = _Prefixed(weights, f"model.layers.{index}.")
        h = _norm(x, layer["attention_layernorm.weight"], eps)
        q, k, v = (
            (h @ layer[f"self_attn.{name}_proj.weight"].T).reshape(length, -1, head_dim)
            for name in "qkv"
        )
        q = _turned(_norm(q, layer["self_attn.q_norm.weight"], eps), waves)
        k = _turned(_norm(k, layer["self_attn.k_norm.weight"], eps), waves)
        mixed = np.empty_like(q)
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, shared].T / math.sqrt(head_dim) + causal
            share = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, head] = share / share.sum(-1, keepdims=True) @ v[:, shared]
        x = x + mixed.reshape(length, -1) @ layer["self_attn.o_proj.weight"].T
        h = _norm(x, layer["feedforward_layernorm.weight"], eps) @ layer["mlp.up_proj.weight"].T
        x = x + _xielu(h, layer) @ layer["mlp.down_proj.weight"].T
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    return _norm(x, weights["model.norm.weight"], eps) @ weights[f"{head}.weight"].T


class _Prefixed:
    def __init__(self, weights: Mapping[str, Array], prefix: str) -> None:
        self._weights, self._prefix = weights, prefix

    def __getitem__(self, name: str) -> Array:
        return self._weights[self._prefix + name]

    def get(self, name: str, default: float) -> Array:
        return self._weights.get(self._prefix + name, np.float64(default))


def _norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def _turned(x: Array, waves: Array) -> Array:
    angles = np.arange(len(x))[:, None, None] / waves
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _waves(config: Mapping[str, Any], head_dim: int) -> Array:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.get("rope_theta", config.get("rope_theta"))
    waves = theta ** (np.arange(0, head_dim, 2) / head_dim)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        return waves * rope["factor"]
    if kind == "llama3":
        turns = rope["original_max_position_embeddings"] / (2 * math.pi * waves)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return 1 / ((1 - kept) / (rope["factor"] * waves) + kept / waves)
    return waves


def _xielu(x: Array, layer: _Prefixed) -> Array:
    beta, eps = layer.get("mlp.act_fn.beta", 0.5), layer.get("mlp.act_fn.eps", -1e-6)
    alpha_p = np.logaddexp(0, layer["mlp.act_fn.alpha_p"])
    alpha_n = beta + np.logaddexp(0, layer["mlp.act_fn.alpha_n"])
    return np.where(
        x > 0,
        alpha_p * x * x + beta * x,
        (np.expm1(np.minimum(x, eps)) - x) * alpha_n + beta * x,
    )


def _weights(folder: Path, config: Mapping[str, Any]) -> dict[str, Array]:
    arrays: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        arrays |= loaded
    block = config.get("quantization") or {}
    found = {}
    for name, array in arrays.items():
        path = name.rpartition(".")[0]
        if name.endswith((".scales", ".biases", "output_scale", "output_divisor")):
            continue
        if f"{path}.scales" not in arrays:
            found[name] = np.asarray(array.astype(mx.float32), np.float64)
            continue
        form = {**block, **(block.get(path) or {})}
        parts = [arrays.get(f"{path}.{part}") for part in ("scales", "biases")]
        scales, biases = (
            part.astype(mx.float32) if part is not None and part.dtype == mx.bfloat16 else part
            for part in parts
        )
        mode = form.get("mode", "affine")
        rows = mx.dequantize(
            array, scales, biases, form["group_size"], form["bits"], mode, dtype=mx.float32
        )
        found[name] = np.asarray(rows, np.float64)
        if f"{path}.output_scale" in arrays:
            factor = np.asarray(arrays[f"{path}.output_scale"].astype(mx.float32), np.float64)
            found[name] = found[name] * factor[:, None]
        if f"{path}.output_divisor" in arrays:
            factor = np.asarray(arrays[f"{path}.output_divisor"].astype(mx.float32), np.float64)
            found[name] = found[name] / factor
    return found
