"""Makes real-size Apertus checkpoints with random weights, for benchmarks. Needs numpy only.

    python -m benchmarks.make_checkpoint 0.5B OUT_DIR [--max-shard-bytes N]

Weights are normal with a deviation of 0.02 in bfloat16, norms are ones, xIELU's raw alphas are 0.2
and -1.05. Every matrix is cut from one pool of 16 M random values at its own offset, so that 16 GB
take as long as the disk does. The config is in the flat style of transformers 4. The tokenizer is
the released one (v1) where `mistral-common` is installed; else byte-level BPE with as many entries
and the control tokens of Apertus at their ids.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.real_tokenizers import tekken_path, write_real_tokenizers

POOL_VALUES = 2**24
VOCAB_SIZE = 131_072
LLAMA3 = {
    "rope_type": "llama3",
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# hidden, layers, heads, kv heads, MLP, tied, context, rope theta, rope scaling
GEOMETRIES = {
    # A few layers behind the released vocabulary.
    "tiny": (64, 4, 4, 2, 256, True, 4096, 500_000.0, None),
    "0.5B": (1024, 20, 16, 4, 6144, True, 4096, 500_000.0, None),
    "1.5B": (2048, 16, 32, 8, 12288, False, 4096, 500_000.0, None),
    "4B": (3072, 24, 24, 8, 16384, False, 4096, 500_000.0, None),
    "8B": (4096, 32, 32, 8, 21504, False, 65536, 12_000_000.0, LLAMA3),
}
ROLES = {
    0: "<unk>", 1: "<s>", 2: "</s>", 3: "<pad>",
    61: "<|system_start|>", 62: "<|system_end|>",
    63: "<|developer_start|>", 64: "<|developer_end|>",
    65: "<|user_start|>", 66: "<|user_end|>",
    67: "<|assistant_start|>", 68: "<|assistant_end|>",
    69: "<|inner_prefix|>", 70: "<|inner_suffix|>",
    71: "<|tools_prefix|>", 72: "<|tools_suffix|>",
}  # fmt: skip
SPECIAL_TOKENS = 1000
CONSTANTS = {"alpha_p": 0.2, "alpha_n": -1.05, "beta": 0.5, "eps": -1e-6}
CHAT_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}<|user_start|>{{ message['content'] }}<|user_end|>"
    "{%- elif message['role'] == 'system' -%}"
    "<|system_start|>{{ message['content'] }}<|system_end|>"
    "{%- else -%}<|assistant_start|>{{ message['content'] }}<|assistant_end|>{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|assistant_start|>{%- endif -%}"
)


def config(size: str) -> dict[str, object]:
    """The `config.json` of a released size, in the flat style of transformers 4."""
    hidden, layers, heads, kv_heads, inner, tied, context, theta, scaling = GEOMETRIES[size]
    return {
        "architectures": ["ApertusForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 68,
        "hidden_act": "xielu",
        "hidden_dropout": 0.0,
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "model_type": "apertus",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 3,
        "post_norm": False,
        "qk_norm": True,
        "rms_norm_eps": 1e-05,
        "rope_scaling": scaling,
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.56.0",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }


def tensor_shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a checkpoint as transformers writes it, with its shape."""
    hidden, layers, heads, kv_heads, inner, tied, *_ = GEOMETRIES[size]
    head_dim = hidden // heads
    yield "model.embed_tokens.weight", (VOCAB_SIZE, hidden)
    for index in range(layers):
        prefix = f"model.layers.{index}"
        yield f"{prefix}.attention_layernorm.weight", (hidden,)
        yield f"{prefix}.feedforward_layernorm.weight", (hidden,)
        for name, rows in (("q", hidden), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.q_norm.weight", (head_dim,)
        yield f"{prefix}.self_attn.k_norm.weight", (head_dim,)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
        for name, shape in (("alpha_p", (1,)), ("alpha_n", (1,)), ("beta", ()), ("eps", ())):
            yield f"{prefix}.mlp.act_fn.{name}", shape
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (VOCAB_SIZE, hidden)


class RandomWeights:
    """The bytes of each tensor, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._pool = to_bf16(rng.standard_normal(POOL_VALUES, dtype=np.float32) * np.float32(0.02))
        self._rng = rng

    def chunks(self, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """The tensor's values as bfloat16 bit patterns, piece by piece."""
        last = name.rpartition(".")[2]
        if last in CONSTANTS:
            yield to_bf16(np.full(math.prod(shape), CONSTANTS[last], np.float32))
        elif len(shape) < 2:
            yield to_bf16(np.ones(shape, np.float32))
        else:
            left = math.prod(shape)
            start = int(self._rng.integers(POOL_VALUES))
            while left:
                piece = self._pool[start : start + left]
                yield piece
                left -= piece.size
                start = 0


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bit patterns of float32 `values` rounded to bfloat16, ties to even."""
    bits = values.astype(np.float32).reshape(-1).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_checkpoint(size: str, directory: Path, max_shard_bytes: int, seed: int = 0) -> None:
    """Write config, weights, index and tokenizer of a random checkpoint into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(size), indent=2) + "\n")
    write_tokenizer(directory)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used = total = 0
    for name, shape in tensor_shapes(size):
        nbytes = 2 * math.prod(shape)
        if used and used + nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((name, shape))
        used += nbytes
        total += nbytes
    weights = RandomWeights(seed)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        _write_shard(directory / file, tensors, weights)
        weight_map.update({name: file for name, _ in tensors})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], weights: RandomWeights
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, shape in tensors:
            for piece in weights.chunks(name, shape):
                file.write(piece.tobytes())


