"""Slots on disk: what each `cache_key` keeps, as a prompt cache in a folder of the server's own.

A file is named by a digest of its key, so that no key chooses a path. It is read when a request
names its slot for the first time, and written when the server has nothing else to do. A file that
cannot be used costs a line in the log, and is replaced.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from apertus_mlx.cache import CacheConfig
from apertus_mlx.errors import RejectedError, ResourceError, UsageError
from apertus_mlx.generation.batch import Batch
from apertus_mlx.generation.cached_prefix import export, restore
from apertus_mlx.generation.model_folder import ModelFolder
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.generation.prompt_cache import (
    Fingerprint,
    Saved,
    fingerprint,
    load_prompt_cache,
    write_prefix,
)

_log = logging.getLogger(__name__)

PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
SUFFIX = ".slot"
# Those that have not been written for the longest time go first.
MOST_FILES = 64


class SlotFolder:
    """A folder of slots for one model.

    Args:
        path: is made where it is missing, for its owner alone.
        dtype: in which the model computes.
        made_with: finds what the files depend on; is called when one is first read or written.

    Raises:
        UsageError: it cannot be made, or is no folder.
    """

    def __init__(self, path: Path, dtype: mx.Dtype, made_with: Callable[[], Fingerprint]) -> None:
        try:
            path.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        except FileExistsError:
            raise UsageError(f"--slots {path}: is no folder") from None
        except OSError as error:
            raise UsageError(f"--slots {path}: cannot be made ({error.strerror})") from None
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise UsageError(f"--slots {path}: files in it cannot be read and written")
        self._path, self._dtype = path, dtype
        self._fingerprint = made_with
        self._made_with: Fingerprint | None = None

    def bring(self, key: str, form: CacheConfig, batch: Batch) -> None:
        """Have a batch keep what the slot of `key` has on disk, if it keeps nothing for it yet."""
        path, prefixes, model = self._file(key), batch.prefixes, batch.model
        if key in prefixes.names or not path.is_file():
            return
        try:
            if path.stat().st_size > prefixes.limit:
                raise ResourceError(f"{path}: is larger than the memory for prefixes")
            saved = load_prompt_cache(path, model.config, form, self._dtype, self._now())
            if saved.arithmetic != model.arithmetic:
                raise RejectedError(
                    f"{path}: was made with another --compute, --precision or --dtype"
                )
            caches = batch.new_caches(form)
            restore(caches, saved.layers, len(saved.tokens))
            prefixes.keep(saved.tokens, form, caches, key)
        except Exception as error:  # noqa: BLE001 - the prompt is computed instead
            _log.warning("a slot is not read: %s", error)
        prefixes.changed.discard(key)

    def save(self, batch: Batch) -> None:
        """Write the slots that keep something else than their files."""
        prefixes = batch.prefixes
        for key in sorted(prefixes.changed):
            prefixes.changed.discard(key)
            found = prefixes.named(key)
            if found is None:
                continue
            saved = Saved(found.ids, export(found.caches), batch.model.arithmetic)
            try:
                write_prefix(self._file(key), saved, found.form, self._now(), mode=PRIVATE_FILE)
                self._forget_old()
            except Exception as error:  # noqa: BLE001 - nobody waits for it
                _log.warning("a slot is not written: %s: %s", self._file(key), error)

    def _forget_old(self) -> None:
        kept = sorted(self._path.glob(f"*{SUFFIX}"), key=lambda each: each.stat().st_mtime_ns)
        for old in kept[:-MOST_FILES]:
            old.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
        return self._path / f"{digest[:40]}{SUFFIX}"

    def _now(self) -> Fingerprint:
        if self._made_with is None:
            self._made_with = self._fingerprint()
        return self._made_with


def slot_folder(path: Path, folder: ModelFolder, options: RunOptions) -> SlotFolder:
    """Slots of a model as it is run with `options`; see `SlotFolder`."""
    return SlotFolder(path, folder.number(options), lambda: fingerprint(folder.inventory))
