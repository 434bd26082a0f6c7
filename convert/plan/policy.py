"""What is asked of a conversion, and which format that gives each weight matrix.

A rule names modules by path or pattern (`*` matches anything); two rules that give one module
different formats are a mistake, and so is a rule that matches nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Literal, get_args

from apertus_mlx.checkpoint import layout
from apertus_mlx.errors import UsageError
from apertus_mlx.quant.affine import ScaleType
from apertus_mlx.quant.spec import FLOAT_MODES, QuantSpec

# Rows of a cut embedding: such counts fill the tiles of a kernel.
MULTIPLE = 64

DEFAULT_GROUP_SIZE = 64
# rtn rounds to nearest as MLX does, search finds the best scales for the weights, gptq calibrates
# on text.
Method = Literal["rtn", "search", "gptq"]
# gptq with `tune`, and search instead where text that is held out says so.
BEST = "best"
METHODS: tuple[str, ...] = (*get_args(Method), BEST)


@dataclass(frozen=True, slots=True)
class Rule:
    """A format for the modules that `pattern` matches; None leaves them unquantized."""

    pattern: str
    spec: QuantSpec | None
    origin: str


@dataclass(frozen=True, slots=True)
class Target:
    """The size that all weights together may have: either bits per weight or bytes."""

    bits_per_weight: float | None = None
    size_bytes: int | None = None
    # Group size of the formats to choose from; None allows all.
    group_size: int | None = None

    def total_bytes(self, parameters: int) -> int:
        """Bytes of all tensors of a model."""
        if self.size_bytes is not None:
            return self.size_bytes
        return int(Fraction(self.bits_per_weight or 0) * parameters / 8)

    @property
    def name(self) -> str:
        """As part of an output's name."""
        if self.size_bytes is not None:
            return f"{self.size_bytes / 1e6:.9g}MB"
        return f"{self.bits_per_weight:g}bpw"

    def __str__(self) -> str:
        if self.size_bytes is not None:
            return f"--target-size {self.name}"
        return f"--target-bpw {self.bits_per_weight:g}"


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asks of a conversion.

    `default` is the format of all matrices without a rule; None keeps them as they are.
    """

    default: QuantSpec | None = None
    rules: tuple[Rule, ...] = ()
    # The size of all weights, where formats of matrices without a rule are chosen to meet it.
    target: Target | None = None
    # How the codes of affine formats are found.
    method: Method = "rtn"
    # Whether scales move from norms into matrices, or weights are rotated, before that.
    smooth: bool = False
    rotate: bool = False
    # Whether scales, biases and norms of calibrated codes are trained together afterwards.
    tune: bool = False
    # Whether codes that no text has shaped are compared with calibrated ones, however much text
    # there is.
    compare: bool = False
    dequantize: bool = False
    requantize: bool = False
    # safetensors type of everything that is not codes; None lets the source decide.
    dtype: ScaleType | None = None
    allow_untied_head: bool = False
    allow_nonfinite: bool = False
    # Tokens that are kept: the first so many, or those that files and folders of texts use.
    vocab: int | None = None
    vocab_for: tuple[str, ...] = ()

    @property
    def cuts_vocabulary(self) -> bool:
        """Whether only some tokens are kept."""
        return self.vocab is not None or bool(self.vocab_for)

    @property
    def quantizes(self) -> bool:
        """Whether any new quantization is asked for."""
        asked = self.default is not None or self.target is not None
        return asked or any(rule.spec is not None for rule in self.rules)


def resolve(request: Request, paths: Iterable[str]) -> dict[str, QuantSpec | None]:
    """The format that `request` gives each module; None where it asks for no new quantization.

    Raises:
        UsageError: a rule matches no module, or two rules disagree about one.
    """
    paths = list(paths)
    specs: dict[str, QuantSpec | None] = dict.fromkeys(paths, request.default)
    decided: dict[str, Rule] = {}
    for rule in request.rules:
        matched = [path for path in paths if fnmatchcase(path, rule.pattern)]
        if not matched:
            if rule.pattern == layout.HEAD:
                raise UsageError(
                    f"{rule.origin}: the model has no {layout.HEAD}: its head is the embedding; "
                    "use --embed-bits"
                )
            raise UsageError(f"{rule.origin}: {rule.pattern!r} matches no module of the model")
        for path in matched:
            other = decided.setdefault(path, rule)
            if other.spec != rule.spec:
                raise UsageError(
                    f"{rule.origin}: {rule.pattern!r} and {other.pattern!r} ({other.origin}) give "
                    f"{path} different formats; make one pattern narrower"
                )
            specs[path] = rule.spec
    return specs


def make_spec(bits: int | None, group_size: int | None, mode: str | None, origin: str) -> QuantSpec:
    """A format from options that may be missing.

    Raises:
        UsageError: MLX has no such format; the message lists what it has.
    """
    if mode is not None and mode != "affine":
        if mode not in FLOAT_MODES:
            raise UsageError(
                f"{origin}: mode {mode[:40]!r}: expected affine, {', '.join(FLOAT_MODES)}"
            )
        own_bits, own_group = FLOAT_MODES[mode]
        bits = own_bits if bits is None else bits
        group_size = own_group if group_size is None else group_size
    try:
        return QuantSpec(
            bits if bits is not None else 4,
            group_size if group_size is not None else DEFAULT_GROUP_SIZE,
            mode or "affine",  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise UsageError(f"{origin}: {error}") from None