def write_tokenizer(directory: Path) -> None:
    """Write the tokenizer, the chat template and what belongs to them."""
    if tekken_path() is not None:
        write_real_tokenizers({"v1": directory})
    else:
        _write_synthetic_tokenizer(directory)
    tokenizer_config = {
        "add_bos_token": True,
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|assistant_end|>",
        "model_max_length": 4096,
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    generation = {"bos_token_id": 1, "eos_token_id": [2, 68, 72], "pad_token_id": 3}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))


def _write_synthetic_tokenizer(directory: Path) -> None:
    special = [ROLES.get(index, f"<SPECIAL_{index}>") for index in range(SPECIAL_TOKENS)]
    letters = _byte_letters()
    vocab = {token: index for index, token in enumerate(special + letters)}
    merges: list[list[str]] = []
    # Lower-case text first, so that the 131,072 entries hold the frequent triples.
    frequent = sorted(letters, key=lambda c: (not ("a" <= c <= "z"), c != "Ġ", not c.isalnum(), c))
    pairs = [(a, b) for a in frequent for b in frequent]
    triples = ((a + b, c) for a, b in pairs for c in frequent)
    for left, right in [*pairs, *_take(triples, VOCAB_SIZE)]:
        if len(vocab) == VOCAB_SIZE:
            break
        vocab[left + right] = len(vocab)
        merges.append([left, right])
    added = [
        {
            "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
        for index, token in enumerate(special)
    ]  # fmt: skip
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
    }  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": merges,
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))


def _byte_letters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte, in byte order."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, extra = {}, 0
    for byte in range(256):
        if byte in visible:
            letters[byte] = chr(byte)
        else:
            letters[byte] = chr(256 + extra)
            extra += 1
    return [letters[byte] for byte in range(256)]


def _take(items: Iterator[tuple[str, str]], count: int) -> Iterator[tuple[str, str]]:
    for _, item in zip(range(count), items, strict=False):
        yield item


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size", choices=GEOMETRIES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--max-shard-bytes", type=int, default=5 * 10**9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_checkpoint(arguments.size, arguments.directory, arguments.max_shard_bytes, arguments.seed)


if __name__ == "__main__":
    main()
