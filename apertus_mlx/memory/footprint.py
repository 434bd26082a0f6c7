"""What a run takes at its peak, part by part: weights, cache, prompt processing, logits.

The bytes of weights and cache are exact: they follow from config, headers and the rule by which a
cache grows. What MLX holds while it works on a chunk of the prompt is a formula. Its factors are
counted from the operations in flight; `tests/memory/test_memory_peak.py` checks them against MLX's
measured peak. With L tokens a chunk, D the hidden size, I the MLP's, S positions that attention
reads and e bytes a number:

    MLP          m * L * I * e       (xIELU's intermediate values; one fused kernel on a GPU)
    residual     r * L * D * e
    scores       a * heads * L * S * e     (none where attention is one fused kernel)
    quantization q * L * kv_heads * head_dim * 2 * e
    copies       layers * rows * kv_heads * head_dim * 2 * e

A GPU with memory of its own gets whole chunks of work ahead, and frees nothing before it has done
them: there MLP and residual are `2.1 * layers * L * (I + D) * e`, which is above the peaks that MLX
0.32.4 had on an H100 with 0.5B in bfloat16 and 8B in bfloat16 and 4 bits; growing codes lie there
twice.

A bounded or quantized cache copies the chunk's keys and values, and recent ones before them, in
full precision; the copies of all layers live until the chunk is done. A quantized cache computes
scores in blocks of at most 8 MiB. While the cache of a layer grows, its old and new arrays exist
both.

On the CPU path the footprint is an upper bound for the whole process: `cpu` adds libraries, the
tokenizer and loading.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from apertus_mlx.cache.attention import MAX_SCORES_BYTES
from apertus_mlx.cache.config import FULL_BITS, STEP, CacheConfig, group_size
from apertus_mlx.cache.store import capacity_for
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.memory import cpu
from apertus_mlx.model.kept_rows import kept_bytes

SCALE_BYTES = 2


@dataclass(frozen=True, slots=True)
class Backend:
    """How a run computes: bytes of a number, and the factors of the formula above."""

    compute_bytes: int
    mlp: float
    residual: float
    scores: float
    scores_in_blocks: float
    quantization: float
    fixed_bytes: int
    # Of the CPU path the precision of activations; None where MLX computes.
    cpu: str | None = None
    # Whether a GPU computes that has memory of its own.
    is_card: bool = False
    # Most tokens of a prompt at a time, unless more are asked for.
    longest_step: int = 512
    # Whether the rows of an untied embedding stay in the file.
    embedding_on_disk: bool = False


MLX_CPU = Backend(4, mlp=5.0, residual=8.0, scores=1.25, scores_in_blocks=2.6, quantization=3.0,
              fixed_bytes=1_500_000)  # fmt: skip
CPU_PATH = Backend(4, mlp=5.6, residual=8.8, scores=1.5, scores_in_blocks=5.0, quantization=3.0,
               fixed_bytes=5_000_000, cpu="auto")  # fmt: skip
# In place, attention works on so many scores at a time, and holds them three times.
CPU_SCORES, CPU_SCORES_COPIES = 2**21, 3.0
GPU_16_BIT = Backend(2, mlp=2.0, residual=6.0, scores=0.0, scores_in_blocks=2.5, quantization=12.0,
                     fixed_bytes=8_000_000)  # fmt: skip
GPU_32_BIT = Backend(4, mlp=2.0, residual=6.0, scores=0.0, scores_in_blocks=2.5, quantization=6.0,
                     fixed_bytes=8_000_000)  # fmt: skip
# In float32 attention is not one kernel there, and long steps were not measured.
CARD_16_BIT = replace(GPU_16_BIT, is_card=True, longest_step=2048)
CARD_32_BIT = replace(GPU_32_BIT, scores=2.5, is_card=True)
# Intermediate values of a layer that a card keeps until the chunk is done.
KEPT_ON_CARD = 2.1


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of each part, at the point of a run where it is largest."""

    weights_bytes: int
    kv_bytes: int
    prefill_bytes: int
    logits_bytes: int
    # What the process takes in any case, and what passes while weights are loaded.
    process_bytes: int = 0
    loading_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The peak: loading, the last chunk of a prompt and the first logits do not coincide."""
        running = self.kv_bytes + max(self.prefill_bytes, self.logits_bytes)
        return self.process_bytes + self.weights_bytes + max(self.loading_bytes, running)

    def report(self) -> dict[str, Any]:
        """All parts by name, and their peak."""
        return {**asdict(self), "total_bytes": self.total_bytes}


def choose_backend(
    inventory: Inventory,
    on_gpu: bool,
    dtype: str | None = None,
    cpu: str | None = None,
    is_card: bool = False,
    embedding_on_disk: bool = False,
) -> Backend:
    """How this checkpoint is computed: as the loader decides, unless `dtype` is asked for.

    `cpu`: precision of activations, if the CPU path computes, whatever MLX has; it has an untied
    embedding on disk in any case. `is_card`: whether
    the GPU has memory of its own.
    """
    if cpu is not None:
        return replace(CPU_PATH, cpu=cpu)
    if not on_gpu:
        return replace(MLX_CPU, embedding_on_disk=embedding_on_disk)
    wide = dtype == "float32" if dtype else not inventory.float_dtypes <= {"BF16"}
    if is_card:
        found = CARD_32_BIT if wide else CARD_16_BIT
    else:
        found = GPU_32_BIT if wide else GPU_16_BIT
    return replace(found, embedding_on_disk=embedding_on_disk)


def footprint(
    inventory: Inventory, form: CacheConfig, context: int, prefill_step: int, backend: Backend
) -> Footprint:
    """The peak of a run that ends with `context` positions, nearly all of them prompt."""
    config = inventory.config
    running = (
        kv_bytes(config, form, context, backend.compute_bytes),
        prefill_bytes(config, form, context, prefill_step, backend),
        logits_bytes(config, form, context, backend),
    )
    if backend.cpu is None:
        held = weights_bytes(inventory, backend.compute_bytes)
        if backend.embedding_on_disk:
            held -= disk_saving_bytes(inventory, backend)
        return Footprint(held, *running)
    held, loading = cpu.weights_bytes(inventory, backend.cpu)
    return Footprint(held, *running, cpu.fixed_bytes(inventory), loading)


def weights_bytes(inventory: Inventory, compute_bytes: int) -> int:
    """Bytes of all weights where MLX computes and floats take `compute_bytes` each."""
    return inventory.code_bytes + inventory.floats * compute_bytes


def disk_saving_bytes(inventory: Inventory, backend: Backend) -> int:
    """Bytes that `--embedding disk` spares, less those of rows that it keeps.

    None where the head is the embedding. None on the CPU path either, which leaves an untied
    embedding on disk in any case, and none on one of several machines, where it is not to be had.
    """
    tied, of_many = inventory.config.tie_word_embeddings, inventory.part is not None
    if tied or of_many or backend.cpu is not None:
        return 0
    embedding = inventory.matrices[layout.EMBEDDING]
    kept = kept_bytes(embedding.rows, embedding.columns, backend.compute_bytes)
    return max(embedding.weight_bytes(backend.compute_bytes) - kept, 0)


def kv_bytes(config: ModelConfig, form: CacheConfig, positions: int, number_bytes: int) -> int:
    """Bytes that the caches of all layers have allocated after `positions`."""
    return config.num_hidden_layers * _layer_kv_bytes(config, form, positions, number_bytes)


def kv_bytes_per_position(config: ModelConfig, form: CacheConfig, number_bytes: int) -> float:
    """Bytes that one more position takes: 2 * layers * kv_heads * head_dim * (bits + overhead)."""
    numbers = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * _pair_bits(config, form, number_bytes) / 8


def prefill_bytes(
    config: ModelConfig, form: CacheConfig, context: int, step: int, backend: Backend
) -> int:
    """Bytes in use while a chunk of the prompt goes through, weights and cache not counted."""
    length = min(step, context)
    numbers = backend.compute_bytes * length
    mlp = numbers * config.intermediate_size
    scores = numbers * config.num_attention_heads * _positions_seen(form, context, length)
    if form.quantized:
        row = scores // length
        attention = backend.scores_in_blocks * min(scores, max(MAX_SCORES_BYTES, row))
        heads = 2 * config.num_key_value_heads * config.head_dim
        attention += backend.quantization * numbers * heads
    elif backend.cpu is not None and form.bound is None:
        attention = CPU_SCORES_COPIES * min(scores, CPU_SCORES * backend.compute_bytes)
    else:
        attention = backend.scores * scores
    if backend.is_card:
        working = KEPT_ON_CARD * numbers * (config.intermediate_size + config.hidden_size)
        working = config.num_hidden_layers * working + attention
        if form.quantized:
            working += kv_bytes(config, form, context, backend.compute_bytes)
    elif backend.cpu is None:
        working = backend.mlp * mlp + max(1.1 * mlp, attention)
    else:
        # Neither onnxruntime nor MLX gives memory back to the other.
        working = backend.mlp * mlp + attention
    if not backend.is_card:
        working += backend.residual * numbers * config.hidden_size
    if backend.cpu is not None and context > 2 * length:
        # onnxruntime's arena falls to pieces as attention asks for another size with each chunk.
        working += working - attention
    copied = 2 * config.num_key_value_heads * config.head_dim * backend.compute_bytes
    rows = _rows_copied(form, context, length)
    if backend.cpu is not None and form.bound is not None:
        rows = max(rows, length)
    working += config.num_hidden_layers * copied * rows
    return int(working) + backend.fixed_bytes


def logits_bytes(config: ModelConfig, form: CacheConfig, context: int, backend: Backend) -> int:
    """Bytes in use while a token is decoded: logits and what the sampler makes, or a growing cache.

    The sampler works in float32 on logits, probabilities and their order.
    """
    sampling = 6 * 4 * config.output_vocab_size
    growing = _layer_kv_bytes(config, form, context, backend.compute_bytes)
    return sampling + growing + backend.fixed_bytes


def _layer_kv_bytes(
    config: ModelConfig, form: CacheConfig, positions: int, number_bytes: int
) -> int:
    row = config.num_key_value_heads * config.head_dim
    if not form.quantized:
        rows = capacity_for(positions)
        if form.bound is not None:
            rows = min(rows, form.bound)
        return 2 * row * rows * number_bytes
    recent = form.sinks + form.window + STEP
    coded = form.flushed(positions)
    rows = capacity_for(coded) if coded else 0
    if coded:
        recent += STEP
    if form.ring is not None:
        rows = min(rows, form.ring)
    bits = _pair_bits(config, form, number_bytes)
    return int(2 * row * recent * number_bytes + row * rows * bits / 8)


def _pair_bits(config: ModelConfig, form: CacheConfig, number_bytes: int) -> float:
    """Bits of a number of a key and of one of a value."""
    bits = 0.0
    for stored in (form.key_bits, form.value_bits):
        if stored == FULL_BITS:
            bits += 8 * number_bytes
        else:
            bits += stored + 2 * 8 * SCALE_BYTES / group_size(config.head_dim)
    return bits


def _rows_copied(form: CacheConfig, context: int, length: int) -> int:
    if form.quantized:
        return length + form.sinks + form.window + STEP
    wraps = form.bound is not None and context > form.bound
    return length + form.bound if wraps and form.bound is not None else 0


def _positions_seen(form: CacheConfig, context: int, length: int) -> int:
    """Positions that attention of the last chunk reads."""
    if form.ring is None or context <= (form.bound or 0):
        return context
    held = form.sinks + form.ring
    return held + (2 * length + form.window if form.quantized else length)
