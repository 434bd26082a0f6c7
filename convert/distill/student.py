"""The student: an Apertus model whose weights are codes, scales and biases while it learns.

Its forward pass computes with exactly what would be stored: codes rounded, scales, biases and norms
rounded to their stored type. Gradients pass these roundings as if they were not there
("Estimating or Propagating Gradients Through Stochastic Neurons", arXiv 1308.3432).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.convert.evaluation.layerwise import SourceWeights
from apertus_mlx.convert.evaluation.numpy_operations import compute_here, learning_xielu
from apertus_mlx.convert.evaluation.products import product
from apertus_mlx.convert.sources.reading import MLX_TYPES
from apertus_mlx.convert.sources.source import MatrixSource, Source
from apertus_mlx.errors import UsageError
from apertus_mlx.model.apertus import XIELU, Model, xielu
from apertus_mlx.quant.packing import pack, unpack
from apertus_mlx.quant.spec import QuantSpec

# What learns: codes, scales, biases, norms and slopes of activations, or all but the codes.
Trained = Literal["weights", "scales"]
TRAINED: tuple[Trained, ...] = ("weights", "scales")
CODES = "codes"
ACTIVATION = "mlp.act_fn"


class Quantized(nn.Module):
    """A matrix of codes `[rows, columns]` with a scale and a bias per group, `[rows, groups]`.

    While they learn, codes are positions between the values that a group can have, counted in
    steps; the nearest value is what counts. Codes that do not learn are held in 8 bits. Scales and
    biases are counted in `unit`, a power of two near the typical scale, so that one learning rate
    suits matrices of large and small weights.
    """

    def __init__(
        self, codes: mx.array, scales: mx.array, biases: mx.array, spec: QuantSpec, dtype: mx.Dtype
    ) -> None:
        nn.Module.__init__(self)
        self.spec, self.dtype = spec, dtype
        typical = float(np.abs(np.array(scales)).mean())
        self.unit = 2.0 ** round(math.log2(typical)) if typical > 0 else 1.0
        self.codes, self.scales, self.biases = codes, scales / self.unit, biases / self.unit

    def weights(self, rows: Any = slice(None)) -> mx.array:
        """Some rows in float32, as the stored model would have them."""
        return self.weights_of(self.codes[rows], self.scales[rows], self.biases[rows])

    def weights_of(self, codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        """What codes, scales and biases of some rows stand for; gradients go to all three."""
        codes = self._nearest(codes)
        scales, biases = (rounded(part * self.unit, self.dtype) for part in (scales, biases))
        groups = mx.unflatten(codes, -1, (-1, self.spec.group_size))
        return (groups * scales[..., None] + biases[..., None]).flatten(-2)

    def stored(self) -> tuple[mx.array, mx.array, mx.array]:
        """Packed codes, scales and biases in MLX's format."""
        codes = np.array(self._nearest(self.codes)).astype(np.uint8)
        scales, biases = (
            (array * self.unit).astype(self.dtype) for array in (self.scales, self.biases)
        )
        return mx.array(pack(codes, self.spec.bits)), scales, biases

    def learn_codes(self) -> None:
        """Hold codes as positions, each at the value of its code."""
        self.codes = self.codes.astype(mx.float32)

    def keep_in_range(self) -> None:
        """Bring positions back to where a step in the other direction changes their code."""
        if self.codes.dtype == mx.float32:
            self.codes = self.in_range(self.codes)

    def in_range(self, positions: mx.array) -> mx.array:
        """The nearest of positions that `keep_in_range` leaves as they are."""
        return mx.clip(positions, -0.5, self._highest + 0.5)

    @property
    def _highest(self) -> int:
        return (1 << self.spec.bits) - 1

    def _nearest(self, codes: mx.array) -> mx.array:
        positions = codes.astype(mx.float32)
        return straight_through(mx.clip(mx.round(positions), 0, self._highest), positions)


