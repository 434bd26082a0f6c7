"""What a caller chooses: how tokens are drawn, and how a model is found, kept and computed.

The names are those of the long options, with underscores. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from apertus_mlx.checkpoint.generation_config import RANGES
from apertus_mlx.errors import UsageError
from apertus_mlx.system.arguments import Option, Range, as_list, check_fields, expect

if TYPE_CHECKING:
    from apertus_mlx.cache.config import CacheConfig

# Memory for a conversation is planned for so many tokens, or the model's context if shorter.
CHAT_CONTEXT = 8192
# OpenAI's bounds.
MOST_BIAS = 100

DType = Literal["bfloat16", "float16", "float32"]
Revision = Annotated[str | None, Option("Branch, tag or commit of a Hub id.")]
Offline = Annotated[bool, Option("Use only what is already on this machine.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How to draw an answer; None leaves a value to the model's makers, then to our defaults.

    Raises:
        TypeError: a value of a wrong type.
        UsageError: a value outside its range.
    """

    max_tokens: Annotated[
        int, Option("Most tokens to generate.", Range(1, 2**31 - 1), flags="-n")
    ] = 1024
    temperature: Annotated[
        float | None,
        Option(
            "0 takes the likeliest token; default: the model's.",
            RANGES["temperature"],
            flags="--temp -t",
        ),
    ] = None
    top_p: Annotated[
        float | None, Option("Draw from the likeliest with this share in all.", RANGES["top_p"])
    ] = None
    top_k: Annotated[
        int | None, Option("Draw from so many likeliest; 0 from all.", Range(0, 2**63 - 1))
    ] = None
    min_p: Annotated[
        float | None, Option("Drop tokens below this share of the likeliest.", RANGES["min_p"])
    ] = None
    repetition_penalty: Annotated[
        float | None, Option("Above 1 discourages repetition.", RANGES["repetition_penalty"])
    ] = None
    presence_penalty: Annotated[
        float | None, Option("Above 0 discourages words the answer has; -2 to 2.", Range(-2, 2))
    ] = None
    frequency_penalty: Annotated[
        float | None, Option("As presence, for each time they came; -2 to 2.", Range(-2, 2))
    ] = None
    logit_bias: Annotated[
        Sequence[str] | Mapping[int, float] | None,
        Option("Add -100 to 100 to a token's logit; repeatable.", metavar="ID=VALUE"),
    ] = None
    max_thought_tokens: Annotated[
        int | None, Option("Most tokens of a deliberation; then it ends.", Range(0, 2**31 - 1))
    ] = None
    schema: Annotated[
        Path | str | Mapping[str, Any] | type | None,
        Option("Answer in JSON that follows the JSON schema in this file.", metavar="FILE"),
    ] = None
    seed: Annotated[int | None, Option("Same seed, same text.", Range(0, 2**63 - 1))] = None
    stop: Annotated[
        str | Sequence[str] | None, Option("End the answer before this text; repeatable.")
    ] = None

    def __post_init__(self) -> None:
        check_fields(self)
        _ = self.biases
        if self.schema is not None:
            from apertus_mlx.generation.structured import require_schema

            object.__setattr__(self, "schema", require_schema(self.schema))
        if not all(self.stop_strings):
            raise UsageError("--stop: an empty string would stop at once")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """All texts that end the answer."""
        return tuple(as_list(self.stop))

    @property
    def schema_text(self) -> str | None:
        """`schema` as checked JSON."""
        assert self.schema is None or isinstance(self.schema, str)
        return self.schema

    @property
    def biases(self) -> dict[int, float]:
        """`logit_bias` by token id.

        Raises:
            TypeError: a token or a bias of a wrong type.
            UsageError: a bias out of range, or a text that is not `ID=VALUE`.
        """
        given = self.logit_bias or {}
        pairs = given.items() if isinstance(given, Mapping) else map(_bias, given)
        found: dict[int, float] = {}
        for token, bias in pairs:
            expect(int, logit_bias=token)
            expect(float, logit_bias=bias)
            if not 0 <= token < 2**31:
                raise UsageError(f"--logit-bias {token}: expected the id of a token")
            if not -MOST_BIAS <= bias <= MOST_BIAS:
                raise UsageError(
                    f"--logit-bias {token}={bias}: expected {-MOST_BIAS} to {MOST_BIAS}"
                )
            found[token] = float(bias)
        return found


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise UsageError(
            f"--logit-bias {text[:40]!r}: expected ID=VALUE, such as 42=-100"
        ) from None


