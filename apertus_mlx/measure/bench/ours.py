"""This package's side: its loader, `prefill` and `decode`, as `generate` uses them."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from apertus_mlx import __version__
from apertus_mlx.backend.hardware import peak_bytes
from apertus_mlx.backend.memory_limits import mlx_limits
from apertus_mlx.backend.metal.enabled import enabled
from apertus_mlx.backend.mlx import DTYPES, compute_dtype
from apertus_mlx.backend.ranks import Ranks
from apertus_mlx.cache import Cache, CacheConfig, rewind
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.generation.agreement import Agreement
from apertus_mlx.generation.decode import decode, prefill
from apertus_mlx.generation.draft_model import load_drafting
from apertus_mlx.generation.drafts import Drafting
from apertus_mlx.generation.model_folder import ModelFolder, open_folder
from apertus_mlx.generation.options import DraftOptions, RunOptions
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.measure.bench.drafted import ENDLESS, Drafted
from apertus_mlx.measure.bench.sides import Loaded, Ready, Settings, serve
from apertus_mlx.measure.bench.stopwatch import Engine, Stopwatch
from apertus_mlx.model.apertus import Model
from apertus_mlx.model.language_model import LanguageModel


class Ours(Engine):
    """`Engine` of this package."""

    def __init__(
        self,
        model: LanguageModel,
        form: CacheConfig,
        prefill_step: int,
        ranks: Ranks | None = None,
    ) -> None:
        self._model = model
        self._ranks = ranks
        self._form = form
        self._prefill_step = prefill_step

    def make_cache(self) -> list[Cache]:
        return self._model.make_cache(self._form)

    def read(self, prompt: list[int], cache: list[Cache]) -> None:
        prefill(self._model, prompt, cache, self._prefill_step)

    def tokens(self, prompt: list[int], cache: list[Cache]) -> Generator[int, None, None]:
        greedy = SamplingParams(temperature=0, seed=0)
        sampler = Sampler(greedy, prompt, self._model.config.output_vocab_size)
        if self._ranks is not None:
            sampler.agree = Agreement(self._ranks, self._model.config.vocab_size).token
        logits = prefill(self._model, prompt, cache, self._prefill_step)
        yield from decode(self._model, logits, cache, sampler, ENDLESS)

    def rewind(self, cache: list[Cache], positions: int) -> bool:
        return rewind(cache, positions)


class Here:
    """This side in this process, which is one of several ranks; see `Side`."""

    name = "apertus-mlx"

    def __init__(self, settings: Settings, inventory: Inventory) -> None:
        """Load the part that `inventory` is of."""
        started = time.perf_counter()
        self._limits = ExitStack()
        loaded = self._limits.enter_context(open_side(settings, inventory))
        self.ready, self.seconds, self.speculation = loaded.ready, loaded.seconds, None
        self.start_s = time.perf_counter() - started

    @property
    def peak_memory_bytes(self) -> int:
        """The most that this process has held."""
        return peak_bytes(self.ready.on_gpu)

    def close(self) -> None:
        """Give the memory back."""
        self._limits.close()


@contextmanager
def open_side(settings: Settings, inventory: Inventory | None = None) -> Iterator[Loaded]:
    """Load the model and run it, both under limits, as `generate` does.

    `inventory`: of the part that this rank has, where there are several.
    """
    with mlx_limits(settings.buffer_cache_bytes, settings.wired_bytes):
        yield _load(settings, inventory)


def _load(settings: Settings, part: Inventory | None) -> Loaded:
    started = time.perf_counter()
    chosen = {name: getattr(settings, name) for name in ("dtype", "compute", "precision")}
    folder = open_folder(Path(settings.directory))
    loaded = replace(folder, inventory=part or folder.inventory).load(RunOptions(**chosen))
    load_s = time.perf_counter() - started
    inventory = loaded.folder.inventory
    form = CacheConfig(**settings.form)
    kernels: list[str] = []
    if isinstance(loaded.model, Model):
        backend = f"MLX on the {'GPU' if loaded.model.on_gpu else 'CPU'}"
        dtype = DTYPES[settings.dtype] if settings.dtype else compute_dtype(inventory)
        if inventory.part is None:
            found = enabled(inventory.config, inventory.specs, dtype)
            kernels = sorted(found.kernels) + ["compiled step"] * bool(found.compiled_step)
        else:
            backend += f", {inventory.part}"
    else:
        backend = f"onnxruntime on the CPU, precision {settings.precision}"
        dtype = mx.float32
    ready = Ready(
        version=__version__,
        backend=backend,
        on_gpu=loaded.model.on_gpu,
        kernels=kernels,
        dtype=str(dtype).removeprefix("mlx.core."),
        cache=str(form),
        number_bytes=dtype.size,
        prefill_step=settings.prefill_step,
        load_s=load_s,
    )
    drafting = _load_draft(loaded.folder, settings, RunOptions(**chosen))
    if drafting is None:
        plain = Ours(loaded.model, form, settings.prefill_step, loaded.ranks)
        return Loaded(ready, _watch(plain, settings).seconds)
    drafted = Drafted(loaded.model, form, settings.prefill_step, drafting)
    return Loaded(ready, _watch(drafted, settings).seconds, drafted.speculation.report)


def _watch(engine: Engine, settings: Settings) -> Stopwatch:
    return Stopwatch(engine, settings.vocab_size, settings.new_tokens, settings.seed)


def _load_draft(target: ModelFolder, settings: Settings, options: RunOptions) -> Drafting | None:
    drafts = DraftOptions(draft=settings.draft, draft_vocab=settings.draft_vocab)
    helper = None if drafts.model is None else open_folder(Path(drafts.model))
    return load_drafting(target, helper, drafts, options)


if __name__ == "__main__":
    serve(open_side)
