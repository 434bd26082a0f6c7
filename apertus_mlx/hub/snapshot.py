"""Repository id to pinned folder: resolve to a commit, fetch what is needed, or use the cache."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from apertus_mlx.checkpoint.tensors import INDEX_FILE, read_weight_map
from apertus_mlx.errors import NotFoundError, RejectedError, UsageError
from apertus_mlx.hub.demo import NAME, model_dir
from apertus_mlx.hub.errors import UnreachableError
from apertus_mlx.hub.listing import (
    COMMIT,
    Listing,
    check_request,
    is_repo_id,
    is_weights,
    list_files,
    size_of,
)
from apertus_mlx.hub.transfer import download
from apertus_mlx.system.model_files import exists, read_file
from apertus_mlx.system.progress import OnProgress
from apertus_mlx.system.strict_json import read_object
from apertus_mlx.system.whole_file import whole_file

MAX_REF_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A complete folder of one commit."""

    directory: Path
    repo_id: str
    commit: str


def locate(
    source: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    offline: bool = False,
    progress: OnProgress | None = None,
) -> Path:
    """The folder that `source` means: a local one as it is, else the Hub's.

    None is the embedded model, and so is its name where no folder has it.

    For the arguments see `resolve`.

    Raises:
        NotFoundError: neither a folder nor a repository that can be reached.
        UsageError: a file instead of a folder, or `revision` for a local folder.
    """
    if source is None:
        logging.getLogger("apertus_mlx").info(
            "using the small demonstration model in the package, since no other is named"
        )
        return model_dir()
    if not os.fspath(source):
        raise UsageError("the model's name is empty; leave it out for the embedded model")
    try:
        folder = Path(source).expanduser()
        exists, is_folder = folder.exists(), folder.is_dir()
    except (OSError, RuntimeError, ValueError):  # no such home, too long, no such path at all
        exists = is_folder = False
    if is_folder or (source == NAME and not exists):
        if revision is not None:
            raise UsageError(
                f"{source}: --revision is for Hub repositories, this is a local folder"
            )
        return folder if is_folder else model_dir()
    if exists:
        raise UsageError(f"{source}: is a file; give the folder that holds config.json")
    if not isinstance(source, str) or not is_repo_id(source):
        raise NotFoundError(
            f"{str(source)!r}: no such folder, and not a Hub repository id (organisation/name)"
        )
    return resolve(source, revision=revision, offline=offline, progress=progress).directory


def resolve(
    source: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    progress: OnProgress | None = None,
) -> Snapshot:
    """Pin a repository to a commit and return the folder of that commit's needed files.

    The revision becomes a commit first and every file is asked for by that commit, so a branch
    that moves meanwhile cannot mix two versions. An interrupted download goes on where it stopped.

    Args:
        source: Repository id, `organisation/name`.
        revision: Branch, tag or full commit; the main branch if None.
        offline: Use only the cache: the commit this revision had at the last complete download.
        progress: Called about twice a second while bytes arrive, from another thread.

    Raises:
        NotFoundError: no such repository or revision, no access, not reachable, not in the cache.
        RejectedError: the repository holds no safetensors model.
        ResourceError: the disk has too little room or cannot be written.
        UsageError: a malformed repository id or revision.
    """
    from huggingface_hub import constants

    check_request(source, revision)
    wanted = revision or "main"
    folder = Path(constants.HF_HUB_CACHE).expanduser() / f"models--{source.replace('/', '--')}"
    if offline or constants.HF_HUB_OFFLINE:
        return _from_cache(folder, source, wanted)
    try:
        listing = list_files(source, wanted)
        _check_is_model(listing)
        snapshot = folder / "snapshots" / listing.commit
        missing = tuple(
            file for file in listing.files if size_of(snapshot / file.name) != file.size_bytes
        )
        if missing:
            download(folder, listing, missing, progress)
    except UnreachableError as error:
        try:
            cached = _from_cache(folder, source, wanted).commit[:12]
        except NotFoundError:
            raise error from error.__cause__
        raise UnreachableError(f"{error}; --offline uses the cached commit {cached}") from error
    _record_ref(folder, wanted, listing.commit)
    return Snapshot(snapshot, source, listing.commit)


def _check_is_model(listing: Listing) -> None:
    names = {file.name for file in listing.files}
    where = f"{listing.repo_id} at {listing.commit[:12]}"
    if "config.json" not in names:
        raise RejectedError(f"{where}: no config.json, so not a model we can read")
    if not any(is_weights(name) for name in names):
        raise RejectedError(
            f"{where}: no model*.safetensors; other weight formats are not read, "
            "ask for a revision or repository with safetensors"
        )


def _from_cache(folder: Path, repo_id: str, revision: str) -> Snapshot:
    commit = revision
    if not COMMIT.fullmatch(revision):
        try:
            commit = read_file(folder / "refs" / revision, MAX_REF_BYTES).decode().strip()
        except (RejectedError, UnicodeDecodeError):
            commit = ""
    snapshot = folder / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not snapshot.is_dir():
        lack = "is not in the cache"
    elif not is_complete(snapshot):
        lack = "is only partly in the cache"
    else:
        return Snapshot(snapshot, repo_id, commit)
    raise NotFoundError(
        f"{repo_id} (revision {revision}) {lack} and this is offline; "
        "run once without --offline and HF_HUB_OFFLINE to download it"
    )


def is_complete(snapshot: Path) -> bool:
    """Whether a snapshot in the cache has its config and all of its weights."""
    # Weights are fetched last, so complete weights mean a complete download of ours.
    if not (snapshot / "config.json").exists():
        return False
    index = snapshot / INDEX_FILE
    if not index.exists():
        return any(is_weights(path.name) and path.exists() for path in snapshot.iterdir())
    try:
        shards = set(read_weight_map(read_object(index), str(index)).values())
    except RejectedError:
        return True  # a damaged index is the checkpoint reader's to report
    return all(not is_weights(name) or (snapshot / name).exists() for name in shards)


def _record_ref(folder: Path, revision: str, commit: str) -> None:
    # Written only once the snapshot is complete: this is what --offline goes by.
    if revision == commit:
        return
    ref = folder / "refs" / revision
    with suppress(OSError, RejectedError):  # a read-only cache still serves
        if exists(ref) and read_file(ref, MAX_REF_BYTES) == commit.encode():
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(ref, durable=False) as unfinished:
            unfinished.write_text(commit, encoding="utf-8")
