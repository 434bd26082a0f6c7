"""The options of `convert`, as they are typed, become a request."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from apertus_mlx.checkpoint import layout
from apertus_mlx.convert.plan.plan import CONFIG_DTYPES
from apertus_mlx.convert.plan.policy import (
    BEST,
    METHODS,
    MULTIPLE,
    Method,
    Request,
    Rule,
    Target,
    make_spec,
)
from apertus_mlx.errors import UsageError
from apertus_mlx.memory.devices import parse_size
from apertus_mlx.quant.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, FLOAT_MODES, QuantSpec
from apertus_mlx.system.arguments import expect_one_of
from apertus_mlx.system.model_files import read_own_file
from apertus_mlx.system.strict_json import parse_object

RECIPE_KEYS = {"bits", "group_size", "mode", "modules"}
MAX_RECIPE_BYTES = 2**20


def read_request(
    *,
    bits: int | None,
    group_size: int | None,
    mode: str | None,
    embed_bits: int | None,
    head_bits: int | None,
    rules: Sequence[str],
    recipe: Path | None,
    target_bpw: float | str | None,
    target_size: int | str | None,
    method: str,
    dtype: str | None,
    vocab: int | None,
    vocab_for: Sequence[str],
    **switches: bool,
) -> Request:
    """The request that the options make together; `switches` are those of `Request`.

    Raises:
        UsageError: an option has a value that it cannot have, or two contradict each other.
    """
    expect_one_of(AFFINE_BITS, bits=bits, embed_bits=embed_bits, head_bits=head_bits)
    expect_one_of(AFFINE_GROUP_SIZES, group_size=group_size)
    expect_one_of(tuple(CONFIG_DTYPES), dtype=dtype)
    expect_one_of(METHODS, method=method)
    if isinstance(target_bpw, int | float):
        target_bpw = f"{target_bpw:.6f}"
    if isinstance(target_size, int):
        target_size = str(target_size)
    target = parse_target(target_bpw, target_size, group_size)
    if target is not None and (bits is not None or mode is not None or recipe is not None):
        raise UsageError(f"{target}: chooses formats itself; leave out --bits, --mode and --recipe")
    default = None
    found: list[Rule] = []
    if recipe is not None:
        if bits is not None or mode is not None or group_size is not None:
            raise UsageError("--recipe: says bits, group size and mode itself; leave them out")
        default, recipe_rules = read_recipe(recipe)
        found += recipe_rules
    elif bits is not None or mode is not None:
        default = make_spec(bits, group_size, mode, "--bits" if mode is None else "--mode")
    elif group_size is not None and not (embed_bits or head_bits or rules or target):
        raise UsageError("--group-size: give --bits as well")
    for option, number, path in (
        ("--embed-bits", embed_bits, layout.EMBEDDING),
        ("--head-bits", head_bits, layout.HEAD),
    ):
        if number is not None:
            found.append(Rule(path, make_spec(number, group_size, None, option), option))
    found += [parse_rule(rule, group_size) for rule in rules]
    if method == BEST:
        method, switches = "gptq", {**switches, "tune": True, "compare": True}
    elif switches.get("tune") and method != "gptq":
        raise UsageError(f"--tune: --method {method} calibrates nothing; give --method gptq")
    request = Request(
        default,
        tuple(found),
        target,
        method=next(each for each in get_args(Method) if each == method),
        dtype=CONFIG_DTYPES[dtype] if dtype else None,
        vocab=vocab,
        vocab_for=tuple(vocab_for),
        **switches,
    )
    _check_vocabulary(request)
    return request


def _check_vocabulary(request: Request) -> None:
    """Refuse a cut vocabulary that cannot be."""
    if request.vocab is None:
        return
    if request.vocab_for:
        raise UsageError("--vocab-for: leave out --vocab; one decides the other")
    if request.vocab < 1 or request.vocab % MULTIPLE:
        raise UsageError(
            f"--vocab {request.vocab}: expected a multiple of {MULTIPLE}, such as 65536"
        )


def parse_rule(text: str, group_size: int | None, origin: str = "--set") -> Rule:
    """A rule from `PATTERN=BITS[:GROUP]`; BITS may also be a mode, or `none` for unquantized."""
    pattern, equals, value = text.partition("=")
    if not equals or not pattern or not value:
        raise UsageError(
            f"{origin} {text[:80]!r}: expected PATTERN=BITS[:GROUP], for example '*.down_proj=6:32'"
        )
    bits, _, group = value.partition(":")
    name = f"{origin} {pattern[:80]}"
    if bits == "none":
        return Rule(pattern, None, name)
    if bits in FLOAT_MODES:
        return Rule(
            pattern, make_spec(None, _integer(group, name) if group else None, bits, name), name
        )
    group_value = _integer(group, name) if group else group_size
    return Rule(pattern, make_spec(_integer(bits, name), group_value, None, name), name)


def parse_target(
    bits_per_weight: str | None, size: str | None, group_size: int | None
) -> Target | None:
    """A target from `--target-bpw` or `--target-size`; None where neither is given.

    Raises:
        UsageError: both are given, or one is not a number or a size.
    """
    if size is not None:
        if bits_per_weight is not None:
            raise UsageError("--target-size: leave out --target-bpw; one decides the other")
        return Target(size_bytes=parse_size(size, "--target-size"), group_size=group_size)
    if bits_per_weight is None:
        return None
    if not re.fullmatch(r"\d{1,2}(\.\d{1,6})?", bits_per_weight, re.ASCII):
        raise UsageError(f"--target-bpw {bits_per_weight[:40]!r}: expected a number such as 3.2")
    return Target(float(bits_per_weight), group_size=group_size)


def read_recipe(path: Path) -> tuple[QuantSpec | None, tuple[Rule, ...]]:
    """The default format and the rules of a recipe file, TOML or JSON.

    `bits`, `group_size` and `mode` at the top give the default; `modules` maps patterns to
    `false` or to a table with the same three keys.
    """
    name = str(path)
    if not path.exists():
        raise UsageError(f"{name}: there is no such recipe")
    data = read_own_file(path, MAX_RECIPE_BYTES)
    values: Mapping[str, Any]
    try:
        if path.suffix == ".json":
            values = parse_object(data, name)
        else:
            values = tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: is not valid TOML ({error})") from None
    _refuse_keys(values, RECIPE_KEYS, name)
    default = _recipe_spec(values, None, name) if values.keys() - {"modules"} else None
    modules = values.get("modules", {})
    if not isinstance(modules, dict):
        raise UsageError(f"{name}: modules: expected a table of patterns")
    rules = []
    for pattern, entry in modules.items():
        where = f"{name}: {pattern[:80]}"
        if entry is False:
            rules.append(Rule(pattern, None, where))
        elif isinstance(entry, dict):
            _refuse_keys(entry, RECIPE_KEYS - {"modules"}, where)
            rules.append(Rule(pattern, _recipe_spec(entry, default, where), where))
        else:
            raise UsageError(f"{where}: expected false or a table with bits, group_size, mode")
    return default, tuple(rules)


def _recipe_spec(values: Mapping[str, Any], default: QuantSpec | None, name: str) -> QuantSpec:
    numbers: dict[str, int | None] = {}
    for key in ("bits", "group_size"):
        value = values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise UsageError(f"{name}: {key}: expected an integer, found {value!r}")
        numbers[key] = value
    mode = values.get("mode")
    if mode is not None and not isinstance(mode, str):
        raise UsageError(f"{name}: mode: expected a string, found {mode!r}")
    group_size = numbers["group_size"]
    if group_size is None and default is not None and (mode or "affine") == default.mode:
        group_size = default.group_size
    return make_spec(numbers["bits"], group_size, mode, name)


def _refuse_keys(values: Mapping[str, Any], known: set[str], name: str) -> None:
    unknown = sorted(values.keys() - known)
    if unknown:
        raise UsageError(
            f"{name}: unknown key {unknown[0][:60]!r}; expected {', '.join(sorted(known))}"
        )


def _integer(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 4:
        raise UsageError(
            f"{name}: {text[:40]!r}: expected {', '.join(map(str, AFFINE_BITS))} bits, "
            f"groups of {', '.join(map(str, AFFINE_GROUP_SIZES))}, a mode or none"
        )
    return int(text)
