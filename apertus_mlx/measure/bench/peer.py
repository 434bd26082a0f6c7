"""mlx-lm's side: its loader and its `generate_step`. The one module that imports mlx-lm."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import mlx.core as mx

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.errors import ApertusError, RejectedError
from apertus_mlx.measure.bench.sides import Loaded, Ready, Settings, serve
from apertus_mlx.measure.bench.stopwatch import Engine, Stopwatch
from apertus_mlx.measure.bench.workload import Task
from apertus_mlx.system.foreign_errors import explain

# More than any context holds: what is decoded has no end.
ENDLESS = 2**31


class MlxLm(Engine):
    """`Engine` of mlx-lm, with its own defaults."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def make_cache(self) -> list[Any]:
        from mlx_lm.models.cache import make_prompt_cache

        cache: list[Any] = make_prompt_cache(self._model)
        return cache

    def read(self, prompt: list[int], cache: list[Any]) -> None:
        """Write `prompt` to the cache; the one token that is drawn, too, is forgotten again."""
        next(self.tokens(prompt, cache))
        mx.eval([layer.state for layer in cache])
        self.rewind(cache, cache[0].offset - len(prompt))

    def tokens(self, prompt: list[int], cache: list[Any]) -> Generator[int, None, None]:
        from mlx_lm.generate import generate_step

        steps = generate_step(mx.array(prompt), self._model, max_tokens=ENDLESS, prompt_cache=cache)
        for token, _ in steps:
            yield int(token)

    def rewind(self, cache: list[Any], positions: int) -> bool:
        from mlx_lm.models.cache import trim_prompt_cache

        return bool(trim_prompt_cache(cache, positions) == positions)


@contextmanager
def open_side(settings: Settings) -> Iterator[Loaded]:
    """Load the model, and run it under the limits, as mlx-lm's commands do.

    Raises:
        RejectedError: mlx-lm cannot load it.
        ResourceError: there is not enough memory.
    """
    import mlx_lm
    from mlx_lm.generate import generate_step, wired_limit

    started = time.perf_counter()
    try:
        model: Any = mlx_lm.load(settings.directory)[0]
    except Exception as error:
        raise _blamed(error, "cannot load this model") from error
    if settings.dtype is not None:
        model.set_dtype(getattr(mx, settings.dtype))
        mx.eval(model.parameters())
    load_s = time.perf_counter() - started
    dtype = model.model.norm.weight.dtype
    ready = Ready(
        version=mlx_lm.__version__,
        backend=f"MLX on the {'GPU' if has_gpu() else 'CPU'}",
        on_gpu=has_gpu(),
        kernels=[],
        dtype=str(dtype).removeprefix("mlx.core."),
        cache="full precision",
        number_bytes=dtype.size,
        prefill_step=signature(generate_step).parameters["prefill_step_size"].default,
        load_s=load_s,
    )
    watch = Stopwatch(MlxLm(model), settings.vocab_size, settings.new_tokens, settings.seed)

    def seconds(task: Task) -> float:
        try:
            return watch.seconds(task)
        except Exception as error:
            raise _blamed(error, f"fails at {task}") from error

    with wired_limit(model):
        yield Loaded(ready, seconds)


def _blamed(error: Exception, what: str) -> ApertusError:
    """What mlx-lm raised: no bug of ours, whatever it is."""
    return explain(error) or RejectedError(f"--against mlx-lm: it {what}: {error}")


if __name__ == "__main__":
    serve(open_side)
