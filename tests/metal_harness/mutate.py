"""Small faults planted into a kernel, each of which its test must notice.

A kernel's list of mutants follows from its text alone. A mutant that compiles to the same machine
code as the kernel (a function that is not called, a bound that constants make irrelevant) is no
fault and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

import mlx.core as mx

from apertus_mlx.backend.metal.kernel import Kernel, KernelText

from .compile import Options, library
from .errors import HarnessError, TranslationError
from .factory import metal_kernel
from .mlx_text import Array, generate
from .translate import to_cpp

ENDLESS_S = 2
NOT_CODE = re.compile(r"//[^\n]*|#[^\n]*|\[\[.*?\]\]")


@dataclass(frozen=True, slots=True)
class Rule:
    """A way to plant a fault wherever `pattern` matches."""

    pattern: re.Pattern[str]
    replacement: str | Callable[[re.Match[str]], str]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A kernel's text with one fault."""

    # Such as "body:3:14: '+' becomes '-'".
    what: str
    # The line it is in, without the fault.
    line: str
    text: KernelText


class Outcome(Enum):
    """What a trial says of a mutant."""

    # The same machine code, or text that does not compile, which nobody would miss.
    NO_FAULT = auto()
    NOTICED = auto()
    UNNOTICED = auto()


@dataclass(frozen=True, slots=True)
class Trial:
    """A run of a kernel that may show a fault in it."""

    kernel: Kernel
    inputs: Sequence[mx.array]
    # Whether outputs are what the kernel's would be.
    is_right: Callable[[list[mx.array]], bool]


def _swap(first: str, second: str) -> Iterator[Rule]:
    """Rules that make each word or operator the other one."""
    for old, new in ((first, second), (second, first)):
        yield Rule(_whole(old), new)


def _whole(token: str) -> re.Pattern[str]:
    """`token` and no longer one; operators count only between spaces, where they are binary."""
    if token.isidentifier():
        return re.compile(rf"\b{token}\b")
    return re.compile(rf"(?<= ){re.escape(token)}(?= )")


def _next_number(match: re.Match[str]) -> str:
    """Another number in the same notation: one more, or half as much again."""
    digits, suffix = match["digits"], match["suffix"]
    if digits.startswith("0x"):
        return f"{int(digits, 16) + 1:#x}{suffix}"
    if "f" not in suffix:
        return f"{int(digits) + 1}{suffix}"
    return f"{float(digits) * 1.5 or 1.0!r}{suffix}"


NUMBER = re.compile(
    r"(?<![\w.])(?P<digits>0x[0-9a-fA-F]+|\d+\.?\d*(?:e[-+]?\d+)?)(?P<suffix>[uf]*)(?![\w.])"
)
BARRIER = re.compile(r"(?:metal::)?(?:threadgroup|simdgroup)_barrier\([^;]*\);")
INDEX = re.compile(r"\b(?:thread_index_in_\w+|simdgroup_index_in_threadgroup)\b")
COMPONENT = re.compile(r"(?<=_grid\.|group\.)[xy]\b")
RULES = (
    Rule(BARRIER, ";"),
    Rule(INDEX, lambda match: f"({match[0]} + 1u)"),
    Rule(COMPONENT, lambda match: "y" if match[0] == "x" else "x"),
    Rule(NUMBER, _next_number),
    *_swap("+", "-"),
    *_swap("+=", "-="),
    *_swap("*", "/"),
    *_swap("<", "<="),
    *_swap(">", ">="),
    *_swap("==", "!="),
    *_swap("&&", "||"),
    *_swap("<<", ">>"),
    *_swap("&", "|"),
    Rule(_whole("%"), "/"),
    Rule(_whole("|="), "&="),
    Rule(_whole("simd_sum"), "simd_max"),
    *_swap("simd_max", "simd_min"),
    *_swap("min", "max"),
    *_swap("sin", "cos"),
    Rule(re.compile(r"\b(?:return|continue|break);"), ";"),
)


