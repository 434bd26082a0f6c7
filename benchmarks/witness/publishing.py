"""The trained model as a folder that everything here reads: no file above 16 MB."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

MOST_FILE_BYTES = 16_000_000
# A header has a line for each tensor.
_HEADER_BYTES = 64_000


def publish(
    target: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    tokenizer: Path,
    receipt: Mapping[str, Any],
) -> None:
    """Write bfloat16 weights in as few files as may be, config, tokenizer and a receipt."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    stored = {name: array.astype(mx.bfloat16) for name, array in sorted(weights.items())}
    shards = _shards(stored)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    index = {}
    for file, shard in zip(names, shards, strict=True):
        mx.save_safetensors(str(partial / file), shard, {"format": "mlx"})
        index |= dict.fromkeys(shard, file)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    total = sum(array.nbytes for array in stored.values())
    for name, value in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
                                   "tokenizer_class": "PreTrainedTokenizerFast"}),
        ("model.safetensors.index.json",
         {"metadata": {"total_size": total}, "weight_map": index}),
        ("witness.json", receipt),
    ):  # fmt: skip
        text = json.dumps(value, indent=2, ensure_ascii=False)
        (partial / name).write_text(text + "\n", "utf-8")
    shutil.copyfile(tokenizer, partial / "tokenizer.json")
    partial.rename(target)


def _shards(arrays: Mapping[str, mx.array]) -> list[dict[str, mx.array]]:
    found: list[dict[str, mx.array]] = []
    room = 0
    for name, array in arrays.items():
        if array.nbytes > MOST_FILE_BYTES - _HEADER_BYTES:
            raise ValueError(f"{name}: {array.nbytes:,} bytes do not fit in a file")
        if array.nbytes > room:
            found.append({})
            room = MOST_FILE_BYTES - _HEADER_BYTES
        found[-1][name] = array
        room -= array.nbytes
    return found
