"""Attention as ONNX graphs: for many new positions, and for one."""

from __future__ import annotations

from onnx import TensorProto, helper

from apertus_mlx.backend.cpu.stage import MICROSOFT, serialized
from apertus_mlx.checkpoint.config import ModelConfig


def many_positions(config: ModelConfig) -> bytes:
    """Causal attention that first writes the new keys and values into the buffers, in place."""
    kv_heads, width = config.num_key_value_heads, config.head_dim
    floats, ints = TensorProto.FLOAT, TensorProto.INT32
    describe = helper.make_tensor_value_info
    buffer: list[str | int | None] = [1, kv_heads, "capacity", width]
    query_shape: list[str | int | None] = [1, "length", config.num_attention_heads * width]
    row_shape: list[str | int | None] = [1, "length", kv_heads * width]
    inputs = [
        describe("queries", floats, query_shape),
        describe("keys", floats, row_shape),
        describe("values", floats, row_shape),
        describe("all_keys", floats, buffer),
        describe("all_values", floats, buffer),
        describe("last", ints, [1]),
        describe("total", ints, [1]),
    ]
    outputs = [
        describe("heads", floats, query_shape),
        describe("new_keys", floats, buffer),
        describe("new_values", floats, buffer),
    ]
    node = helper.make_node(
        "GroupQueryAttention",
        [value.name for value in inputs],
        [value.name for value in outputs],
        domain=MICROSOFT,
        num_heads=config.num_attention_heads,
        kv_num_heads=kv_heads,
    )
    return serialized([node], inputs, outputs)


def single_position(config: ModelConfig) -> bytes:
    """Attention of one position to buffers that hold its key and value already."""
    kv_heads, width = config.num_key_value_heads, config.head_dim
    group = config.num_attention_heads // kv_heads
    describe, floats = helper.make_tensor_value_info, TensorProto.FLOAT
    inputs = [
        describe("queries", floats, [kv_heads, group, width]),
        describe("all_keys", floats, [kv_heads, "capacity", width]),
        describe("all_values", floats, [kv_heads, "capacity", width]),
        describe("hidden", floats, [1, 1, "capacity"]),
    ]
    nodes = [
        helper.make_node(
            "FusedMatMul", ["queries", "all_keys"], ["scores"],
            domain=MICROSOFT, transB=1, alpha=width**-0.5,
        ),
        helper.make_node("Add", ["scores", "hidden"], ["visible"]),
        helper.make_node("Softmax", ["visible"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "all_values"], ["heads"]),
    ]  # fmt: skip
    return serialized(nodes, inputs, [describe("heads", floats, [kv_heads, group, width])])
