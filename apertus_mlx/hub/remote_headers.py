"""What a Hub checkpoint says about itself, by range requests: JSON files and safetensors headers.

Fetches kilobytes where the checkpoint has gigabytes.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from apertus_mlx.checkpoint import header
from apertus_mlx.checkpoint.config import CONFIG_FILE, ModelConfig, parse_config
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.inventory import Inventory, match_inventory
from apertus_mlx.checkpoint.tensors import INDEX_FILE, Checkpoint, merge_headers, read_weight_map
from apertus_mlx.errors import RejectedError
from apertus_mlx.hub.errors import UnreachableError
from apertus_mlx.hub.listing import Listing, RemoteFile, is_weights, list_files
from apertus_mlx.hub.patience import patiently
from apertus_mlx.system.strict_json import parse_object

_JSON_NAMES = ("config.json", "generation_config.json", "model.safetensors.index.json")
_LENGTH_BYTES = 8
# One request is enough for the header of nearly every shard.
_FIRST_BYTES = 64 * 2**10
_READ_BYTES = 16 * 2**10
_WORKERS = 8
_DEADLINE_S = 60.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RemoteCheckpoint:
    """A commit's small JSON files and the tensors of each of its weight files, by name."""

    repo_id: str
    commit: str
    files: dict[str, bytes]
    headers: dict[str, list[TensorInfo]]

    def config(self) -> ModelConfig:
        """What `config.json` says.

        Raises:
            RejectedError: there is none, or it is damaged or unsupported.
        """
        name = f"{self.repo_id}: {CONFIG_FILE}"
        if CONFIG_FILE not in self.files:
            raise RejectedError(f"{self.repo_id}: no {CONFIG_FILE}; not a model repository")
        return parse_config(parse_object(self.files[CONFIG_FILE], name), name)

    def checkpoint(self) -> Checkpoint:
        """The tensors by name, as `open_checkpoint` finds them in a folder.

        Raises:
            RejectedError: the index is damaged, or headers and index disagree.
        """
        name, headers, weight_map = self.repo_id, self.headers, None
        if INDEX_FILE in self.files:
            where = f"{name}: {INDEX_FILE}"
            weight_map = read_weight_map(parse_object(self.files[INDEX_FILE], where), where)
            headers = {file: headers[file] for file in sorted({*weight_map.values()} & {*headers})}
        return Checkpoint(name, tuple(headers), merge_headers(headers, weight_map, name), None)

    def inventory(self) -> Inventory:
        """The inventory, as `take_inventory` makes it of a folder.

        A stored head that the config ties is taken to equal the embedding, and xIELU's constants
        to be sound: only the weights can show either.

        Raises:
            RejectedError: see `config`, `checkpoint` and `match_inventory`.
        """
        return match_inventory(self.config(), self.checkpoint())


def fetch_headers(repo_id: str, commit: str) -> RemoteCheckpoint:
    """Read the JSON files and safetensors headers of a repository at a commit.

    Raises:
        NotFoundError: as for `hub.resolve`; also a server that cannot send a part of a file.
        RejectedError: a weight file is too short, or its header is damaged or beyond 16 MiB.
    """
    listing = list_files(repo_id, commit)
    json_files = [file for file in listing.files if file.name in _JSON_NAMES]
    weights = [file for file in listing.files if is_weights(file.name)]

    def ask(fetch: Callable[[Listing, RemoteFile], T], file: RemoteFile) -> T:
        return patiently(repo_id, commit, lambda: fetch(listing, file))

    with ThreadPoolExecutor(_WORKERS) as pool:
        files = list(pool.map(lambda file: ask(_fetch_json, file), json_files))
        headers = list(pool.map(lambda file: ask(_fetch_header, file), weights))
    return RemoteCheckpoint(
        repo_id=repo_id,
        commit=listing.commit,
        files={file.name: content for file, content in zip(json_files, files, strict=True)},
        headers={file.name: tensors for file, tensors in zip(weights, headers, strict=True)},
    )


def _fetch_json(listing: Listing, file: RemoteFile) -> bytes:
    if file.size_bytes > header.MAX_HEADER_BYTES:
        raise RejectedError(
            f"{listing.repo_id}: {file.name} has {file.size_bytes} bytes, more than 16 MiB"
        )
    content = _fetch_range(listing, file, 0, file.size_bytes)
    if not file.describes(io.BytesIO(content)):
        raise UnreachableError(
            f"{listing.repo_id}: {file.name} arrived damaged (its hash differs); try again"
        )
    return content


def _fetch_header(listing: Listing, file: RemoteFile) -> list[TensorInfo]:
    where = f"{listing.repo_id}: {file.name}"
    start = _fetch_range(listing, file, 0, min(_FIRST_BYTES, file.size_bytes))
    stop = _LENGTH_BYTES + header.header_length(start, file.size_bytes, where)
    start += _fetch_range(listing, file, len(start), stop)
    return header.parse_header(start[_LENGTH_BYTES:stop], file.size_bytes, file.name, where)


def _fetch_range(listing: Listing, file: RemoteFile, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a file; from a server without ranges, what leads up to them."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    if stop <= start:
        return b""
    where = f"{listing.repo_id}: {file.name}"
    deadline_s = time.monotonic() + _DEADLINE_S
    url, headers = listing.request(file)
    headers["Range"] = f"bytes={start}-{stop - 1}"
    content = bytearray()
    with get_session().stream(
        "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    ) as response:
        hf_raise_for_status(response)
        is_part = response.status_code == 206
        sent = response.headers.get("Content-Range", "")
        if is_part and sent != f"bytes {start}-{stop - 1}/{file.size_bytes}":
            raise UnreachableError(
                f"{where}: asked for bytes {start}-{stop - 1} of {file.size_bytes}, "
                f"got {sent!r}; try again"
            )
        skip = 0 if is_part else start
        # Never more than asked for: leaving the block closes the connection on the rest.
        for chunk in response.iter_raw(_READ_BYTES):
            content += chunk
            if len(content) >= skip + stop - start:
                break
            if time.monotonic() > deadline_s:
                raise UnreachableError(
                    f"{where}: {len(content)} bytes in {_DEADLINE_S:.0f} s is too slow; try again"
                )
    wanted = bytes(content[skip : skip + stop - start])
    if len(wanted) != stop - start:
        raise UnreachableError(f"{where}: got {len(wanted)} of {stop - start} bytes; try again")
    return wanted
