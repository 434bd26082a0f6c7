"""Runs and checks the text of Metal kernels on a machine without Metal.

    from tests.metal_harness import metal_kernel
    from apertus_mlx.backend.metal.kernel import build

    run = build(kernel, metal_kernel)     # instead of build(kernel), which asks MLX for Metal
    outputs = run(kernel.trial(seed=0))   # HarnessError if the kernel is faulty

What happens: MLX generates the complete text of the kernel (`mlx_text`), C++ glue is put around it
(`translate`), the host's compiler makes a library of it (`compile`), and every thread of the grid
runs as a fiber (`run`, cpp/runtime). A launch is repeated in other thread orders, and the outputs
must agree bit for bit.

    functools.partial(metal_kernel, contracts=True, reduces_pairwise=True)

is a factory too: the same kernel where the host rounds as Metal may; compare with a tolerance.

    lint.lint(generate_for(kernel), standard)       # address spaces and the like
    count_launches(step, inputs, texts)             # what a traced function launches (`mlx_text`)
    survivors([Trial(kernel, inputs, is_right)])    # planted faults nobody notices (`mutate`)

It cannot see: speed, registers and occupancy; how Metal's own compiler rounds in exp, sin and
rsqrt; reordering of memory between threadgroups; what Metal's front end refuses beyond `lint`.
"""

from .compile import missing
from .errors import HarnessError, TranslationError
from .factory import metal_kernel
from .mlx_text import Array, count_launches, generate, generate_for
from .mutate import Mutant, Trial, mutants, survivors
from .run import SCHEDULES, Order, Schedule

__all__ = [
    "SCHEDULES",
    "Array",
    "HarnessError",
    "Mutant",
    "Order",
    "Schedule",
    "TranslationError",
    "Trial",
    "count_launches",
    "generate",
    "generate_for",
    "metal_kernel",
    "missing",
    "mutants",
    "survivors",
]