def mutants(text: KernelText) -> list[Mutant]:
    """All mutants of a text, from its first line to its last."""
    planted = [
        (part == "body", *fault)
        for part, code in (("header", text.header), ("body", text.source))
        for fault in _faults(part, code)
    ]
    planted.sort()
    return [
        Mutant(what, line, replace(text, source=code) if in_body else replace(text, header=code))
        for in_body, _, what, line, code in planted
    ]


def _faults(part: str, code: str) -> Iterator[tuple[int, str, str, str]]:
    """Position, description, line and the changed code of each fault."""
    skipped = [match.span() for match in NOT_CODE.finditer(code)]
    for rule in RULES:
        for match in rule.pattern.finditer(code):
            start, end = match.span()
            if any(first <= start < last for first, last in skipped):
                continue
            new = rule.replacement
            if not isinstance(new, str):
                new = new(match)
            line = code.count("\n", 0, start) + 1
            column = start - code.rfind("\n", 0, start)
            what = f"{part}:{line}:{column}: '{match[0]}' becomes '{new}'"
            yield start, what, code.splitlines()[line - 1], code[:start] + new + code[end:]


def survivors(trials: Sequence[Trial], every: int = 1) -> list[Mutant]:
    """The mutants that no trial notices, by a wrong output or by an error of the harness.

    Args:
        trials: of kernels whose texts differ in numbers alone. The cheapest first: a mutant that
            one of them notices needs no other.
        every: takes every so many-th mutant.

    Raises:
        ValueError: a trial finds fault with the kernel itself, so it says nothing of mutants.
    """
    for trial in trials:
        if not trial.is_right(_run(trial.kernel, trial.kernel.text(), trial.inputs)):
            raise ValueError(f"{trial.kernel.key} fails its own trial")
    families = [mutants(trial.kernel.text())[::every] for trial in trials]
    return [
        family[0] for family in zip(*families, strict=True) if _is_unnoticed_fault(trials, family)
    ]


def _is_unnoticed_fault(trials: Sequence[Trial], family: Sequence[Mutant]) -> bool:
    is_fault = False
    for trial, mutant in zip(trials, family, strict=True):
        outcome = _outcome(trial, mutant)
        if outcome is Outcome.NOTICED:
            return False
        is_fault = is_fault or outcome is Outcome.UNNOTICED
    return is_fault


def _outcome(trial: Trial, mutant: Mutant) -> Outcome:
    kernel, inputs = trial.kernel, trial.inputs
    try:
        if _machine_code(kernel, mutant.text, inputs) == _machine_code(
            kernel, kernel.text(), inputs
        ):
            return Outcome.NO_FAULT
        outputs = _run(kernel, mutant.text, inputs)
    except TranslationError:
        return Outcome.NO_FAULT
    except HarnessError:
        return Outcome.NOTICED
    return Outcome.UNNOTICED if trial.is_right(outputs) else Outcome.NOTICED


def _run(kernel: Kernel, text: KernelText, inputs: Sequence[mx.array]) -> list[mx.array]:
    """The outputs of `text` where `kernel` would run."""
    launch = kernel.launch(inputs)
    run = metal_kernel(
        text.name,
        text.input_names,
        text.output_names,
        text.source,
        text.header,
        cpu_limit_s=ENDLESS_S,
    )
    return run(
        inputs=inputs,
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=launch.output_shapes,
        output_dtypes=launch.output_dtypes,
    )


def _machine_code(kernel: Kernel, text: KernelText, inputs: Sequence[mx.array]) -> bytes:
    launch = kernel.launch(inputs)
    outputs = zip(launch.output_shapes, launch.output_dtypes, strict=True)
    generated = generate(
        text, tuple(map(Array.of, inputs)), tuple(Array(*output) for output in outputs)
    )
    return library(to_cpp(generated), Options()).read_bytes()
