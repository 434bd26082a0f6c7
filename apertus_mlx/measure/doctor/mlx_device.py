"""The real device: MLX in this process."""

from __future__ import annotations

import time
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.metal.compiled_step import CompiledStep
from apertus_mlx.backend.metal.fused import FusedStep
from apertus_mlx.backend.metal.kernel import Factory, Kernel, build
from apertus_mlx.backend.mlx import load_inventory
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.generation.decode import decode, prefill
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.measure.doctor.chain import Chain
from apertus_mlx.measure.doctor.device import Agreement, Attempt, Device
from apertus_mlx.measure.doctor.measure import measure
from apertus_mlx.model.apertus import Model

PROMPT_TOKENS, GREEDY_TOKENS, TIMED_TOKENS = 32, 64, 64
# Most positions that the model sees.
CONTEXT = PROMPT_TOKENS + max(GREEDY_TOKENS, TIMED_TOKENS) + 1
# Some roundings of a layer, times the root of the number of layers.
LOGIT_BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


class MLXDevice(Device):
    """MLX in this process.

    Args:
        inventory: the model, which is loaded once it is needed.
        dtype: the type to compute in.
        factory: what makes kernels; by default `mx.fast.metal_kernel`.
    """

    def __init__(self, inventory: Inventory, dtype: str, factory: Factory | None = None) -> None:
        self._inventory, self._dtype, self._factory = inventory, dtype, factory
        self._chain: tuple[Kernel, Chain] | None = None
        self._model: Model | None = None
        self._steps: dict[frozenset[str], FusedStep] = {}

    def attempt(self, kernel: Kernel) -> Attempt:
        return measure(kernel, build(kernel, self._factory))

    def seconds(self, kernel: Kernel, fused: bool) -> float:
        if self._chain is None or self._chain[0] != kernel:
            self._free_chain()
            self._chain = kernel, Chain(kernel, build(kernel, self._factory))
        return self._chain[1].seconds(fused)

    def agreement(self, kernels: Mapping[str, Kernel], compiled: bool = False) -> Agreement:
        """Over a random prompt, which is read without kernels."""
        tokens, expected, _ = self._follow(self._model_with({}), None)
        _, found, choices = self._follow(self._model_with(kernels, compiled), tokens)
        same = sum(a == b for a, b in zip(choices, tokens[1:], strict=True))
        error = mx.linalg.norm(found - expected, axis=-1) / mx.linalg.norm(expected, axis=-1)
        wanted, actual = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (expected, found))
        divergence = mx.sum(mx.exp(wanted) * (wanted - actual), axis=-1).mean()
        # A maximum may hide what is not a number.
        worst = float(error.max()) if mx.isfinite(error).all() else float("nan")
        return Agreement(len(choices), same, worst, float(divergence), LOGIT_BOUNDS[self._dtype])

    def step_seconds(self, kernels: Mapping[str, Kernel], compiled: bool = False) -> float:
        model = self._model_with(kernels, compiled)
        cache = model.make_cache()
        logits = prefill(model, self._prompt(), cache)
        sampler = Sampler(SamplingParams(temperature=0, seed=0), [], model.config.vocab_size)
        steps = decode(model, logits, cache, sampler, TIMED_TOKENS + 1)
        # The step that follows the first token is the one that is traced, which does not count.
        next(steps)
        mx.synchronize()
        started = time.perf_counter()
        count = sum(1 for _ in steps)
        mx.synchronize()
        return (time.perf_counter() - started) / count

    def _follow(
        self, model: Model, tokens: list[int] | None
    ) -> tuple[list[int], mx.array, list[int]]:
        """Feed `tokens`, or the greedy ones, to `model`, one after the other.

        Returns all tokens and the choices after each but the last, and between them the centred
        logits `[GREEDY_TOKENS, vocabulary]`.
        """
        cache = model.make_cache()
        logits = prefill(model, self._prompt(), cache)
        fed = [tokens[0] if tokens else int(mx.argmax(logits))]
        rows, choices = [], []
        for index in range(GREEDY_TOKENS):
            after = model.next_token_logits(mx.array([[fed[-1]]]), cache)
            choice = mx.argmax(after.values) if after.best is None else after.best
            row = after.values.astype(mx.float32)
            rows.append(row - row.mean())
            mx.eval(rows[-1], choice)
            choices.append(int(choice))
            fed.append(tokens[index + 1] if tokens else choices[-1])
        return fed, mx.stack(rows), choices

    def _prompt(self) -> list[int]:
        count = self._inventory.config.vocab_size
        ids = mx.random.randint(0, count, (PROMPT_TOKENS,), mx.int32, mx.random.key(0))
        return [int(token) for token in np.array(ids)]

    def _model_with(self, kernels: Mapping[str, Kernel], compiled: bool = False) -> Model:
        self._free_chain()
        if self._model is None:
            self._model = load_inventory(self._inventory, self._dtype)
        step = self._step_with(kernels) if kernels else None
        self._model.use(CompiledStep(step) if step is not None and compiled else step)
        return self._model

    def _step_with(self, kernels: Mapping[str, Kernel]) -> FusedStep:
        """The same one for the same kernels: its first use takes time."""
        keys = frozenset(kernel.key for kernel in kernels.values())
        if keys not in self._steps:
            self._steps[keys] = FusedStep(kernels, self._factory)
        return self._steps[keys]

    def _free_chain(self) -> None:
        self._chain = None
        mx.clear_cache()
