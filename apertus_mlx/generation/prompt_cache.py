"""Prompt caches on disk: keys and values of a prefix, with a fingerprint of all they depend on.

A safetensors file. Its metadata holds `format` and `format_version`, the form of the cache, the
number of positions, and digests of model, weights, quantization, template and tokens. All names,
shapes and types follow from form, model and length, so whatever differs from them is refused; the
file chooses nothing, and nothing is read from it before its header has been checked. The digests
are of texts that `swift/` writes alike, so that a file opens there, too. Of several machines each
has a file of its own for its part, whose `part` says which that is.

The last token of a prompt is never in its file: it has to be computed anyway, and not every form of
cache could go back by it. Left out of the digests is what moves numbers by no more than rounding
does: the prefill step, fused kernels, the device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import mlx.core as mx
import numpy as np

from apertus_mlx.cache import CacheConfig
from apertus_mlx.cache.config import FULL_BITS, STEP, group_size
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo, read_header
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.errors import NotFoundError, RejectedError, ResourceError, UsageError
from apertus_mlx.generation.cached_prefix import CachedPrefix, shared_length
from apertus_mlx.model.language_model import LanguageModel
from apertus_mlx.system.model_files import (
    MAX_TOKENIZER_BYTES,
    checked,
    exists,
    open_file,
    read_file,
)
from apertus_mlx.system.strict_json import parse_object
from apertus_mlx.system.whole_file import whole_file

FORMAT, FORMAT_VERSION = "apertus-mlx prompt cache", "3"
TOKENS = "tokens"
# What is wrong with a file of the right kind, and the way out.
DAMAGED = "the file is damaged; delete it and let it be made anew"
SAMPLE_BYTES = 256
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
FLOATS = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Digests of what keys and values depend on; the names are what a refusal says."""

    model: str
    weights: str
    quantization: str
    template: str


@dataclass(frozen=True, slots=True)
class Saved:
    """A prefix that has been computed before: its tokens, and each layer's arrays by name."""

    tokens: list[int]
    layers: list[dict[str, mx.array]]
    arithmetic: str


class PromptCache:
    """One file for one run: what was there before is resumed, else the prompt is saved.

    Raises:
        RejectedError: see `load_prompt_cache`.
    """

    def __init__(
        self, path: Path, inventory: Inventory, form: CacheConfig, dtype: mx.Dtype
    ) -> None:
        self._path = path
        self._form = form
        self._made_with = fingerprint(inventory)
        self._part = str(inventory.part or "")
        self._saved: Saved | None = None
        self._failure: ResourceError | None = None
        if path.exists():
            self._saved = load_prompt_cache(
                path, inventory.config, form, dtype, self._made_with, self._part
            )
        elif not path.parent.is_dir():
            raise UsageError(f"--prompt-cache {path}: there is no folder {path.parent}")

    @property
    def tokens(self) -> list[int]:
        """Those of the prefix that the file holds; none where there was no file."""
        return [] if self._saved is None else self._saved.tokens

    def require_use(self, prompt: Sequence[int]) -> None:
        """Refuse a file that is of little use for `prompt`.

        Raises:
            RejectedError: the prompt shares less than half of the saved tokens.
        """
        if self._saved is None:
            return
        count, shared = len(self._saved.tokens), shared_length(self._saved.tokens, prompt[:-1])
        if 2 * shared < count:
            raise RejectedError(
                f"{self._path}: tokens: its {count} differ from the prompt from position "
                f"{shared} on; give the prompt it was made for, or another file"
            )

    def resume(self, model: LanguageModel, prompt: Sequence[int]) -> CachedPrefix:
        """What the file holds of `prompt`; an empty prefix if there was no file.

        Raises:
            RejectedError: it was made by another arithmetic, or its form of cache cannot go back
                to what it shares with the prompt.
        """
        prefix = CachedPrefix(model, self._form)
        if self._saved is None:
            return prefix
        tokens, saved_by = self._saved.tokens, self._saved.arithmetic
        if saved_by != model.arithmetic:
            raise RejectedError(
                f"{self._path}: was made with another --compute, --precision or --dtype than "
                f"{model.arithmetic}; delete it and let it be made anew"
            )
        shared = shared_length(tokens, prompt[:-1])
        prefix.restore(tokens, self._saved.layers)
        self._saved.layers.clear()
        prefix.cut(shared)
        if len(prefix.tokens) < shared:
            raise RejectedError(
                f"{self._path}: shares its first {shared} of {len(tokens)} tokens with the prompt, "
                f"but a cache in {self._form} cannot go back to them; give another file"
            )
        return prefix

    def save(self, prefix: CachedPrefix) -> None:
        """Save `prefix`, unless the file was there before; a failure waits for `finish`."""
        if self._saved is not None or not prefix.tokens:
            return
        try:
            save_prompt_cache(self._path, prefix, self._made_with, self._part)
        except ResourceError as error:
            self._failure = error

    def finish(self) -> None:
        """Say whether saving failed: once there is an answer, which nobody should lose by it.

        Raises:
            ResourceError: the file could not be written.
        """
        if self._failure is not None:
            raise self._failure


