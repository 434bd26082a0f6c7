"""Estimates of decode speed per chip and model: what bandwidth allows, and what kernels add.

    python -m benchmarks.decode_estimates

Prints the tables of docs/decode-speed.md. Counts are counted, from the graph of each model; bytes
are exact; times are a model of two terms, and wrong by a quarter or so until a Mac has measured:

    seconds per token = bytes read / (0.85 x bandwidth) + dispatches x cost of one

The 0.85 is what MLX's matrix-vector product reaches on large matrices (0.90 to 0.96 measured by
others on an M5 Pro), less the time in which small ones leave the memory idle. The cost of a small
kernel that waits for another, in microseconds, is what is left of published speeds of a 0.5B model
at 4 bits (ml-explore/mlx#1864, lablup/mlxcel#341 and #1713), and 2.4 where chains of such kernels
were timed (ml-explore/mlx#4521, M3 Ultra).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig, parse_config
from apertus_mlx.memory.devices import parse_device
from apertus_mlx.quant.spec import QuantSpec
from tests.builders import config_4x
from tests.decode_step import build, mlx_lm_dispatches, our_dispatches
from tests.dispatch_count import Dispatches

GROUP_SIZE = 64
EFFICIENCY = 0.85
# Bandwidth in bytes per second, and microseconds of a dependent kernel.
DEVICES = {
    "M1": (parse_device("m1-8gb").bandwidth or 0, 5.0),
    "M2": (parse_device("m2-8gb").bandwidth or 0, 3.5),
    "M4": (parse_device("m4-16gb").bandwidth or 0, 3.0),
    "M4 Pro": (parse_device("m4-pro-24gb").bandwidth or 0, 3.0),
    "M4 Max": (parse_device("m4-max-64gb").bandwidth or 0, 2.6),
}
# layers, hidden, MLP, heads, key heads, tied
SHAPES = {
    "0.5B": (20, 1024, 6144, 16, 4, True),
    "1.5B": (16, 2048, 12288, 32, 8, False),
    "4B": (24, 3072, 16384, 24, 8, False),
    "8B": (32, 4096, 21504, 32, 8, False),
}
# mlx-lm; no kernels; add and norm, QK-norm and rotation; then products with what surrounds them,
# and all that comes before attention as one of these.
FORMS = ("mlx-lm", "graph", "around products", "products", "all")
AROUND_PRODUCTS = ("qk_norm_rope", "add_rms_norm")


@dataclass(frozen=True, slots=True)
class Shape:
    """A released model, whole for bytes, and with small matrices for counting."""

    config: ModelConfig
    small: dict[str, Any]

    def bytes_per_token(self, bits: int) -> int:
        """Weights read for one token: every matrix, the embedding only where it is the head."""
        spec = QuantSpec(bits, GROUP_SIZE)
        return sum(
            spec.weight_bytes(matrix.rows, matrix.columns, 2)
            for matrix in layout.matrices(self.config)
            if self.config.tie_word_embeddings or matrix.path != layout.EMBEDDING
        )


def shape(name: str) -> Shape:
    layers, hidden, inner, heads, kv_heads, tied = SHAPES[name]
    values = config_4x(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, vocab_size=131_072,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
    )  # fmt: skip
    small = config_4x(
        num_hidden_layers=layers, hidden_size=128, intermediate_size=256, tie_word_embeddings=tied
    )
    return Shape(parse_config(values), small)


def count(small: dict[str, Any], form: str) -> Dispatches:
    """Of one greedy step."""
    if form == "mlx-lm":
        return mlx_lm_dispatches(small)
    accepted = {
        "graph": None,
        "around products": lambda place: place.startswith(AROUND_PRODUCTS),
        "products": lambda place: not place.startswith("attention_input"),
        "all": lambda place: True,
    }[form]
    # As on a GPU, where the activation is one kernel.
    return our_dispatches(build(small, accepted, compiled_activation=True))


def main() -> None:
    shapes = {name: shape(name) for name in SHAPES}
    counts = {
        name: {form: count(found.small, form) for form in FORMS} for name, found in shapes.items()
    }
    print("| model | form | dispatches | that wait | command buffers |\n|---|---|---|---|---|")
    for name, by_form in counts.items():
        for form, found in by_form.items():
            row = (name, form, found.total, found.epochs, found.command_buffers)
            print("|", " | ".join(map(str, row)), "|")
    print("\n| model | 2 bits | 3 bits | 4 bits | 6 bits |\n|---|---|---|---|---|")
    for name, found in shapes.items():
        sizes = [f"{found.bytes_per_token(bits) / 1e6:,.0f} MB" for bits in (2, 3, 4, 6)]
        print("|", " | ".join([name, *sizes]), "|")
    print("\n| device | model | bits | roofline |", " | ".join(FORMS), "| all / mlx-lm |")
    print("|---|---|---|---|" + "---|" * (len(FORMS) + 1))
    for device, (bandwidth, cost_us) in DEVICES.items():
        for name, found in shapes.items():
            for bits in (2, 4):
                floor = found.bytes_per_token(bits) / bandwidth
                times = [
                    floor / EFFICIENCY + counts[name][form].total * cost_us * 1e-6 for form in FORMS
                ]
                speeds = " | ".join(f"{1 / time:.0f}" for time in times)
                gain = f"{times[0] / times[-1]:.2f}"
                print(f"| {device} | {name} | {bits} | {1 / floor:.0f} | {speeds} | {gain} |")


if __name__ == "__main__":
    main()
