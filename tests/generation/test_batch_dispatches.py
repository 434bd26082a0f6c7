"""What another row costs a decode step in kernels, counted on any machine."""

from __future__ import annotations

import mlx.core as mx
import pytest

from apertus_mlx.cache.rows import rows_of
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.model.apertus import Step
from apertus_mlx.model.language_model import NextTokenLogits
from tests.builders import config_4x
from tests.decode_step import JoinedPlain, build
from tests.dispatch_count import Dispatches, count_dispatches

LAYERS = 2


def dispatches(rows: int, step: Step | None) -> Dispatches:
    """Of one greedy step of so many rows."""
    size = {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": True}
    config = config_4x(**size, num_hidden_layers=LAYERS)
    model = build(config, step=step, compiled_activation=True)
    caches = []
    for length in range(1, rows + 1):
        caches.append(model.make_cache())
        mx.eval(model.model(mx.array([[5] * length]), caches[-1]))
    samplers = [Sampler(SamplingParams(temperature=0), [], model.config.vocab_size) for _ in caches]
    tokens = mx.array([[5]] * rows, mx.uint32)

    def batched() -> list[mx.array]:
        logits = model.logits(model.model(tokens, rows_of(caches)))  # type: ignore[arg-type]
        return [draw(NextTokenLogits(logits[i, 0])) for i, draw in enumerate(samplers)]

    return count_dispatches(batched)


@pytest.mark.parametrize(("step", "kernels"), [(None, 3), (JoinedPlain(), 2)])
def test_another_row_costs_a_layer_few_kernels(step: Step | None, kernels: int) -> None:
    """Writing keys and values, one or two, and attention; besides a copy to join the outputs.

    The counter takes a concatenation for one kernel; a GPU starts one for each of its inputs.
    """
    counts = {rows: dispatches(rows, step) for rows in (2, 4, 8)}
    for rows, found in counts.items():
        per_token = rows  # the choice of a token
        extra = (found.total - per_token) - (counts[2].total - 2)
        assert extra == (rows - 2) * kernels * LAYERS
        assert found.kernels["Attention"] == rows * LAYERS
        assert found.kernels["Concatenate"] == 2 * LAYERS
        # All but attention is there once, however many rows there are.
        assert found.kernels["QuantizedMatmul"] == 4 * LAYERS + 1
        # Rows do not wait for each other.
        assert found.epochs <= counts[2].epochs + LAYERS
