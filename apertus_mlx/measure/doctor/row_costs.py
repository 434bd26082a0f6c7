"""What a pass over several tokens costs beside one over one, which decides whether a draft pays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import median

import mlx.core as mx

from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.checkpoint.layout import layer
from apertus_mlx.quant.spec import QuantSpec

MOST_ROWS = 5
ROUNDS, WARM_UP = 9, 2
# Of a matrix whose rows are these, over and over: only how many bytes are read matters.
DISTINCT = 64

Product = Callable[[mx.array], mx.array]


def row_costs(inventory: Inventory, dtype: mx.Dtype) -> tuple[float, ...]:
    """Time of the products of a layer with 1 to `MOST_ROWS` rows, over that with one.

    The matrices have the shapes and formats of the model's first layer and weights of their own, so
    that nothing of the model is loaded.
    """
    first = f"{layer(0)}."
    products = [
        (matrix.columns, _product(matrix.rows, matrix.columns, matrix.spec, dtype))
        for path, matrix in inventory.matrices.items()
        if path.startswith(first)
    ]
    inputs = [
        [(mx.random.normal((count, columns)).astype(dtype), run) for columns, run in products]
        for count in range(1, MOST_ROWS + 1)
    ]
    taken: list[list[float]] = [[] for _ in inputs]
    for number in range(WARM_UP + ROUNDS):
        for index, given in enumerate(inputs):
            seconds = _seconds(given)
            if number >= WARM_UP:
                taken[index].append(seconds)
    once = median(taken[0])
    return tuple(median(each) / once for each in taken)


def _seconds(given: Iterable[tuple[mx.array, Product]]) -> float:
    begun = time.perf_counter()
    mx.eval([product(vectors) for vectors, product in given])
    return time.perf_counter() - begun


def _product(rows: int, columns: int, spec: QuantSpec | None, dtype: mx.Dtype) -> Product:
    some = mx.random.normal((min(DISTINCT, rows), columns)).astype(dtype)
    parts = [some]
    if spec is not None:
        parts = list(mx.quantize(some, spec.group_size, spec.bits, spec.mode))
    times = -(-rows // some.shape[0])
    parts = [mx.tile(part, (times, 1))[:rows] for part in parts]
    mx.eval(parts)
    if spec is None:
        return lambda vectors: vectors @ parts[0].T
    weight, scales, *biases = parts
    form = (spec.group_size, spec.bits, spec.mode)
    return lambda vectors: mx.quantized_matmul(
        vectors, weight, scales, biases[0] if biases else None, True, *form
    )
