"""Makes random GGUF files of Apertus' real sizes, to time llama.cpp on. Needs the gguf package.

    python -m benchmarks.make_gguf 0.5B OUT.gguf [Q4_0]

Shapes are those of `make_checkpoint`; the output matrix is stored even where it is tied, because
llama.cpp asks for it. The vocabulary is made up: nothing but timing makes sense with these files.
"""

from __future__ import annotations

import sys

import gguf
import numpy as np

from benchmarks.make_checkpoint import GEOMETRIES, VOCAB_SIZE, tensor_shapes

NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
    "attention_layernorm": "attn_norm",
    "feedforward_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "_proj": "",
}
# xIELU's parameters after softplus.
XIELU = {"alpha_p": 0.8, "alpha_n": 0.8, "beta": 0.5, "eps": -1e-6}


def write(size: str, path: str, kind: gguf.GGMLQuantizationType) -> None:
    """Write a random model of `size` with matrices quantized as `kind`."""
    hidden, layers, heads, kv_heads, inner, _, context, theta, _ = GEOMETRIES[size]
    writer = gguf.GGUFWriter(path, "apertus")
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(VOCAB_SIZE)
    for name, value in XIELU.items():
        writer.add_array(f"xielu.{name}", [value] * layers)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([f"<{index}>" for index in range(VOCAB_SIZE)])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB_SIZE)
    writer.add_token_merges(["< 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, shape in tensor_shapes(size) if "act_fn" not in name}
    shapes.setdefault("lm_head.weight", (VOCAB_SIZE, hidden))
    for original, shape in shapes.items():
        name = original
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if len(shape) < 2:
            writer.add_tensor(name, np.ones(shape, np.float32))
            continue
        values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    kind = sys.argv[3] if len(sys.argv) > 3 else "Q4_0"
    write(sys.argv[1], sys.argv[2], gguf.GGMLQuantizationType[kind])
