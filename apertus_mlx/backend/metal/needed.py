"""The kernels that one model has places for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import mlx.core as mx

from apertus_mlx.backend.metal.add_rms_norm import AddRMSNorm
from apertus_mlx.backend.metal.attention_input import ROWS_EACH, AttentionInput
from apertus_mlx.backend.metal.best_token import BestToken
from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.backend.metal.qk_norm_rope import QKNormRope
from apertus_mlx.backend.metal.quantized_matvec import (
    TILES,
    Epilogue,
    Prologue,
    QuantizedMatvec,
    unfit,
)
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.quant.spec import QuantSpec

_Kind = TypeVar("_Kind", bound=Kernel)
# How each matrix of a layer is used: after a norm or not, and what follows it. Where the norm is
# a kernel of its own, the activation still goes with the matrix.
_FORMS: dict[str, tuple[tuple[Prologue, Epilogue], ...]] = {
    "o_proj": (("none", "residual"),),
    "up_proj": (("rms_norm", "xielu"), ("none", "xielu")),
    "down_proj": (("none", "residual"),),
}
_QKV_FORM: tuple[Prologue, Epilogue] = ("rms_norm", "none")
_HEAD_FORMS: tuple[tuple[Prologue, Epilogue], ...] = (("rms_norm", "peaks"), ("none", "peaks"))
_QKV = ("q_proj", "k_proj", "v_proj")


def kernels_for(
    config: ModelConfig, specs: Mapping[str, QuantSpec], dtype: mx.Dtype
) -> tuple[Kernel, ...]:
    """Every specialisation for decoding with this model, one per place, then their variants.

    Args:
        config: the model.
        specs: formats of its quantized matrices by path, such as `model.layers.0.mlp.up_proj`.
            A matrix that is missing, or that no kernel reads, has no kernel.
        dtype: type of activations, scales and norms.
    """
    matvecs = tuple(dict.fromkeys(_matvecs(config, specs, dtype)))
    joined = [matvec for matvec in matvecs if (matvec.prologue, matvec.epilogue) == _QKV_FORM]
    inputs = [kernel for matvec in joined for kernel in _attention_inputs(config, matvec)]
    eps, heads = config.rms_norm_eps, (config.num_attention_heads, config.num_key_value_heads)
    around = [
        *_fitting(QKNormRope, *heads, config.head_dim, dtype, eps),
        *_fitting(AddRMSNorm, config.hidden_size, dtype, eps),
    ]
    usual: list[Kernel] = [*inputs, *around, *matvecs]
    tuned = [replace(matvec, tile=tile) for tile in TILES[1:] for matvec in matvecs]
    peaks = [matvec for matvec in (*matvecs, *tuned) if matvec.epilogue == "peaks"]
    best = [kernel for matvec in peaks for kernel in _fitting(BestToken, matvec.tiles)]
    return tuple(dict.fromkeys([*usual, *best[:1], *tuned, *best[1:]]))


def _attention_inputs(config: ModelConfig, product: QuantizedMatvec) -> Iterator[AttentionInput]:
    for rows_each in ROWS_EACH:
        yield from _fitting(
            AttentionInput,
            product.bits, product.group_size, product.columns, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, product.dtype, product.eps, rows_each,
        )  # fmt: skip


def _fitting(kind: Callable[..., _Kind], *arguments: Any) -> list[_Kind]:
    """The kernel of these sizes, if there is one."""
    try:
        return [kind(*arguments)]
    except ValueError:
        return []


def _matvecs(
    config: ModelConfig, specs: Mapping[str, QuantSpec], dtype: mx.Dtype
) -> Iterator[QuantizedMatvec]:
    for matrix in layout.matrices(config):
        parent, _, leaf = matrix.path.rpartition(".")
        rows, forms = matrix.rows, _FORMS.get(leaf, ())
        if leaf == "q_proj" and len({specs.get(f"{parent}.{part}") for part in _QKV}) == 1:
            rows += 2 * config.num_key_value_heads * config.head_dim
            forms = (_QKV_FORM,)
        elif matrix.path == (layout.EMBEDDING if config.tie_word_embeddings else layout.HEAD):
            forms = _HEAD_FORMS
        spec = specs.get(matrix.path)
        if spec is not None and unfit(spec, rows, matrix.columns) is None:
            form = (spec.bits, spec.group_size, matrix.columns, rows, dtype)
            for prologue, epilogue in forms:
                yield QuantizedMatvec(*form, prologue, epilogue, config.rms_norm_eps)
