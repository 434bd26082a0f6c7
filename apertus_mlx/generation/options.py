"""What a caller chooses: how tokens are drawn, and how a model is found, kept and computed.

The names are those of the long options, with underscores. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypedDict

from apertus_mlx.checkpoint.generation_config import RANGES
from apertus_mlx.errors import UsageError
from apertus_mlx.system.arguments import expect, expect_list, expect_one_of, expect_range

if TYPE_CHECKING:
    from apertus_mlx.cache.config import CacheConfig

DEFAULT_MAX_TOKENS = 1024
MAX_SEED = 2**63
# Memory for a conversation is planned for so many tokens, or the model's context if shorter.
CHAT_CONTEXT = 8192


def require_ranges(values: object) -> None:
    """Check the attributes of `values` that parameters of sampling are called; None passes.

    Raises:
        UsageError: one outside its range.
    """
    for name, allowed in RANGES.items():
        value = getattr(values, name)
        if value is not None:
            _require(allowed.holds(value), name.replace("_", "-"), value, allowed.words)
    top_k, seed = getattr(values, "top_k"), getattr(values, "seed")  # noqa: B009
    _require(top_k is None or top_k >= 0, "top-k", top_k, "0 (off) or more")
    _require(seed is None or 0 <= seed < MAX_SEED, "seed", seed, "from 0 to 2^63 - 1")


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise UsageError(f"--{name} {value}: expected {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How to draw an answer; None leaves a value to the model's makers, then to our defaults.

    Attributes:
        max_tokens: the most tokens of an answer.
        temperature: 0 takes the likeliest token.
        top_p: keep the likeliest tokens up to this mass.
        top_k: keep this many tokens; 0 keeps all.
        min_p: drop tokens below this share of the likeliest.
        repetition_penalty: above 1 discourages repetition.
        seed: same seed, same text.
        stop: text before which the answer ends, or several.

    Raises:
        TypeError: a value of a wrong type.
        UsageError: a value outside its range.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        expect(int, max_tokens=self.max_tokens)
        expect(int | None, top_k=self.top_k, seed=self.seed)
        expect(
            float | int | None,
            temperature=self.temperature,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        expect_list(str, stop=self.stop)
        require_ranges(self)
        expect_range(1, 2**31 - 1, max_tokens=self.max_tokens)
        if not all(self.stop_strings):
            raise UsageError("--stop: an empty string would stop at once")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """All texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


DEFAULT_SAMPLING = SamplingOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """How keys and values are kept, and the prompt is read; None leaves it to the planner.

    Attributes:
        kv_bits: bits of cached keys and values: 2, 3, 4, 6, 8 or 16.
        kv_bits_v: bits of cached values, if they differ from the keys'.
        max_kv: the most positions kept: the first few and the latest.
        kv_sink: how many first positions always stay.
        kv_rotate: whether keys are rotated before they are quantized.
        prefill_step: prompt tokens computed at a time.

    Raises:
        TypeError: a value of a wrong type.
        UsageError: a value outside its range.
    """

    kv_bits: int | None = None
    kv_bits_v: int | None = None
    max_kv: int | None = None
    kv_sink: int | None = None
    kv_rotate: bool | None = None
    prefill_step: int | None = None

    def __post_init__(self) -> None:
        expect(
            int | None,
            kv_bits=self.kv_bits,
            kv_bits_v=self.kv_bits_v,
            max_kv=self.max_kv,
            kv_sink=self.kv_sink,
            prefill_step=self.prefill_step,
        )
        expect(bool | None, kv_rotate=self.kv_rotate)
        expect_range(1, 2**20, prefill_step=self.prefill_step)
        _ = self.form

    @property
    def form(self) -> CacheConfig | None:
        """The form of cache that was asked for; None if nothing was."""
        from apertus_mlx.cache.config import read_cache_form

        return read_cache_form(
            self.kv_bits, self.kv_bits_v, self.max_kv, self.kv_sink, self.kv_rotate
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(CacheOptions):
    """How a model is found and computed; see also `CacheOptions`.

    Attributes:
        dtype: type to compute in; None: what suits.
        compute: `mlx`, or `cpu` where MLX has no GPU; `auto` chooses.
        precision: what activations are rounded to in products on the CPU.
        memory_limit: stay below this many bytes, or a size as `1.2GB`; None: what the machine has.
        force: try even where the memory will not suffice.
        revision: branch, tag or commit of a Hub id.
        offline: use only what is on this machine.
    """

    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    compute: Literal["auto", "mlx", "cpu"] = "auto"
    precision: Literal["auto", "float32", "int8"] = "auto"
    memory_limit: str | int | None = None
    force: bool = False
    revision: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        # A dataclass with slots is another class than the one that `super()` remembers.
        CacheOptions.__post_init__(self)
        expect(str | None, dtype=self.dtype, revision=self.revision)
        expect(str, compute=self.compute, precision=self.precision)
        expect(str | int | None, memory_limit=self.memory_limit)
        expect(bool, force=self.force, offline=self.offline)
        expect_one_of(("bfloat16", "float16", "float32"), dtype=self.dtype)
        expect_one_of(("auto", "mlx", "cpu"), compute=self.compute)
        expect_one_of(("auto", "float32", "int8"), precision=self.precision)
        _ = self.limit_bytes

    @property
    def limit_bytes(self) -> int | None:
        """`memory_limit` in bytes."""
        from apertus_mlx.memory import parse_size

        if self.memory_limit is None:
            return None
        return parse_size(str(self.memory_limit), "--memory-limit")


class SamplingKeywords(TypedDict, total=False):
    """The fields of `SamplingOptions` as keyword arguments, for type checkers."""

    max_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None


class RunKeywords(TypedDict, total=False):
    """The fields of `RunOptions` as keyword arguments, for type checkers."""

    kv_bits: int | None
    kv_bits_v: int | None
    max_kv: int | None
    kv_sink: int | None
    kv_rotate: bool | None
    prefill_step: int | None
    dtype: Literal["bfloat16", "float16", "float32"] | None
    compute: Literal["auto", "mlx", "cpu"]
    precision: Literal["auto", "float32", "int8"]
    memory_limit: str | int | None
    force: bool
    revision: str | None
    offline: bool