def fingerprint(inventory: Inventory) -> Fingerprint:
    """Digest the checkpoint's config, a sample of every tensor, formats, tokenizer and template."""
    config, checkpoint = inventory.config, inventory.checkpoint
    model = {field.name: getattr(config, field.name) for field in fields(config)}
    for name in ("quantization", "foreign_quantization", "dtype", "asks_for_code"):
        del model[name]
    # As it is computed with.
    model |= {"rope": asdict(config.rope), "rms_norm_eps": float(np.float32(config.rms_norm_eps))}
    weights = hashlib.sha256()
    for key in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[key]
        weights.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        with open_file(checkpoint.path(tensor)) as file:
            for start in (0, max(0, tensor.size_bytes // 2)):
                file.seek(tensor.offset + start)
                weights.update(file.read(min(SAMPLE_BYTES, tensor.size_bytes - start)))
    formats = "\n".join(f"{path} {spec}" for path, spec in sorted(inventory.specs.items()))
    return Fingerprint(
        model=_digest(json.dumps(model, sort_keys=True)),
        weights=weights.hexdigest(),
        quantization=_digest(formats),
        template=_files_digest(checkpoint.directory),
    )


def _files_digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in TEXT_FILES:
        path = directory / name
        content = read_file(path, MAX_TOKENIZER_BYTES) if exists(path) else b""
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def save_prompt_cache(
    path: Path, prefix: CachedPrefix, made_with: Fingerprint, part: str = ""
) -> None:
    """Write what `prefix` holds; whole or not at all.

    `part`: of one of several machines its `Part`, in words.

    Raises:
        ResourceError: the file cannot be written.
    """
    saved = Saved(prefix.tokens, prefix.export(), prefix.model.arithmetic)
    try:
        write_prefix(path, saved, prefix.form, made_with, part)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ResourceError(f"--prompt-cache {path}: cannot be written ({reason})") from None


def write_prefix(
    path: Path,
    saved: Saved,
    form: CacheConfig,
    made_with: Fingerprint,
    part: str = "",
    mode: int = 0o666,
) -> None:
    """Write a prefix whose caches have `form`; whole or not at all. For `mode` see `whole_file`.

    Raises:
        OSError: the file cannot be written.
    """
    arrays = {TOKENS: mx.array(saved.tokens, mx.int32)}
    for index, layer in enumerate(saved.layers):
        arrays |= {f"layers.{index}.{name}": array for name, array in layer.items()}
    mx.eval(arrays)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "form": json.dumps(asdict(form)),
        "arithmetic": saved.arithmetic,
        "positions": str(len(saved.tokens)),
        "tokens": _tokens_digest(saved.tokens),
        **asdict(made_with),
        **({"part": part} if part else {}),
    }
    with (
        whole_file(path, durable=False, mode=mode) as unfinished,
        unfinished.open("wb") as file,
    ):
        mx.save_safetensors(file, arrays, metadata)


def load_prompt_cache(
    path: Path,
    config: ModelConfig,
    form: CacheConfig,
    dtype: mx.Dtype,
    now: Fingerprint,
    part: str = "",
) -> Saved:
    """Read a prefix that was saved under the same conditions.

    Args:
        path: the file.
        config: of the model that will go on from there.
        form: of the cache that is wanted.
        dtype: in which the model computes.
        now: fingerprint of that model.
        part: of one of several machines its `Part`, in words.

    Raises:
        NotFoundError: there is no such file.
        RejectedError: the file is damaged, or made under other conditions; the message names which.
    """
    if not path.exists():
        raise NotFoundError(f"{path}: no such prompt cache")
    path = path.resolve()  # the user's own, so that a link may lead anywhere
    tensors = {tensor.name: tensor for tensor in read_header(path)}
    metadata = _read_metadata(path)
    if metadata.get("format") != FORMAT:
        raise RejectedError(f"{path}: is not a prompt cache of apertus-mlx")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise RejectedError(
            f"{path}: format version {metadata.get('format_version', '')[:20]!r}, this program "
            f"reads {FORMAT_VERSION}; delete it and let it be made anew"
        )
    made_by = metadata.get("part", "")
    if made_by != part:
        raise RejectedError(
            f"{path}: was made by {made_by[:80] or 'one machine'}, and this is "
            f"{part or 'one machine'}; delete it and let it be made anew"
        )
    for name, expected in asdict(now).items():
        if metadata.get(name) != expected:
            raise RejectedError(
                f"{path}: was made with another {_SPOKEN.get(name, name)}; "
                "delete it and let it be made anew"
            )
    if metadata.get("form") != json.dumps(asdict(form)):
        raise RejectedError(
            f"{path}: holds a cache of another form than {form}; give the --kv options that it "
            "was made with, or delete it"
        )
    positions = _parse_positions(metadata.get("positions", ""), config, path)
    _require_arrays(path, tensors, dict(_expected(config, form, positions, dtype)))
    arrays = mx.load(str(checked(path)), format="safetensors")
    assert isinstance(arrays, dict)
    tokens = [int(token) for token in np.array(arrays.pop(TOKENS))]
    if _tokens_digest(tokens) != metadata.get("tokens"):
        raise RejectedError(f"{path}: tokens do not match their fingerprint; {DAMAGED}")
    layers: list[dict[str, mx.array]] = [{} for _ in range(config.num_hidden_layers)]
    for name, array in arrays.items():
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all():
            raise RejectedError(f"{path}: {name}: has values that are not finite; {DAMAGED}")
        _, index, own_name = name.split(".", 2)
        layers[int(index)][own_name] = array
    return Saved(tokens, layers, metadata.get("arithmetic", ""))


_SPOKEN = {"model": "model (its config differs)", "weights": "revision of the weights",
           "template": "tokenizer or chat template"}  # fmt: skip


def _expected(
    config: ModelConfig, form: CacheConfig, positions: int, dtype: mx.Dtype
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Name, type and shape of every array, as `FullCache` and `QuantizedCache` export them."""
    heads, width = config.num_key_value_heads, config.head_dim
    number = FLOATS[dtype]
    yield TOKENS, ("I32", (positions,))
    flushed = form.flushed(positions)
    coded = flushed if form.ring is None else min(flushed, form.ring)
    for index in range(config.num_hidden_layers):
        prefix = f"layers.{index}."
        if not form.quantized:
            held = positions if form.bound is None else min(positions, form.bound)
            yield prefix + "rows", (number, (1, 2 * heads, held, width))
            continue
        if positions > flushed:
            yield prefix + "recent", (number, (1, 2 * heads, positions - flushed, width))
        if not coded:
            continue
        yield prefix + "departed", (number, (1, 2 * heads, STEP, width))
        for name, bits in (("keys", form.key_bits), ("values", form.value_bits)):
            if bits == FULL_BITS:
                yield prefix + name, (number, (1, heads, coded, width))
                continue
            scale = "BF16" if number == "F32" else number
            groups = (1, heads, coded, width // group_size(width))
            yield f"{prefix}{name}.words", ("U32", (1, heads, coded, width * bits // 32))
            yield f"{prefix}{name}.scales", (scale, groups)
            yield f"{prefix}{name}.biases", (scale, groups)


def _require_arrays(
    path: Path,
    tensors: dict[str, TensorInfo],
    expected: dict[str, tuple[str, tuple[int, ...]]],
) -> None:
    for name, (dtype, shape) in expected.items():
        tensor = tensors.pop(name, None)
        if tensor is None:
            # Of the last block nothing is left after a rewind.
            if name.endswith(".departed"):
                continue
            raise RejectedError(f"{path}: {name} is missing; {DAMAGED}")
        if tensor.dtype != dtype:
            raise RejectedError(
                f"{path}: {name}: type {tensor.dtype}, expected {dtype}; probably it was made with "
                "another --dtype; delete it and let it be made anew"
            )
        if tensor.shape != shape:
            raise RejectedError(
                f"{path}: {name}: shape {list(tensor.shape)}, expected {list(shape)}; {DAMAGED}"
            )
    if tensors:
        raise RejectedError(f"{path}: unexpected array {min(tensors)[:80]!r}; {DAMAGED}")


def _read_metadata(path: Path) -> dict[str, str]:
    with open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_object(file.read(length), f"{path}: header")
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise RejectedError(f"{path}: is not a prompt cache of apertus-mlx")
    return metadata


def _parse_positions(text: str, config: ModelConfig, path: Path) -> int:
    most = config.max_position_embeddings
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise RejectedError(f"{path}: positions {text[:20]!r}: expected 1 to {most}; {DAMAGED}")
    return int(text)


def _tokens_digest(tokens: Sequence[int]) -> str:
    return _digest(",".join(map(str, tokens)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
