"""One engine in its own process, told over its standard input what to time.

    python cpu_peers.py ENGINE MODEL THREADS

Engines: `ours-auto`, `ours-float32`, `ours-int8`, `mlx-lm` (as it comes), `mlx-lm-float32` and
`llama.cpp`. Each line on standard input is `prefill N` or `decode CONTEXT N`; each answer a JSON
object on one line. `decode` goes on from where it was, if the context is the same as before.
Run as a file, not as a module: llama-cpp-python may live in an environment without this package.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

PREFILL_STEP = 512


class Engine(Protocol):
    """What is timed."""

    def clear(self) -> None:
        """Forget all tokens."""

    def feed(self, tokens: list[int]) -> None:
        """Read `tokens`, and compute the logits after the last one."""


class Llama:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, model: str, threads: int) -> None:
        import llama_cpp

        self._model = llama_cpp.Llama(
            model,
            n_ctx=4352,
            n_batch=PREFILL_STEP,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def clear(self) -> None:
        self._model.reset()

    def feed(self, tokens: list[int]) -> None:
        self._model.eval(tokens)


class Ours:
    """This package."""

    def __init__(self, model: str, precision: Any) -> None:
        import mlx.core as mx

        from apertus_mlx.backend.cpu.model import CPUModel
        from apertus_mlx.checkpoint.inventory import take_inventory
        from apertus_mlx.generation.decode import prefill

        self._model = CPUModel(take_inventory(Path(model)), precision)
        self._prefill, self._eval, self._array = prefill, mx.eval, mx.array

    def clear(self) -> None:
        self._cache = self._model.make_cache()

    def feed(self, tokens: list[int]) -> None:
        if len(tokens) == 1:
            self._eval(self._model(self._array([tokens]), self._cache))
        else:
            self._eval(self._prefill(self._model, tokens, self._cache, PREFILL_STEP))


class MlxLm:
    """mlx-lm on MLX's CPU backend."""

    def __init__(self, model: str, float32: bool) -> None:
        import mlx.core as mx
        from mlx_lm import load
        from mlx_lm.models.cache import make_prompt_cache

        self._mx, self._make_cache = mx, make_prompt_cache
        self._model = load(model)[0]
        if float32:
            self._model.set_dtype(mx.float32)

    def clear(self) -> None:
        self._cache = self._make_cache(self._model)

    def feed(self, tokens: list[int]) -> None:
        for start in range(0, len(tokens), PREFILL_STEP):
            ids = self._mx.array([tokens[start : start + PREFILL_STEP]])
            self._mx.eval(self._model(ids, cache=self._cache))


def open_engine(name: str, model: str, threads: int) -> Engine:
    """Load `model` into the engine called `name`."""
    if name == "llama.cpp":
        return Llama(model, threads)
    if name.startswith("ours-"):
        return Ours(model, name.removeprefix("ours-"))
    return MlxLm(model, name.endswith("float32"))


def prompt(length: int) -> list[int]:
    """Token ids all over the vocabulary."""
    return [(index * 7919) % 131_000 + 10 for index in range(length)]


def answers(engine: Engine, commands: Iterator[str]) -> Iterator[dict[str, float]]:
    """Carry out each command."""
    context = 0
    for command in commands:
        name, *numbers = command.split()
        counts = [int(number) for number in numbers]
        if name == "prefill":
            engine.clear()
            context = 0
            started = time.perf_counter()
            engine.feed(prompt(counts[0]))
            rate = counts[0] / (time.perf_counter() - started)
        else:
            if context != counts[0]:
                engine.clear()
                engine.feed(prompt(counts[0]))
                context = counts[0]
            started = time.perf_counter()
            for token in prompt(counts[1]):
                engine.feed([token])
            rate = counts[1] / (time.perf_counter() - started)
            context = counts[0]
        yield {"tokens_per_s": rate, **memory()}


def memory() -> dict[str, float]:
    """Peak resident memory of this process, where the system says."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return {}
    return {"peak_mib": int(status.split("VmHWM:")[1].split()[0]) / 1024}


def main() -> None:
    """Command line."""
    name, model, threads = sys.argv[1:]
    os.environ["APERTUS_MLX_THREADS"] = threads
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    started = time.perf_counter()
    engine = open_engine(name, model, int(threads))
    print(json.dumps({"load_s": time.perf_counter() - started, **memory()}), flush=True)
    for answer in answers(engine, iter(sys.stdin)):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
