"""How a cache is to be kept: precision of keys and values, bound, sinks, window, rotation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apertus_mlx.errors import UsageError

FULL_BITS = 16
BITS = (2, 3, 4, 6, 8, FULL_BITS)
GROUP_SIZES = (128, 64, 32)
# Positions that move from full precision to codes at a time.
STEP = 32
DEFAULT_SINKS = 4
DEFAULT_WINDOW = 64


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The form of a key-value cache; the default keeps everything in full precision.

    Attributes:
        key_bits, value_bits: bits per stored number; 16 stands for the model's own precision.
        bound: most positions that are kept, sinks included; None keeps all.
        sinks: first positions that stay, in full precision, whatever happens to the others.
        window: latest positions that stay in full precision; at least so many.
        rotate: keys are quantized after a Hadamard transform of each head. None: where it helps.

    Raises:
        UsageError: a value outside its range, or a bound that leaves no room.
    """

    key_bits: int = FULL_BITS
    value_bits: int = FULL_BITS
    bound: int | None = None
    sinks: int = DEFAULT_SINKS
    window: int = DEFAULT_WINDOW
    rotate: bool | None = None

    def __post_init__(self) -> None:
        for option, bits in (("--kv-bits", self.key_bits), ("--kv-bits-v", self.value_bits)):
            if bits not in BITS:
                raise UsageError(f"{option} {bits}: expected 2, 3, 4, 6, 8 or 16 (full precision)")
        if self.sinks < 0:
            raise UsageError(f"--kv-sink {self.sinks}: expected 0 or more")
        if self.window < 0:
            raise UsageError(f"window of {self.window} positions: expected 0 or more")
        if self.bound is not None and self.bound < self.least_bound:
            kept = f"{self.sinks} sinks"
            if self.quantized:
                kept += f", a window of {self.window} in full precision"
            raise UsageError(
                f"--max-kv {self.bound}: expected {self.least_bound} or more, to hold {kept} "
                "and at least one block of positions"
            )

    @property
    def quantized(self) -> bool:
        """Whether keys or values are."""
        return min(self.key_bits, self.value_bits) < FULL_BITS

    @property
    def least_bound(self) -> int:
        """The smallest possible `bound`."""
        return self.sinks + (self.recent_rows + STEP if self.quantized else 1)

    @property
    def recent_rows(self) -> int:
        """Most positions, sinks not counted, that a quantized cache holds in full precision.

        The window, a block that is filling up, and the last block that left: it stays for rewinds.
        """
        return self.window + 2 * STEP

    @property
    def ring(self) -> int | None:
        """Positions of the ring that follows the sinks (when quantized: of codes); None: no end."""
        if self.bound is None:
            return None
        if not self.quantized:
            return self.bound - self.sinks
        return (self.bound - self.sinks - self.recent_rows) // STEP * STEP

    def flushed(self, positions: int) -> int:
        """How many of the first `positions`, counted after the sinks, are quantized by then."""
        if not self.quantized:
            return 0
        return max(0, (positions - self.sinks - self.window) // STEP * STEP)

    def rotates(self, head_dim: int) -> bool:
        """Whether keys of this width are rotated.

        Raises:
            UsageError: rotation was asked for, but the width is not a power of two.
        """
        possible = head_dim & (head_dim - 1) == 0
        if self.rotate and not possible:
            raise UsageError(f"--kv-rotate: head_dim {head_dim} is not a power of two")
        if self.key_bits == FULL_BITS:
            return bool(self.rotate)
        return possible if self.rotate is None else self.rotate

    def require_fit(self, head_dim: int) -> None:
        """Refuse what cannot be done with heads of this width.

        Raises:
            UsageError: head_dim does not divide into groups, or cannot be rotated.
        """
        if self.quantized:
            group_size(head_dim)
        self.rotates(head_dim)

    def __str__(self) -> str:
        if not self.quantized:
            form = "full precision"
        elif self.key_bits == self.value_bits:
            form = f"{self.key_bits} bits"
        else:
            form = f"keys {self.key_bits} bits, values {self.value_bits} bits"
        return form if self.bound is None else f"{form}, at most {self.bound} positions"


def group_size(head_dim: int) -> int:
    """Numbers that share a scale: the widest group MLX has that divides a head.

    Raises:
        UsageError: none does.
    """
    for size in GROUP_SIZES:
        if head_dim % size == 0:
            return size
    raise UsageError(
        f"--kv-bits: head_dim {head_dim} does not divide into groups of 32, 64 or 128; "
        "use --kv-bits 16"
    )


def read_cache_form(
    kv_bits: int | None,
    kv_bits_v: int | None,
    max_kv: int | None,
    kv_sink: int | None,
    kv_rotate: bool | None,
) -> CacheConfig | None:
    """The form of cache that the options describe; None if none of them was given.

    Raises:
        UsageError: a value outside its range, or one that would do nothing.
    """
    given = {
        "key_bits": kv_bits,
        "value_bits": kv_bits if kv_bits_v is None else kv_bits_v,
        "bound": max_kv,
        "sinks": kv_sink,
        "rotate": kv_rotate,
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    form = CacheConfig(**chosen) if chosen else None
    if form is None:
        return None
    if kv_rotate and form.key_bits == FULL_BITS:
        raise UsageError("--kv-rotate: keys are rotated to be quantized; give --kv-bits, too")
    if kv_sink is not None and form.bound is None and not form.quantized:
        raise UsageError(
            "--kv-sink: without a bound or bits all positions stay as they are; give --max-kv "
            "or --kv-bits, too"
        )
    return form
