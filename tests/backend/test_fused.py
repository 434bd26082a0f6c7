"""The fused step equals the plain one; its kernels run from the text that Metal would get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from apertus_mlx.backend import hardware
from apertus_mlx.backend.metal.fused import FusedStep
from apertus_mlx.backend.metal.needed import kernels_for
from apertus_mlx.cache import FULL_PRECISION, CacheConfig
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.generation.decode import decode, prefill
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.model.apertus import Model
from apertus_mlx.model.linear import ScaledLinear
from apertus_mlx.quant.spec import QuantSpec
from tests.builders import config_4x
from tests.daily import every
from tests.metal_harness import SCHEDULES, metal_kernel, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

PROMPT = [1, 65, 74, 150, 233, 80, 201, 99]
WHAT_RUNS = (
    "attention_input", "qk_norm_rope", "add_rms_norm", "matvec-residual", "rms_norm-matvec-peaks"
)  # fmt: skip
# Where a matrix is asked for without its neighbours: what remains if its fused form is slower.
LONE_MATRICES = ("matvec-xielu", "matvec-peaks", "add_rms_norm")


class Counting:
    """The harness as a factory, in one thread order, that counts launches by kernel."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()

    def __call__(self, name: str, *arguments: Any) -> Callable[..., list[mx.array]]:
        run = partial(metal_kernel, schedules=SCHEDULES[:1])(name, *arguments)

        def launch(**given: Any) -> list[mx.array]:
            self.launches[name] += 1
            return run(**given)

        return launch


def pair(
    accepted: Callable[[str], bool] = lambda place: True,
    bits: Callable[[str], int] = lambda path: 4,
    group_size: int = 32,
    change: Callable[[Model], None] = lambda model: None,
    **changes: Any,
) -> tuple[Model, Model, Counting]:
    """A plain model, one of the same weights with kernels, and what counts those."""
    size = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    config = parse_config(config_4x(**{**size, **changes}))
    mx.random.seed(3)
    reference = Model(config)
    formats = {
        path: bits(path)
        for path, part in reference.named_modules()
        if hasattr(part, "to_quantized")
    }

    def as_arguments(path: str, _: nn.Module) -> dict[str, int] | bool:
        return {"group_size": group_size, "bits": formats[path]} if path in formats else False

    nn.quantize(reference, class_predicate=as_arguments)
    specs = {path: QuantSpec(bits, group_size) for path, bits in formats.items()}
    kernels = {}
    for kernel in kernels_for(config, specs, mx.float32):
        if accepted(kernel.place):
            kernels.setdefault(kernel.place, kernel)
    counting = Counting()
    fused = Model(config)
    fused.use(FusedStep(kernels, counting))
    nn.quantize(fused, class_predicate=as_arguments)
    fused.update(reference.parameters())
    for model in (reference, fused):
        model.whole_codes = hardware.refuses_slices()
        change(model)
        mx.eval(model.parameters())
        model.fuse()
    return reference, fused, counting


def assert_equal_steps(
    reference: Model,
    fused: Model,
    form: CacheConfig = FULL_PRECISION,
    tokens: Sequence[int] = (7, 300, 12),
    prompt: Sequence[int] = PROMPT,
) -> None:
    caches = [model.make_cache(form) for model in (reference, fused)]
    for model, cache in zip((reference, fused), caches, strict=True):
        prefill(model, prompt, cache)
    for token in tokens:
        expected, found = (
            model.next_token_logits(mx.array([[token]]), cache)
            for model, cache in zip((reference, fused), caches, strict=True)
        )
        logits = expected.values
        assert mx.abs(found.values - logits).max().item() <= 1e-5 * mx.abs(logits).max().item()
        if found.best is not None:
            assert found.best.item() == mx.argmax(found.values).item()
        if found.peaks is not None:
            runs = found.values.reshape(found.peaks.size, -1)
            assert mx.array_equal(found.peaks, runs.max(axis=1))


@pytest.mark.parametrize("tied", every(2, [True, False]))
def test_a_small_model(tied: bool) -> None:
    reference, fused, counting = pair(tie_word_embeddings=tied)
    assert_equal_steps(reference, fused)
    # Each layer of each of the three steps: before attention, o, up, down; then head, best token.
    assert counting.launches.total() == 3 * (2 * 4 + 2)


