"""The text that MLX generates around a kernel's body, as MLX itself writes it.

`mx.export_function` traces a call of `mx.fast.metal_kernel` on every machine, with Metal or
without, and the file that it writes holds the complete text. So nothing here repeats MLX's rules
(which inputs are `constant`, which attributes become parameters): they are read off its answer.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from apertus_mlx.backend.metal.kernel import Kernel, KernelText

from .errors import HarnessError

SIGNATURE = re.compile(r"\[\[kernel\]\] void (custom_kernel_\w+)\(\n(.*?)\) \{\n", re.DOTALL)
PARAMETER = re.compile(r"(.+?)\b(\w+) \[\[(\w+)(?:\((\d+)\))?\]\]")
BODY_END = "\n}\n"


@dataclass(frozen=True, slots=True)
class Array:
    """Shape and type of an input or output: all that MLX's text depends on."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @classmethod
    def of(cls, array: mx.array) -> Array:
        return cls(array.shape, array.dtype)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the generated function."""

    # Such as "const device bfloat16_t*", "const constant int&" or "uint3".
    type: str
    name: str
    # The index of its buffer; None for an attribute of the thread.
    buffer: int | None

    @property
    def is_reference(self) -> bool:
        return self.type.endswith("&")

    @property
    def pointee(self) -> str:
        """The type without its last character, for a pointer or reference."""
        return self.type[:-1]


@dataclass(frozen=True, slots=True)
class GeneratedKernel:
    """A kernel as MLX would hand it to Metal's compiler."""

    function: str
    parameters: tuple[Parameter, ...]
    header: str
    # From "[[kernel]]" to the brace that opens the body.
    signature: str
    body: str

    @property
    def text(self) -> str:
        return self.header + self.signature + self.body + BODY_END


def exported(function: Callable[..., Any], *inputs: mx.array) -> str:
    """What MLX writes when it exports `function`; bytes that are not text are replaced.

    Raises:
        ValueError, RuntimeError: MLX refuses a name, a shape or a type.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traced.mlxfn"
        mx.export_function(str(path), function, *inputs)
        return path.read_bytes().decode("utf-8", "replace")


@cache
def generate(
    text: KernelText, inputs: tuple[Array, ...], outputs: tuple[Array, ...]
) -> GeneratedKernel:
    """The kernel for inputs and outputs of these shapes and types.

    Raises:
        HarnessError: MLX's text is not made as it was when this was written.
    """
    launch = mx.fast.metal_kernel(
        text.name, text.input_names, text.output_names, text.source, text.header
    )

    def call(*arrays: mx.array) -> list[mx.array]:
        made: list[mx.array] = launch(
            inputs=list(arrays),
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[output.shape for output in outputs],
            output_dtypes=[output.dtype for output in outputs],
        )
        return made

    written = exported(call, *(mx.zeros(array.shape, array.dtype) for array in inputs))
    found = list(_launches(written, text))
    if len(found) != 1:
        raise HarnessError(f"{text.name}: its text is not in what MLX exports")
    return found[0]


def generate_for(kernel: Kernel) -> GeneratedKernel:
    """The kernel as it would be compiled for its trial inputs; nothing is computed."""
    inputs = kernel.trial(0)
    launch = kernel.launch(inputs)
    outputs = zip(launch.output_shapes, launch.output_dtypes, strict=True)
    return generate(
        kernel.text(), tuple(map(Array.of, inputs)), tuple(Array(*output) for output in outputs)
    )


def count_launches(
    function: Callable[..., Any], inputs: Sequence[mx.array], texts: Iterable[KernelText]
) -> dict[str, int]:
    """Trace `function`, which may call `mx.fast.metal_kernel`, without running it.

    Args:
        function: of the inputs; MLX checks the names, shapes and types of its kernels' arrays.
        inputs: arrays, of which only shape and type matter.
        texts: kernels to look for.

    Returns:
        How often each kernel is launched, by its name.
    """
    written = exported(function, *inputs)
    return {text.name: sum(1 for _ in _launches(written, text)) for text in texts}


def _launches(written: str, text: KernelText) -> Iterator[GeneratedKernel]:
    for match in SIGNATURE.finditer(written):
        has_header = written.endswith(text.header, 0, match.start())
        if has_header and written.startswith(text.source + BODY_END, match.end()):
            parameters = tuple(map(_parameter, match[2].split(",\n")))
            yield GeneratedKernel(match[1], parameters, text.header, match[0], text.source)


def _parameter(line: str) -> Parameter:
    match = PARAMETER.fullmatch(line.strip())
    if match is None:
        raise HarnessError(f"MLX generates a parameter of unknown form: {line.strip()}")
    buffer = int(match[4]) if match[3] == "buffer" else None
    return Parameter(match[1].strip(), match[2], buffer)
