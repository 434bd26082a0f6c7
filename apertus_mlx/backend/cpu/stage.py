"""The arithmetic between two attentions as one ONNX graph.

A stage takes the heads' outputs of one layer and the residual stream, and goes on through output
projection and feed-forward to the rotated queries and keys and the values of the next layer. All
arrays are rows, one per position: `[rows, width]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from apertus_mlx.backend.cpu.runtime import Array, Session
from apertus_mlx.backend.cpu.weights import Dense, Floats, Quantized, Weight, stack
from apertus_mlx.checkpoint.config import ModelConfig

MICROSOFT = "com.microsoft"
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
# The oldest file version with these operator sets, for older runtimes.
IR_VERSION = 8
# Leaving out xIELU's eps changes it by at most alpha_n * |eps|, where -|eps| < x <= 0.
MAX_EPS = 1e-5
ACCURACY_LEVEL = {"float32": 0, "int8": 4}
TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int64": TensorProto.INT64}


def serialized(
    nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], initializers: Any = ()
) -> bytes:
    """A graph as onnxruntime takes it."""
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=IR_VERSION)
    written: bytes = model.SerializeToString()
    return written


class Stage:
    """A graph under construction: each method appends operations and returns their output."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._weights: dict[str, Array] = {}
        self._constants: dict[str, Any] = {}
        self._names = 0

    def session(self) -> Session:
        """The finished graph, ready to run."""
        initializers = [*map(_external, self._weights, self._weights.values())]
        initializers += self._constants.values()
        graph = serialized(self._nodes, self._inputs, self._outputs, initializers)
        return Session(graph, self._weights)

    def input(self, name: str, width: int | None, dtype: str = "float32") -> str:
        """An input `[rows, width]`, or `[1, rows]` without a width."""
        shape: list[str | int | None] = [1, "rows"] if width is None else ["rows", width]
        self._inputs.append(helper.make_tensor_value_info(name, TYPES[dtype], shape))
        return name

    def output(self, value: str) -> None:
        """Make `value` the next output, of any shape."""
        self._outputs.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))

    def add_norm(self, residual: str, update: str | None, weight: Floats) -> tuple[str, str]:
        """The residual stream with its update, and its RMS norm."""
        eps = self.config.rms_norm_eps
        if update is None:
            return residual, self._rms_norm(residual, weight)
        total = self._name()
        normed = self._node(
            "SkipSimplifiedLayerNormalization",
            residual, update, self._weight(weight),
            domain=MICROSOFT, more_outputs=("", "", total), epsilon=eps,
        )  # fmt: skip
        return total, normed

    def project_qkv(
        self, x: str, weights: Sequence[Weight], query_norm: Floats, key_norm: Floats
    ) -> tuple[str, str, str]:
        """Normalized and rotated queries and keys, and values, each `[1, rows, width]`."""
        cos, sin = (self.input(name, self.config.head_dim // 2) for name in ("cos", "sin"))
        positions = self.input("positions", None, "int64")
        queries, keys, values = self._products(x, weights)

        def rotated(heads: str, norm: Floats, width: int) -> str:
            rows = self._reshape(heads, (-1, self.config.head_dim))
            normed = self._reshape(self._rms_norm(rows, norm), (1, -1, width))
            return self._node(
                "RotaryEmbedding", normed, positions, cos, sin,
                domain=MICROSOFT, num_heads=width // self.config.head_dim,
            )  # fmt: skip

        return (
            rotated(queries, query_norm, weights[0].rows),
            rotated(keys, key_norm, weights[1].rows),
            self._reshape(values, (1, -1, weights[2].rows)),
        )

    def xielu(self, x: str, alpha_p: float, alpha_n: float, beta: float) -> str:
        """The activation xIELU, without its eps (see `MAX_EPS`).

        With p = max(x, 0) and m = min(x, 0): p (alpha_p p + alpha_n) + alpha_n expm1(m)
        + (beta - alpha_n) x. And expm1(m) = 2t / (1 - t), t = tanh(m / 2): right for small m, too.
        """
        zero, one = self._scalar(0.0), self._scalar(1.0)
        tanh = self._node("Tanh", self._scaled(self._node("Min", x, zero), 0.5))
        half_expm1 = self._node("Div", tanh, self._node("Sub", one, tanh))
        positive = self._node("Relu", x)
        slope = self._node("Add", self._scaled(positive, alpha_p), self._scalar(alpha_n))
        linear = self._node(
            "Add", self._node("Mul", positive, slope), self._scaled(x, beta - alpha_n)
        )
        return self._node("Add", self._scaled(half_expm1, 2 * alpha_n), linear)

    def product(self, x: str, weight: Weight) -> str:
        """`x` `[rows, columns]` times the transposed matrix."""
        if isinstance(weight, Dense):
            return self._node("Gemm", x, self._weight(weight.values), transB=1)
        total = self._plane(x, weight, 0)
        if weight.offsets is not None:
            sums = self._group_sums(x, weight)
            total = self._node("Gemm", sums, self._weight(weight.offsets), total)
        for index in range(1, len(weight.planes)):
            total = self._node("Add", total, self._plane(x, weight, index))
        return total

    def _products(self, x: str, weights: Sequence[Weight]) -> list[str]:
        """The products of `x` with several matrices, computed as one where their forms agree."""
        parts: list[str] = []
        widths = [weight.rows for weight in weights]
        for stacked in stack(weights):
            whole = self.product(x, stacked)
            inside: list[int] = []
            while sum(inside) < stacked.rows:
                inside.append(widths[len(parts) + len(inside)])
            if len(inside) == 1:
                parts.append(whole)
                continue
            names = [self._name() for _ in inside]
            sizes = self._constant(np.array(inside, np.int64))
            self._nodes.append(helper.make_node("Split", [whole, sizes], names, axis=1))
            parts += names
        return parts

    def _plane(self, x: str, weight: Quantized, index: int) -> str:
        plane = weight.planes[index]
        arrays: list[Array] = [
            plane.codes,
            plane.scales,
            *([] if plane.zeros is None else [plane.zeros]),
        ]
        return self._node(
            "MatMulNBits", x, *map(self._weight, arrays),
            domain=MICROSOFT, K=weight.columns, N=weight.rows, bits=plane.bits,
            block_size=weight.group_size, accuracy_level=ACCURACY_LEVEL[weight.activations],
        )  # fmt: skip

    def _group_sums(self, x: str, weight: Quantized) -> str:
        groups = weight.columns // weight.group_size
        grouped = self._reshape(x, (-1, groups, weight.group_size))
        return self._node("ReduceSum", grouped, self._constant(np.array([2])), keepdims=0)

    def _rms_norm(self, x: str, weight: Floats) -> str:
        return self._node(
            "SimplifiedLayerNormalization", x, self._weight(weight),
            axis=-1, epsilon=self.config.rms_norm_eps,
        )  # fmt: skip

    def _scaled(self, x: str, factor: float) -> str:
        return self._node("Mul", x, self._scalar(factor))

    def _reshape(self, x: str, shape: tuple[int, ...]) -> str:
        return self._node("Reshape", x, self._constant(np.array(shape, np.int64)))

    def _node(
        self, op: str, *inputs: str, more_outputs: tuple[str, ...] = (), **attributes: Any
    ) -> str:
        output = self._name()
        self._nodes.append(helper.make_node(op, inputs, [output, *more_outputs], **attributes))
        return output

    def _scalar(self, value: float) -> str:
        return self._constant(np.array(value, np.float32))

    def _constant(self, array: Array) -> str:
        key = f"{array.dtype}:{array.tolist()}"
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(array, self._name())
        return str(self._constants[key].name)

    def _weight(self, array: Array) -> str:
        name = self._name()
        self._weights[name] = np.ascontiguousarray(array)
        return name

    def _name(self) -> str:
        self._names += 1
        return f"v{self._names}"


def _external(name: str, array: Array) -> Any:
    """A declaration of a weight that is handed over beside the graph."""
    tensor = TensorProto(name=name, data_type=TYPES[array.dtype.name], dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="memory")
    return tensor
