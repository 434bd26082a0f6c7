"""Which kernels a model needs, and that all of their texts are such as Metal takes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import mlx.core as mx
import pytest

from apertus_mlx.backend.metal.add_rms_norm import AddRMSNorm
from apertus_mlx.backend.metal.attention_input import ROWS_EACH, AttentionInput
from apertus_mlx.backend.metal.best_token import BestToken
from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.backend.metal.needed import kernels_for
from apertus_mlx.backend.metal.qk_norm_rope import QKNormRope
from apertus_mlx.backend.metal.quantized_matvec import TILES, QuantizedMatvec
from apertus_mlx.backend.metal.text import SOURCES
from apertus_mlx.quant.spec import QuantSpec
from tests.daily import every
from tests.metal_cases import DTYPES, RELEASED, RELEASED_BITS, needed, released, uniform
from tests.metal_harness.lint import STANDARDS, lint
from tests.metal_harness.mlx_text import generate_for

LAYER = "model.layers.3"


def test_released_model_has_every_kernel() -> None:
    kernels = needed("0.5B", QuantSpec(4, 64), mx.bfloat16)
    shape = (4, 64)
    matvecs = [
        QuantizedMatvec(*shape, 1024, 131072, mx.bfloat16, "rms_norm", "peaks"),
        QuantizedMatvec(*shape, 1024, 131072, mx.bfloat16, "none", "peaks"),
        QuantizedMatvec(*shape, 1024, 1536, mx.bfloat16, "rms_norm", "none"),
        QuantizedMatvec(*shape, 1024, 1024, mx.bfloat16, "none", "residual"),
        QuantizedMatvec(*shape, 1024, 6144, mx.bfloat16, "rms_norm", "xielu"),
        QuantizedMatvec(*shape, 1024, 6144, mx.bfloat16, "none", "xielu"),
        QuantizedMatvec(*shape, 6144, 1024, mx.bfloat16, "none", "residual"),
    ]
    inputs = [
        AttentionInput(*shape, 1024, 16, 4, 64, mx.bfloat16, rows_each=rows) for rows in ROWS_EACH
    ]
    others = [
        *inputs,
        QKNormRope(16, 4, 64, mx.bfloat16),
        AddRMSNorm(1024, mx.bfloat16),
        BestToken(16384),
    ]
    assert set(kernels[: len(matvecs) + len(others)]) == {*matvecs, *others}
    rest = kernels[len(matvecs) + len(others) :]
    tuned = [kernel for kernel in rest if isinstance(kernel, QuantizedMatvec)]
    assert len(tuned) == len(matvecs) * (len(TILES) - 1)
    assert {kernel.place for kernel in tuned} == {kernel.place for kernel in matvecs}
    # One for each number of tiles that a head may have.
    assert set(rest) - set(tuned) == {BestToken(131072 // rows) for rows in (4, 16, 32)}


def test_unequal_formats_get_their_own_kernels_or_none() -> None:
    config = released("1.5B")
    specs = uniform(config, QuantSpec(4, 64))
    for index in range(config.num_hidden_layers):
        specs[f"model.layers.{index}.self_attn.v_proj"] = QuantSpec(6, 64)
        specs[f"model.layers.{index}.mlp.up_proj"] = QuantSpec(4, 32, "mxfp4")
    specs[f"{LAYER}.mlp.down_proj"] = QuantSpec(3, 32)
    specs["lm_head"] = QuantSpec(8, 128)
    del specs["model.embed_tokens"]
    kernels = kernels_for(config, specs, mx.float16)
    matvecs = {k.place: k for k in kernels if isinstance(k, QuantizedMatvec)}.values()
    forms = {(k.bits, k.group_size, k.columns, k.rows, k.epilogue) for k in matvecs}
    assert forms == {
        (4, 64, 2048, 2048, "residual"),
        (4, 64, 12288, 2048, "residual"),
        (3, 32, 12288, 2048, "residual"),
        (8, 128, 2048, 131072, "peaks"),
    }


def test_unquantized_model_keeps_what_needs_no_weights() -> None:
    kinds = {type(kernel) for kernel in kernels_for(released("8B"), {}, mx.bfloat16)}
    assert kinds == {QKNormRope, AddRMSNorm}


def distinct() -> Iterator[Kernel]:
    """One kernel of each text that differs in more than numbers, and each type."""
    for dtype in DTYPES:
        seen = set()
        for kernel in needed("0.5B", QuantSpec(3, 64), dtype):
            shape = re.sub(r"-?\d[\d.e+-]*", "", kernel.text().source + kernel.text().header)
            if shape not in seen:
                seen.add(shape)
                yield kernel


@pytest.mark.parametrize("kernel", every(4, distinct()), ids=lambda kernel: kernel.key)
def test_text_is_clean(kernel: Kernel) -> None:
    generated = generate_for(kernel)
    for standard in STANDARDS:
        assert lint(generated, standard) == ()


def test_texts_are_short_and_keys_tell_them_apart() -> None:
    texts: dict[str, str] = {}
    for name in RELEASED:
        for bits in RELEASED_BITS:
            for dtype in DTYPES:
                for kernel in needed(name, QuantSpec(bits, 64), dtype):
                    text = kernel.text()
                    whole = text.header + text.source
                    assert len(whole) < (7000 if isinstance(kernel, AttentionInput) else 4400)
                    assert len(text.input_names) <= (9 if isinstance(kernel, AttentionInput) else 6)
                    assert kernel.key.startswith(kernel.place)
                    assert texts.setdefault(kernel.key, whole) == whole
    assert len(set(texts.values())) == len(texts)


def test_every_source_is_used() -> None:
    written = set()
    for kernel in needed("0.5B", QuantSpec(4, 64), mx.bfloat16):
        written |= set(re.findall(r"inline \w+ (\w+)\(|struct (\w+)", kernel.text().header))
    used = {name for pair in written for name in pair if name}
    plain = QuantizedMatvec(4, 64, 1024, 64, mx.bfloat16).text().header
    for path in SOURCES.iterdir():
        assert path.suffix == ".metal"
        names = re.findall(r"inline \w+ (\w+)\(|struct (\w+)", path.read_text())
        assert any(name in used or name in plain for pair in names for name in pair if name), path
