"""Model folders, good and bad, with what Python says of each.

`checkpoints/NAME` are the folders, `checkpoints.json` is a list of `{folder, accepted}` or
`{folder, refused}`, where FOLDER stands for the path. `generation.json` is the same for values of a
`generation_config.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from apertus_mlx.checkpoint.generation_config import read_generation_config
from apertus_mlx.checkpoint.inventory import Inventory, take_inventory
from apertus_mlx.convert.job import convert, prepare
from apertus_mlx.convert.plan.policy import Request, Rule
from apertus_mlx.convert.write.golden_answers import write_golden_answers
from apertus_mlx.errors import ApertusError, RejectedError
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.quant.spec import QuantSpec
from tests import convert_builders as build
from tests.checkpoint.test_checkpoint import BITSANDBYTES, HOSTILE, NORM, UP
from tests.swift_fixtures.plans import plans
from tests.swift_fixtures.sizes import NIGHTLY

INDEX = "model.safetensors.index.json"
ALPHA = "model.layers.0.mlp.act_fn.alpha_p"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, build.Raw]
# Of these memory is planned each day, of the others at night.
PLANNED = (
    "demo",
    "converted-4",
    "converted-mixed",
    "float16",
    "wide-heads",
    "narrow-heads",
    "tied",
)
GENERATION: list[dict[str, Any]] = [
    {}, {"eos_token_id": [2, 68, 72], "temperature": 0.8, "top_p": 0.9, "do_sample": True,
         "num_beams": 4},
    {"temperature": 1e-300, "min_p": 0, "repetition_penalty": 1e-20}, {"top_k": 100},
    {"eos_token_id": 100}, {"temperature": "hot"}, {"top_p": 1.5}, {"top_k": 1.5}, {"top_k": 101},
    {"temperature": -1e-10}, {"top_p": 1e-45}, {"top_p": 0}, {"min_p": 1e-40}, {"min_p": -1e-10},
    {"repetition_penalty": 1e-39}, {"repetition_penalty": 1e39}, {"do_sample": 1},
]  # fmt: skip


def write_checkpoint_fixtures(out: Path) -> None:
    """Write what is described above."""
    root = out / "checkpoints"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    folders = [*_converted(root), *_changed(root), *_hostile(root)]
    verdicts = [{"folder": folder.name, **_verdict(folder)} for folder in folders]
    (out / "checkpoints.json").write_text(json.dumps(verdicts), encoding="utf-8")
    (out / "generation.json").write_text(json.dumps(list(_generation(root))), encoding="utf-8")


def _converted(root: Path) -> list[Path]:
    """The demo model as it is, and as `convert` writes it."""
    shutil.copytree(model_dir(), root / "demo")
    mixed = (Rule("model.embed_tokens", QuantSpec(6, 64), "test"),
             Rule("model.layers.0.*", None, "test"))  # fmt: skip
    requests = {
        "converted-bf16": Request(None), "converted-4": Request(QuantSpec(4, 64)),
        "converted-mixed": Request(QuantSpec(3, 32), mixed),
        "converted-mxfp4": Request(QuantSpec(4, 32, "mxfp4")),
        "converted-nvfp4": Request(QuantSpec(4, 16, "nvfp4")),
    }  # fmt: skip
    for name, request in requests.items():
        convert(prepare(model_dir(), request, "demo"), root / name)
    write_golden_answers(root / "converted-4")
    return [root / name for name in ("demo", *requests)]


def _changed(root: Path) -> list[Path]:
    made: list[Path] = []

    def write(
        name: str, change: Callable[[Tensors], object] = lambda _: None, dtype: str = "BF16",
        **config: Any,
    ) -> Path:  # fmt: skip
        values = build.config(**config)
        folder = root / name
        folder.mkdir()
        tensors = build.random_tensors({"tie_word_embeddings": False, **values}, dtype)
        change(tensors)
        build.write_safetensors(folder / "model.safetensors", tensors)
        build.write_json(folder / "config.json", values)
        made.append(folder)
        return folder

    def copy(name: str, change: Callable[[Tensors], object]) -> None:
        shutil.copytree(root / "converted-4", root / name)
        tensors = build.read_folder(root / name)
        change(tensors)
        build.write_safetensors(root / name / "model.safetensors", tensors)
        weight_map = dict.fromkeys(tensors, "model.safetensors")
        build.write_json(root / name / INDEX, {"weight_map": weight_map})
        made.append(root / name)

    def number(value: float, shape: tuple[int, ...] = (1,), dtype: str = "F32") -> build.Raw:
        return build.raw(np.full(shape, value), dtype)

    def add(**tensors: build.Raw) -> Callable[[Tensors], object]:
        return lambda found: found.update(tensors)

    write("plain")
    write("float16", dtype="F16")
    write("float32", dtype="F32")
    write("wide-heads", head_dim=64)
    write("narrow-heads", head_dim=16)
    write("tied", tie_word_embeddings=True)
    write("tied-equal-head", lambda t: t.update({HEAD: t[EMBEDDING]}), tie_word_embeddings=True)
    other = build.raw(np.zeros((384, 128)), "BF16")
    write("tied-other-head", add(**{HEAD: other}), tie_word_embeddings=True)
    short = build.raw(np.zeros((10, 128)), "BF16")
    write("tied-short-head", add(**{HEAD: short}), tie_word_embeddings=True)
    write("no-tie-flag", tie_word_embeddings=build.REMOVED)
    write("no-head", lambda t: t.pop(HEAD))
    write("scalar-alpha", add(**{ALPHA: number(0.2, ())}))
    write("two-alphas", add(**{ALPHA: number(0.2, (2,))}))
    write("no-alpha", lambda t: t.pop(ALPHA))
    write("no-constants", lambda t: [t.pop(k) for k in list(t) if k.endswith((".beta", ".eps"))])
    for name, value in {"nan": np.nan, "inf": np.inf, "huge": 1e7, "large": 170.0}.items():
        write(f"alpha-{name}", add(**{ALPHA: number(value)}))
        write(f"alpha-{name}-bf16", add(**{ALPHA: number(value, dtype="BF16")}))
    write("alpha-inf-f16", add(**{ALPHA: number(np.inf, dtype="F16")}))
    write("eps-of-2", add(**{ALPHA.replace("alpha_p", "eps"): number(-2, ())}))
    write("rotary", add(**{"model.layers.0.self_attn.rotary_emb.inv_freq": number(1, (8,))}))
    write("unexpected", add(extra=number(1)))
    write("many-unexpected", add(**{f"x{index}": number(1) for index in range(30)}))
    write("missing", lambda t: t.pop(UP))
    write("transposed", add(**{UP: build.raw(np.zeros((128, 256)), "BF16")}))
    write("integers", add(**{UP: build.raw(np.zeros((256, 128), np.int32))}))
    write("says-quantized", quantization={"bits": 4, "group_size": 64})
    write("left-over", quantization_config=BITSANDBYTES)
    packed = add(**{HEAD: build.raw(np.zeros((384, 64), np.uint8))})
    write("packed", packed, quantization_config=BITSANDBYTES)
    write("gptq", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64})
    write("variant-beside")
    shutil.copy(made[-1] / "model.safetensors", made[-1] / "model.fp16.safetensors")
    folder = write("variants-alone")
    shutil.copy(folder / "model.safetensors", folder / "model.bf16.safetensors")
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    folder = write("pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (write("truncated") / "model.safetensors").open("r+b").truncate(5000)
    folder = write("link-outside")
    (folder / "model.safetensors").rename(root / "outside.safetensors")
    (folder / "model.safetensors").symlink_to("../outside.safetensors")
    folder = write("broken-link")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("nowhere")
    folder = write("fifo")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    folder = write("hub-links")
    blobs = root / "models--x--y" / "blobs"
    blobs.mkdir(parents=True)
    (folder / "model.safetensors").rename(blobs / "aa")
    (folder / "model.safetensors").symlink_to("../models--x--y/blobs/aa")
    for name, file in {"up": "../plain/model.safetensors", "missing": "model-2.safetensors",
                       "hidden": ".x.safetensors", "bin": "model.bin",
                       "type": 5}.items():  # fmt: skip
        folder = write(f"index-{name}")
        names = dict.fromkeys(build.read_folder(folder), "model.safetensors")
        build.write_json(folder / INDEX, {"weight_map": {**names, NORM: file}})
    folder = write("index-lies")
    build.write_json(folder / INDEX, {"weight_map": {NORM: "model.safetensors"}})
    folder = write("stray-shard")
    names = dict.fromkeys(build.read_folder(folder), "model.safetensors")
    build.write_json(folder / INDEX, {"weight_map": names})
    shutil.copy(folder / "model.safetensors", folder / "model-00002-of-00002.safetensors")
    folder = write("same-tensor-twice")
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    codes = UP.removesuffix(".weight")
    copy("codes", lambda _: None)
    rows = build.read_folder(root / "codes")[f"{codes}.scales"].shape[0]
    copy("codes-no-scales", lambda t: t.pop(f"{codes}.scales"))
    copy("codes-no-biases", lambda t: t.pop(f"{codes}.biases"))
    groups = build.read_folder(root / "codes")[f"{codes}.scales"].shape[1]
    short = build.raw(np.zeros((rows, groups + 1)), "BF16")
    copy("codes-short-scales", add(**{f"{codes}.scales": short}))
    integers = build.raw(np.zeros((rows, groups), np.uint8))
    copy("codes-integer-scales", add(**{f"{codes}.scales": integers}))
    copy("factor", add(**{f"{codes}.output_scale": number(2.0)}))
    copy("divisors", add(**{f"{codes}.output_divisor": number(2.0, (rows,))}))
    copy("factor-short", add(**{f"{codes}.output_divisor": number(2.0, (rows + 1,))}))
    both = {f"{codes}.output_scale": number(2.0), f"{codes}.output_divisor": number(2.0)}
    copy("factor-and-divisor", add(**both))
    return made


def _hostile(root: Path) -> list[Path]:
    made = []
    for name, content in HOSTILE.items():
        folder = root / f"hostile-{name.replace(' ', '-').replace('^', '')}"
        folder.mkdir()
        build.write_json(folder / "config.json", build.config())
        (folder / "model.safetensors").write_bytes(content)
        made.append(folder)
    return made


def _verdict(folder: Path) -> dict[str, Any]:
    try:
        inventory = take_inventory(folder)
    except RejectedError as error:
        message = str(error).replace(str(folder), "FOLDER")
        for library in ("is not valid JSON", "refused by the safetensors library"):
            message = message.partition(library)[0]
        return {"refused": message}
    planned = NIGHTLY or folder.name in PLANNED
    return {"accepted": {**_read(inventory), "plans": plans(inventory) if planned else []}}


def _read(inventory: Inventory) -> dict[str, Any]:
    absent = [name for name, tensor in inventory.vectors.items() if tensor is None]
    return {
        "formats": {path: str(spec) for path, spec in inventory.specs.items()},
        "factors": sorted(tensor.name for tensor in inventory.factors.values()),
        "dropped": sorted(inventory.dropped), "absent": sorted(absent),
        "float_types": sorted(inventory.float_dtypes),
    }  # fmt: skip


def _generation(root: Path) -> list[Mapping[str, Any]]:
    verdicts = []
    folder = root / "generation"
    folder.mkdir()
    for values in GENERATION:
        (folder / "generation_config.json").write_text(json.dumps(values))
        verdict: dict[str, Any] = {"values": values}
        try:
            config = read_generation_config(folder, 100)
            verdict["accepted"] = {
                "eos": config.eos_token_ids, "temperature": config.temperature,
                "top_p": config.top_p, "top_k": config.top_k, "min_p": config.min_p,
                "do_sample": config.do_sample, "ignored": config.ignored_keys,
                "repetition_penalty": config.repetition_penalty,
            }  # fmt: skip
        except ApertusError as error:
            verdict["refused"] = str(error).replace(str(folder), "FOLDER")
        verdicts.append(verdict)
    return verdicts