@pytest.mark.parametrize(
    "accepted",
    [
        lambda place: place.startswith("attention_input"),
        lambda place: place.startswith("qk_norm_rope"),
        lambda place: not place.startswith("attention_input"),
        lambda place: place.startswith("add_rms_norm"),
        lambda place: place.startswith(LONE_MATRICES),
        lambda place: "residual" in place,
        lambda place: place.startswith("rms_norm"),
        lambda place: "peaks" in place,
        lambda place: False,
    ],
    ids=[
        "before attention",
        "rotation",
        "apart",
        "norm",
        "matrices",
        "residual",
        "norm prologue",
        "head",
        "none",
    ],
)
def test_any_part_of_the_kernels(accepted: Callable[[str], bool]) -> None:
    reference, fused, counting = pair(accepted)
    assert_equal_steps(reference, fused, tokens=(7, 300))
    assert (counting.launches.total() > 0) == any(map(accepted, WHAT_RUNS))


@pytest.mark.parametrize(
    "form",
    [CacheConfig(bound=16), CacheConfig(8, 8), CacheConfig(4, 4, bound=164)],
    ids=["bounded", "8 bits", "bounded 4 bits"],
)
def test_every_form_of_cache(form: CacheConfig) -> None:
    reference, fused, _ = pair()
    # Long enough to be quantized, and to overflow the bounds.
    assert_equal_steps(reference, fused, form, tokens=(7, 300, 12), prompt=PROMPT * 25)


def test_a_cache_from_elsewhere() -> None:
    caches = pytest.importorskip("mlx_lm.models.cache")
    reference, fused, _ = pair()
    made = [[caches.KVCache() for _ in model.layers] for model in (reference, fused)]
    for ids in ([PROMPT], [[7]], [[300]]):
        logits, found = (
            model(mx.array(ids), cache)
            for model, cache in zip((reference, fused), made, strict=True)
        )
        assert mx.abs(found - logits).max().item() <= 1e-5 * mx.abs(logits).max().item()


def test_mixed_formats_and_what_no_kernel_reads() -> None:
    def bits(path: str) -> int:
        return 6 if path.endswith(("v_proj", "down_proj")) else 3

    def scale(model: Model) -> None:
        attention = model.layers[0].self_attn
        attention.o_proj = ScaledLinear(attention.o_proj, mx.array([0.7]))

    reference, fused, counting = pair(bits=bits, change=scale)
    assert not fused.layers[0].self_attn.is_joined
    assert_equal_steps(reference, fused)
    # o of the second layer, up, down; head and best token; no joined projections, so no rotation.
    assert counting.launches.total() == 3 * (1 + 2 * 2 + 2)


@pytest.mark.parametrize("most", every(2, [10, 24]))
def test_greedy_tokens(most: int) -> None:
    reference, fused, _ = pair(tie_word_embeddings=True)
    found = []
    for model in (reference, fused):
        caches = model.make_cache()
        sampler = Sampler(SamplingParams(temperature=0), PROMPT, model.config.vocab_size)
        found.append(list(decode(model, prefill(model, PROMPT, caches), caches, sampler, most)))
    assert found[0] == found[1]


@pytest.mark.parametrize("top_k", every(3, [1, 5, 40]))
def test_sampled_tokens(top_k: int) -> None:
    reference, fused, _ = pair(tie_word_embeddings=True)
    params = SamplingParams(temperature=0.9, top_k=top_k, top_p=1.0, seed=4)
    found = []
    for model in (reference, fused):
        caches = model.make_cache()
        sampler = Sampler(params, PROMPT, model.config.vocab_size)
        found.append(list(decode(model, prefill(model, PROMPT, caches), caches, sampler, 12)))
    assert found[0] == found[1]


@pytest.mark.nightly
def test_one_layer_of_the_05b() -> None:
    """Real widths, so that the kernels are those of the released model; a small vocabulary."""
    reference, fused, counting = pair(
        group_size=64, hidden_size=1024, intermediate_size=6144, num_hidden_layers=1,
        num_attention_heads=16, num_key_value_heads=4, vocab_size=4096, tie_word_embeddings=True,
    )  # fmt: skip
    assert_equal_steps(reference, fused, tokens=(7,))
    assert counting.launches.total() == 4 + 2


def test_several_positions_or_sequences_are_plain() -> None:
    reference, fused, counting = pair()
    ids = mx.array([[7], [8]])
    assert mx.array_equal(fused(ids), reference(ids))
    assert mx.array_equal(fused(mx.array([PROMPT])), reference(mx.array([PROMPT])))
    assert counting.launches.total() == 0
