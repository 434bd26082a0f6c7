"""Fetches the files of a commit into the Hub client's cache: resumable, checked, reported.

Files lie where the client itself would put them, in its documented layout.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from apertus_mlx.errors import ResourceError
from apertus_mlx.hub.errors import UnreachableError, explained
from apertus_mlx.hub.listing import Listing, RemoteFile, size_of
from apertus_mlx.hub.patience import patiently
from apertus_mlx.system.progress import OnProgress, Progress
from apertus_mlx.system.sizes import format_bytes

_PERIOD_S = 0.5
# The Hub serves no larger file by plain HTTP; those go through the client's own protocol.
_HTTP_LIMIT_BYTES = 50 * 10**9
_SPARE_BYTES = 64 * 2**20


def download(
    folder: Path,
    listing: Listing,
    files: tuple[RemoteFile, ...],
    progress: OnProgress | None,
) -> None:
    """Fetch `files` of a commit into `folder`, the repository's folder in the cache.

    Args:
        folder: `models--organisation--name` in the Hub client's cache.
        listing: The commit that the files belong to.
        files: What to fetch, in this order.
        progress: See `hub.resolve`.

    Raises:
        NotFoundError: no access, or the connection fails; running again goes on from there.
        ResourceError: too little room, or the cache cannot be written.
    """
    repo_id = listing.repo_id
    with explained(repo_id, listing.commit):
        _check_disk_space(folder, repo_id, files)
        with _reported(folder, files, progress):
            for file in files:
                fetch = partial(_download_file, folder, listing, file)
                patiently(repo_id, listing.commit, fetch)


def _download_file(folder: Path, listing: Listing, file: RemoteFile) -> None:
    from huggingface_hub import constants, hf_hub_download

    linked = folder / "snapshots" / listing.commit / file.name
    if size_of(linked) not in (-1, file.size_bytes):
        linked.unlink()  # the client would take it as it is
    if file.size_bytes <= _HTTP_LIMIT_BYTES:
        _download_blob(folder, listing, file)
    # Finds the blob just fetched and links it into the snapshot.
    hf_hub_download(
        listing.repo_id,
        file.name,
        revision=listing.commit,
        endpoint=constants.ENDPOINT,
        cache_dir=folder.parent,
        library_name="apertus-mlx",
        etag_timeout=constants.HF_HUB_ETAG_TIMEOUT,
    )
    blob = linked.resolve()
    if blob != (folder / "blobs" / file.digest).resolve():
        # The answer to the client's own question names another content, as a login page does.
        with blob.open("rb") as stream:
            intact = file.describes(stream)
        if not intact:
            linked.unlink()
            blob.unlink(missing_ok=True)
            raise _damaged(listing, file)


def _damaged(listing: Listing, file: RemoteFile) -> UnreachableError:
    kind = "SHA-256" if file.sha256 else "git's SHA-1"
    return UnreachableError(
        f"{listing.repo_id}: {file.name} arrived damaged ({kind} differs); try again"
    )


def _download_blob(folder: Path, listing: Listing, file: RemoteFile) -> None:
    """Fetch a file into the cache, resuming a partial one, and check its size and hash.

    Since 2.0 `hf_hub_download` discards what an interrupted run has fetched; its own transfer
    function still resumes, so that one is called here.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    blob = folder / "blobs" / file.digest
    unfinished = blob.with_name(f"{file.digest}.incomplete")
    lock = folder.parent / ".locks" / folder.name / f"{file.digest}.lock"
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if size_of(blob) == file.size_bytes:
            return
        if size_of(unfinished) > file.size_bytes:
            unfinished.unlink()
        resumed = unfinished.exists()
        # What was there may be no beginning of the file: a page of a proxy, say.
        intact = _fetch(unfinished, listing, file)
        if not intact and not (resumed and _fetch(unfinished, listing, file)):
            raise _damaged(listing, file)
        unfinished.replace(blob)


def _fetch(unfinished: Path, listing: Listing, file: RemoteFile) -> bool:
    """Append what is lacking of `file`; return if it is intact, else `unfinished` is removed."""
    from huggingface_hub.file_download import http_get

    url, headers = listing.request(file)
    with unfinished.open("ab") as stream:
        http_get(
            url,
            stream,
            resume_size=stream.tell(),
            headers=headers,
            expected_size=file.size_bytes,
            displayed_filename=file.name,
        )
    with unfinished.open("rb") as stream:
        intact = file.describes(stream)
    if not intact:
        unfinished.unlink()
    return intact


def _check_disk_space(folder: Path, repo_id: str, files: tuple[RemoteFile, ...]) -> None:
    needed_bytes = sum(file.size_bytes for file in files) - _bytes_on_disk(folder, files)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes + _SPARE_BYTES > free_bytes:
        raise ResourceError(
            f"{repo_id}: {format_bytes(needed_bytes)} to download but {format_bytes(free_bytes)} "
            f"free in {existing}; free some space or set HF_HOME to another disk"
        )


def _bytes_on_disk(folder: Path, files: tuple[RemoteFile, ...]) -> int:
    total_bytes = 0
    for file in files:
        blob = folder / "blobs" / file.digest
        found_bytes = max(size_of(blob), size_of(blob.with_name(f"{blob.name}.incomplete")), 0)
        total_bytes += min(found_bytes, file.size_bytes)
    return total_bytes


@contextmanager
def _reported(
    folder: Path, files: tuple[RemoteFile, ...], progress: OnProgress | None
) -> Iterator[None]:
    """Report bytes on disk while the body runs, instead of the client's own bars."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    report = progress or (lambda _: None)
    total_bytes = sum(file.size_bytes for file in files)
    finished = threading.Event()

    def measure() -> None:
        report(Progress("downloading", _bytes_on_disk(folder, files), total_bytes, "bytes"))

    def watch() -> None:
        while not finished.wait(_PERIOD_S):
            measure()

    had_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    watcher = threading.Thread(target=watch, daemon=True)
    measure()
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
        if had_bars:
            enable_progress_bars()
    report(Progress("downloading", total_bytes, total_bytes, "bytes"))