DEFAULT_SAMPLING = SamplingOptions()


# Of `DraftOptions.draft`: no model, but what the text itself has.
LOOKUP = "lookup"


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOptions:
    """What guesses tokens, which the model then checks several at a time; the text is the same.

    Raises:
        TypeError: a value of a wrong type.
        UsageError: a value outside its range, or one that would do nothing.
    """

    draft: Annotated[
        str | PathLike[str] | None,
        Option(
            "Have a small model of the same ids guess ahead; lookup: repeat what the text has.",
            metavar="MODEL",
        ),
    ] = None
    draft_vocab: Annotated[
        int | None, Option("Let the draft guess the first so many ids alone.", Range(256, 2**31))
    ] = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.draft_vocab is not None and self.model is None:
            raise UsageError("--draft-vocab: cuts the head of a draft; give --draft MODEL, too")

    @property
    def model(self) -> str | None:
        """The folder or Hub id of the draft, if it is a model."""
        return None if self.draft is None or self.draft == LOOKUP else fspath(self.draft)


NO_DRAFT = DraftOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """How keys and values are kept, and the prompt is read; None leaves it to the planner.

    Raises:
        TypeError: a value of a wrong type.
        UsageError: a value outside its range.
    """

    kv_bits: Annotated[
        int | None, Option("Bits of cached keys and values: 2, 3, 4, 6, 8 or 16 (full).")
    ] = None
    kv_bits_v: Annotated[int | None, Option("Bits of cached values; default: those of keys.")] = (
        None
    )
    max_kv: Annotated[
        int | None, Option("Keep at most this many positions: the first few, the latest.")
    ] = None
    kv_sink: Annotated[
        int | None, Option("First positions that stay under --max-kv or --kv-bits; default: 4.")
    ] = None
    kv_rotate: Annotated[
        bool | None, Option("Rotate keys before they are quantized; default: where heads allow it.")
    ] = None
    prefill_step: Annotated[
        int | None,
        Option("Prompt tokens per step; default: 512 (on CUDA 2048), or less.", Range(1, 2**20)),
    ] = None

    def __post_init__(self) -> None:
        check_fields(self)
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
    """How a model is found and computed; see also `CacheOptions`."""

    dtype: Annotated[DType | None, Option("Type to compute in; default: what suits.")] = None
    compute: Annotated[
        Literal["auto", "mlx", "cpu"], Option("mlx, or cpu where MLX has no GPU; auto chooses.")
    ] = "auto"
    precision: Annotated[
        Literal["auto", "float32", "int8"],
        Option(
            "Type of activations on the CPU; auto: int8 with weights of few bits, else float32."
        ),
    ] = "auto"
    embedding: Annotated[
        Literal["memory", "disk"],
        Option("disk: read a token's row from the file each time; not where the head is the same."),
    ] = "memory"
    pipeline: Annotated[
        bool,
        Option("Under mlx.launch split the model by layers, by each machine's memory."),
    ] = False
    memory_limit: Annotated[
        str | int | None,
        Option("Most memory, as 1.2GB or in bytes; default: what the machine can give."),
    ] = None
    force: Annotated[bool, Option("Try even where the memory will not suffice.")] = False
    revision: Revision = None
    offline: Offline = False

    def __post_init__(self) -> None:
        # A dataclass with slots is another class than the one that `super()` remembers.
        CacheOptions.__post_init__(self)
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
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Sequence[str] | Mapping[int, float] | None
    max_thought_tokens: int | None
    schema: Path | str | Mapping[str, Any] | type | None
    seed: int | None
    stop: str | Sequence[str] | None


class CacheKeywords(TypedDict, total=False):
    """The fields of `CacheOptions`."""

    kv_bits: int | None
    kv_bits_v: int | None
    max_kv: int | None
    kv_sink: int | None
    kv_rotate: bool | None
    prefill_step: int | None


class RunKeywords(CacheKeywords, total=False):
    """The fields of `RunOptions`."""

    dtype: DType | None
    compute: Literal["auto", "mlx", "cpu"]
    precision: Literal["auto", "float32", "int8"]
    embedding: Literal["memory", "disk"]
    pipeline: bool
    memory_limit: str | int | None
    force: bool
    revision: str | None
    offline: bool
