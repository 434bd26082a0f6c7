"""Small products of NumPy on one thread.

Threads of BLAS wait for each other. With products as small as those of a group that takes as long
as computing them, and several times as long where other programs use the cores.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

from threadpoolctl import ThreadpoolController


def one_thread() -> AbstractContextManager[object]:
    """Inside, NumPy's products use one thread, in the whole process; MLX's are not concerned."""
    limited: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
    return limited


@cache
def _controller() -> ThreadpoolController:
    # It looks at every library that is loaded.
    return ThreadpoolController()
