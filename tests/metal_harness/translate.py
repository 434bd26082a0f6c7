"""From the text for Metal to a C++ file for the host: the same text, with glue around it."""

from __future__ import annotations

import re

from .errors import TranslationError
from .mlx_text import GeneratedKernel, Parameter

# A variable in threadgroup memory, as opposed to a pointer into it.
THREADGROUP_VARIABLE = re.compile(
    r"\bthreadgroup\s+(?P<type>[A-Za-z_][\w:]*(?:<[^;<>]*>)?)\s+"
    r"(?P<name>[A-Za-z_]\w*)(?P<sizes>(?:\s*\[[^;\[\]]*\])*)\s*(?P<end>[;=,])"
)
# Words of C++ that Metal lacks, and functions that a C++ compiler knows without a declaration.
FORBIDDEN = (
    *("double", "std", "new", "delete", "virtual", "try", "throw", "catch", "goto", "typeid"),
    *("dynamic_cast", "expm1", "log1p", "erf", "erfc", "hypot", "cbrt", "printf", "malloc", "free"),
)
# Fields of runtime::Position.
ATTRIBUTES = {
    "dispatch_simdgroups_per_threadgroup",
    "dispatch_threads_per_threadgroup",
    "grid_origin",
    "grid_size",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "thread_execution_width",
    "thread_index_in_simdgroup",
    "thread_index_in_threadgroup",
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threadgroups_per_grid",
    "threads_per_grid",
    "threads_per_simdgroup",
    "threads_per_threadgroup",
}


def _place_variable(match: re.Match[str]) -> str:
    if match["end"] != ";":
        raise TranslationError(f"declare threadgroup variable {match['name']} alone, without value")
    kind = f"{match['type']}{match['sizes']}"
    name = match["name"]
    return f'auto& {name} = runtime::threadgroup_variable<{kind}>("{name}");'


def to_cpp(kernel: GeneratedKernel) -> str:
    """A file that compiles against cpp/ and defines `harness_run_thread`.

    Raises:
        TranslationError: a declaration or an attribute that the harness does not know.
    """
    misplaced = THREADGROUP_VARIABLE.search(re.sub(r"//.*", "", kernel.header))
    if misplaced is not None:
        raise TranslationError(f"threadgroup variable {misplaced['name']} outside the kernel")
    body = THREADGROUP_VARIABLE.sub(_place_variable, kernel.body)
    arguments = ",\n      ".join(map(_argument, kernel.parameters))
    return f"""\
#include "metal_stdlib"
#include "runtime/launch.h"
#include "runtime/threadgroup_memory.h"
#pragma GCC poison {" ".join(FORBIDDEN)}
using namespace metal;
#line 1 "header"
{kernel.header}
#line 1 "signature"
{kernel.signature}
#line 1 "body"
{body}
}}
#line 1 "glue"
extern "C" void harness_run_thread(int index) {{
  const runtime::Position position = runtime::position(index);
  void* const* buffers = runtime::buffers();
  (void)position;
  {kernel.function}(
      {arguments});
}}
"""


def _argument(parameter: Parameter) -> str:
    if parameter.buffer is None:
        if parameter.name not in ATTRIBUTES:
            raise TranslationError(f"the harness does not offer [[{parameter.name}]]")
        return f"position.{parameter.name}"
    value = f"static_cast<{parameter.pointee}*>(buffers[{parameter.buffer}])"
    return f"*{value}" if parameter.is_reference else value