class QuantizedProjection(Quantized):
    """A quantized matrix that activations are multiplied with."""

    def __call__(self, x: mx.array) -> mx.array:
        """Apply to `x` `[..., columns]`."""
        return product(x, self.weights())


class QuantizedTable(Quantized, nn.Embedding):
    """A quantized embedding, which may also be the head."""

    def __call__(self, ids: mx.array) -> mx.array:
        """Rows of these ids."""
        return self.weights(ids)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits of `x` `[..., columns]`."""
        return product(x, self.weights())


class RoundedNorm(nn.RMSNorm):
    """An RMS norm that computes with its weight as stored in `dtype`."""

    def __init__(self, weight: mx.array, eps: float, dtype: mx.Dtype) -> None:
        nn.Module.__init__(self)
        self.weight, self.eps, self.dtype = weight, eps, dtype

    def __call__(self, x: mx.array) -> mx.array:
        """Normalize over the last axis."""
        return mx.fast.rms_norm(x, rounded(self.weight, self.dtype), self.eps)


class RoundedActivation(nn.Module):
    """xIELU that computes with its slopes as stored in `dtype`; its other constants stay."""

    def __init__(self, activation: XIELU, dtype: mx.Dtype) -> None:
        nn.Module.__init__(self)
        self.alpha_p, self.alpha_n = activation.alpha_p, activation.alpha_n
        self.beta, self.eps, self.dtype = activation.beta, activation.eps, dtype
        self._apply: Callable[..., mx.array] = self._by_mlx
        if not has_gpu():
            self._apply = learning_xielu(*(float(np.array(a)) for a in (self.beta, self.eps)))

    def __call__(self, x: mx.array) -> mx.array:
        """Apply elementwise."""
        stored = (rounded(array, self.dtype) for array in (self.alpha_p, self.alpha_n))
        alpha_p, alpha_n = (mx.logaddexp(array, 0.0) for array in stored)
        return self._apply(x, alpha_p, self.beta.astype(mx.float32) + alpha_n)

    def _by_mlx(self, x: mx.array, alpha_p: mx.array, alpha_n: mx.array) -> mx.array:
        return xielu(x, alpha_p, alpha_n, self.beta, self.eps)


def rounded(values: mx.array, dtype: mx.Dtype) -> mx.array:
    """`values` as stored in `dtype`, in float32; the gradient passes unchanged."""
    return straight_through(values.astype(dtype).astype(mx.float32), values)


def straight_through(value: mx.array, source: mx.array) -> mx.array:
    """Exactly `value`, with the gradient going to `source`."""
    # What is added is zero, not nearly so: both terms are the same number.
    return mx.stop_gradient(value) + (source - mx.stop_gradient(source))


def check_student(source: Source) -> None:
    """Refuse a checkpoint that cannot learn.

    Raises:
        UsageError: nothing is quantized, or a matrix is so in another form than MLX's affine one.
    """
    if not source.is_quantized:
        raise UsageError(f"{source.name}: is not quantized; convert --bits makes a student from it")
    for path, matrix in source.matrices.items():
        stored = matrix.stored
        if matrix.is_quantized and (
            stored is None or not stored.spec.has_biases or stored.factor is not None
        ):
            form = "another form" if stored is None else str(stored.spec)
            raise UsageError(
                f"{source.name}: {path}: is quantized as {form}; only affine codes learn"
            )


def make_student(weights: SourceWeights, trained: Trained) -> Model:
    """The model of a quantized checkpoint; only the parameters to train are unfrozen.

    Matrices that are not quantized stay as they are.

    Raises:
        UsageError: see `check_student`.
        RejectedError: a value is not finite.
    """
    check_student(weights.source)
    config = weights.config
    modules: dict[str, Any] = {}
    arrays: dict[str, mx.array] = {}
    types: dict[str, mx.Dtype] = {}
    for matrix in weights.source.layout:
        found = weights.source.matrices[matrix.path]
        if found.is_quantized:
            modules[matrix.path] = _quantized(matrix, found, weights)
        else:
            arrays[f"{matrix.path}.weight"] = mx.array(weights.matrix(matrix.path))
    for name, shape in layout.vectors(config):
        value = mx.array(weights.vector(name)).reshape(shape)
        tensor = weights.source.vectors[name]
        if tensor is not None:
            types[name] = MLX_TYPES[tensor.dtype]
        if name.endswith("norm.weight") and tensor is not None:
            path = name.removesuffix(".weight")
            modules[path] = RoundedNorm(value, config.rms_norm_eps, types[name])
        else:
            arrays[name] = value
    return assemble(config, modules, arrays, types, trained)


def assemble(
    config: ModelConfig,
    modules: Mapping[str, nn.Module],
    arrays: Mapping[str, mx.array],
    types: Mapping[str, mx.Dtype],
    trained: Trained,
) -> Model:
    """A model of `modules` by path and, for all else, `arrays` by name; see `make_student`.

    `types` are those in which slopes of activations are stored; others do not learn.
    """
    model = Model(config)
    model.update_modules(tree_unflatten(list(modules.items())))
    model.update(tree_unflatten(list(arrays.items())))
    for index, layer in enumerate(model.layers):
        activation = layer.mlp.act_fn
        if not has_gpu():
            compute_here(layer)
        dtype = types.get(f"{layout.layer(index)}.{ACTIVATION}.alpha_p")
        if dtype is not None:
            setattr(layer.mlp, "act_fn", RoundedActivation(activation, dtype))  # noqa: B010
    model.freeze()
    for _, module in learning_modules(model):
        keys = ["weight"] if isinstance(module, RoundedNorm) else ["scales", "biases"]
        if isinstance(module, RoundedActivation):
            keys = list(layout.ALPHAS)
        if isinstance(module, Quantized) and trained == "weights":
            keys.append(CODES)
            module.learn_codes()
        module.unfreeze(keys=keys)
    return model


def learning_modules(
    model: Model,
) -> Iterator[tuple[str, Quantized | RoundedNorm | RoundedActivation]]:
    """The parts of a student that may learn, by their paths in a checkpoint."""
    for path, module in nn.Module.named_modules(model):
        if isinstance(module, Quantized | RoundedNorm | RoundedActivation):
            yield path, module


def stored_tensors(model: Model) -> Iterator[tuple[str, mx.array]]:
    """Every trained tensor, as the checkpoint stores it."""
    for path, module in learning_modules(model):
        if isinstance(module, RoundedNorm):
            yield f"{path}.weight", module.weight.astype(module.dtype)
            continue
        if isinstance(module, RoundedActivation):
            for name in layout.ALPHAS:
                yield f"{path}.{name}", module[name].astype(module.dtype)
            continue
        for part, array in zip(("weight", "scales", "biases"), module.stored(), strict=True):
            yield f"{path}.{part}", array


def _quantized(matrix: layout.Matrix, found: MatrixSource, weights: SourceWeights) -> Quantized:
    stored, codes = found.stored, found.read_codes(weights.reader, 0, matrix.rows)
    assert stored is not None and codes.biases is not None
    form = stored.spec, MLX_TYPES[stored.scale_dtype]
    return quantized(matrix, (codes.weight, codes.scales, codes.biases), *form)


def quantized(
    matrix: layout.Matrix, tensors: Sequence[mx.array], spec: QuantSpec, dtype: mx.Dtype
) -> Quantized:
    """The module of a matrix from its packed codes, scales and biases."""
    codes, scales, biases = tensors
    unpacked = mx.array(unpack(np.array(codes), spec.bits, matrix.columns))
    kind = QuantizedTable if matrix.path == layout.EMBEDDING else QuantizedProjection
    return kind(unpacked, scales.astype(mx.float32), biases.astype(mx.float32), spec, dtype)
