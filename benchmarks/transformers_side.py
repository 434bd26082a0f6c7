"""transformers' side of a comparison: its Apertus under PyTorch, on a GPU where PyTorch has one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from apertus_mlx.backend.hardware import peak_bytes
from apertus_mlx.measure.bench.sides import Loaded, Ready, Settings, serve
from apertus_mlx.measure.bench.workload import Task, random_prompt


@contextmanager
def open_side(settings: Settings) -> Iterator[Loaded]:
    """Load the model in bfloat16 on a GPU, else in float32, with transformers' own defaults."""
    torch, transformers = import_module("torch"), import_module("transformers")
    cuda = torch.cuda.is_available()
    dtype = settings.dtype or ("bfloat16" if cuda else "float32")
    started = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        Path(settings.directory), dtype=getattr(torch, dtype), local_files_only=True
    )
    model = model.to("cuda" if cuda else "cpu").eval()
    ready = Ready(
        version=transformers.__version__,
        backend=f"PyTorch on the {'GPU' if cuda else 'CPU'}",
        on_gpu=cuda,
        kernels=[],
        dtype=dtype,
        cache="full precision",
        number_bytes=getattr(torch, dtype).itemsize,
        prefill_step=0,
        load_s=time.perf_counter() - started,
    )
    peak = torch.cuda.max_memory_allocated if cuda else lambda: peak_bytes(gpu=False)

    def step(ids: list[int], cache: Any) -> int:
        """Read `ids`; the likeliest token behind them."""
        given = torch.tensor([ids], device=model.device)
        logits = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    def seconds(task: Task) -> float:
        prompt = random_prompt(max(task.tokens, 1), settings.vocab_size, settings.seed)
        with torch.inference_mode():
            cache = transformers.DynamicCache()
            started = time.perf_counter()
            token = step(prompt, cache)
            if task.kind == "prefill":
                return time.perf_counter() - started
            started = time.perf_counter()
            for _ in range(settings.new_tokens):
                token = step([token], cache)
            return time.perf_counter() - started

    yield Loaded(ready, seconds, peak_bytes=peak)


if __name__ == "__main__":
    serve(open_side)
