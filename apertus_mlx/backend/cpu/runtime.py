"""onnxruntime: its one pool of threads, and a graph that runs with its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy.typing as npt
import onnxruntime as ort

from apertus_mlx.backend.cpu.threads import thread_count
from apertus_mlx.errors import UsageError

Array = npt.NDArray[Any]

_pool_threads: int | None = None


class Session:
    """A graph, run on arrays. All sessions of a process share one pool of threads.

    `weights` are copied into onnxruntime's own layout; the caller may free them afterwards.
    """

    def __init__(self, graph: bytes, weights: Mapping[str, Array]) -> None:
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        # Stages run one after the other: one arena serves all, and is not returned and faulted in
        # again each time.
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        options.log_severity_level = 3
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
        if values:
            options.add_external_initializers(list(weights), values)
        _start_pool()
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._process = os.getpid()

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Run on C-contiguous arrays; new ones come out, in the order of the graph's outputs."""
        self._require_process()
        outputs: list[Array] = self._session.run(None, inputs)
        return outputs

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        return [output.name for output in self._session.get_outputs()]

    def bind(self) -> Binding:
        """A way to run on arrays that stay in their places."""
        return Binding(self)

    def _require_process(self) -> None:
        # A forked child has the pool's locks, but none of its threads: it would wait for ever.
        if os.getpid() != self._process:
            raise UsageError(
                "this model was loaded before the process forked; load it in the child, "
                "or start children with the spawn method"
            )


class Binding:
    """Runs a session on arrays that are placed beforehand, and kept until others are."""

    def __init__(self, session: Session) -> None:
        self._owner = session
        self._session = session._session
        self._binding = self._session.io_binding()

    def place(
        self, inputs: Mapping[str, Array], outputs: Mapping[str, Array] = MappingProxyType({})
    ) -> Binding:
        """Read from and write to these C-contiguous arrays; an output may be an input, too."""
        for name, array in inputs.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_input(name, value)
        for name, array in outputs.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_output(name, value)
        return self

    def run(self) -> None:
        """Run on what is placed."""
        self._owner._require_process()
        self._session.run_with_iobinding(self._binding)


def _start_pool() -> None:
    global _pool_threads  # noqa: PLW0603 - onnxruntime has one pool for the process
    if _pool_threads is not None:
        return
    _pool_threads = thread_count()
    ort.set_global_thread_pool_sizes(_pool_threads, 1)
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"arena_extend_strategy": 1}))
