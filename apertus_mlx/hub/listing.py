"""What a Hub repository holds at a commit, reduced to the files we need.

Owns the form of repository ids and revisions, and which file names are needed.
`huggingface_hub` is imported inside the function that asks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from json import JSONDecodeError

from apertus_mlx.errors import UsageError
from apertus_mlx.hub.errors import explained, not_the_hub

_NAMES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "README.md",
    }
)
_WEIGHTS = re.compile(r"model[A-Za-z0-9._-]*\.safetensors")
_LICENSE = re.compile(r"LICEN[CS]E[A-Za-z0-9_-]*(\.md|\.txt)?")
_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What a git reference may not hold (git-check-ref-format); also what keeps it a name in the cache.
_BAD_REVISION = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|^[/.-]|[/.]$|/\.")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One needed file of a commit; `sha256` is None for files that git itself stores."""

    name: str
    size_bytes: int
    sha256: str | None
    blob_id: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The needed files of a repository at one commit, small ones first, weights last."""

    repo_id: str
    commit: str
    files: tuple[RemoteFile, ...]


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form `organisation/name` that the Hub allows."""
    parts = text.split("/")
    return (
        len(parts) == 2
        and all(_REPO_PART.fullmatch(part) for part in parts)
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
    )


def is_weights(name: str) -> bool:
    """Whether a repository's file holds the model's weights (no adapters, no subfolders)."""
    return _WEIGHTS.fullmatch(name) is not None


def check_request(repo_id: str, revision: str | None) -> None:
    """Refuse a malformed repository id or revision (UsageError) before anything is asked."""
    if not is_repo_id(repo_id):
        raise UsageError(f"{repo_id!r}: not a Hub repository id (organisation/name)")
    if revision is not None and (
        not 0 < len(revision) <= 255 or _BAD_REVISION.search(revision) is not None
    ):
        raise UsageError(f"--revision {revision!r}: not a branch, tag or commit name")


def list_files(repo_id: str, revision: str | None = None) -> Listing:
    """Ask the Hub for the commit behind `revision` and that commit's needed files.

    Raises:
        NotFoundError: as for `resolve`.
        UsageError: a malformed repository id or revision.
    """
    from huggingface_hub import HfApi, constants

    check_request(repo_id, revision)
    wanted = revision or "main"
    with explained(repo_id, wanted):
        api = HfApi(endpoint=constants.ENDPOINT, library_name="apertus-mlx")
        try:
            info = api.model_info(
                repo_id,
                revision=wanted,
                files_metadata=True,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )
        except (LookupError, TypeError, AttributeError, JSONDecodeError) as error:
            raise not_the_hub(repo_id) from error
    commit = info.sha or ""
    if not COMMIT.fullmatch(commit):
        raise not_the_hub(repo_id)
    files = []
    for sibling in info.siblings or ():
        name = sibling.rfilename
        if name not in _NAMES and not is_weights(name) and not _LICENSE.fullmatch(name):
            continue
        sha256 = sibling.lfs.sha256 if sibling.lfs is not None else ""
        files.append(
            RemoteFile(
                name=name,
                size_bytes=sibling.size or 0,
                sha256=sha256 if _SHA256.fullmatch(sha256) else None,
                blob_id=sibling.blob_id or "",
            )
        )
    files.sort(key=lambda file: (is_weights(file.name), file.name))
    return Listing(repo_id, commit, tuple(files))
