"""AutoRound: its own format in each packing, and its exports, rounded without tuning."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.neighbours.corpus import Case, Values
from benchmarks.neighbours.with_transformers import values_of

TOOL, PACKAGE = "AutoRound", "auto-round"


def cases() -> list[Case]:
    """Format and scheme; float schemes whose activations need text take random ids."""
    forms = [
        ("auto_round", "W4A16", {}), ("auto_round", "W3A16", {}), ("auto_round", "W2A16", {}),
        ("auto_round", "W8A16", {}), ("auto_round", "W4A16", {"sym": False}),
        ("auto_gptq", "W4A16", {}), ("auto_gptq", "W8A16", {}),
        ("auto_gptq", "W4A16", {"sym": False}), ("auto_awq", "W4A16", {"sym": False}),
        ("mlx", "W2A16", {}), ("mlx", "W3A16", {}), ("mlx", "W4A16", {}), ("mlx", "W8A16", {}),
        ("auto_round:mlx", "W4A16", {}),
        ("llm_compressor", "W4A16", {}), ("llm_compressor", "MXFP4", {}),
        ("llm_compressor", "MXFP8", {}), ("llm_compressor", "NVFP4", {}),
        ("auto_round", "MXFP4", {}), ("auto_round", "MXFP8", {}), ("auto_round", "NVFP4", {}),
        ("auto_round", "FP8_STATIC", {}), ("auto_round", "FP8_BLOCK", {}),
    ]  # fmt: skip
    return [
        Case(
            f"{form}, {scheme}" + "".join(f", {key}={value}" for key, value in options.items()),
            partial(quantized, form=form, scheme=scheme, options=options),
            "bfloat16" if "FP" in scheme or form == "llm_compressor" else "float16",
        )
        for form, scheme, options in forms
    ]


def quantized(base: Path, folder: Path, form: str, scheme: str, options: dict[str, Any]) -> Values:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.bfloat16)
    ids = torch.Generator().manual_seed(0)
    texts = [torch.randint(74, 330, (1, 64), generator=ids) for _ in range(8)]
    rounding = AutoRound(
        model, AutoTokenizer.from_pretrained(base), scheme=scheme, iters=0, disable_opt_rtn=True,
        device_map="cpu", dataset=texts, seqlen=64, nsamples=8, batch_size=4, **options,
    )  # fmt: skip
    rounding.quantize_and_save(str(folder.parent / "made"), format=form)
    written = next((folder.parent / "made").rglob("config.json")).parent
    written.rename(folder)
    if "mlx" in form:
        from benchmarks.neighbours.with_mlx_lm import values_of as values_of_mlx

        return values_of_mlx(folder)
    if form == "auto_gptq" and options.get("sym") is False:
        return {}  # GPTQModel takes such files from itself alone
    if form == "auto_gptq":
        from benchmarks.neighbours.with_gptqmodel import values_of as values_of_gptq

        return values_of_gptq(folder)
    if "FP" in scheme and form == "auto_round":
        return {}  # its kernels for these need a GPU; llm_compressor holds the same tensors
    unpacked = {}
    if form == "llm_compressor":
        from transformers import CompressedTensorsConfig

        unpacked = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **unpacked)
    return values_of(loaded)
