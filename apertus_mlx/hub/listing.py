"""What a Hub repository holds at a commit, reduced to the files we need.

Owns the form of repository ids and revisions, and which file names are needed.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from apertus_mlx.checkpoint.tensors import without_variants
from apertus_mlx.errors import UsageError
from apertus_mlx.hub.errors import not_the_hub
from apertus_mlx.hub.patience import patiently

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_NAMES = frozenset(
    {
        "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "merges.txt", "chat_template.jinja", "chat_template.json", "README.md",
    }
)  # fmt: skip
_WEIGHTS = re.compile(r"model[A-Za-z0-9._-]*\.safetensors")
_LICENSE = re.compile(r"LICEN[CS]E[A-Za-z0-9_-]*(\.md|\.txt)?")
_REPO_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?!.*(?:--|\.\.)){_REPO_PART}/{_REPO_PART}(?<!\.git)")
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
    # What git calls the content: of a file with a `sha256`, that of the pointer to it.
    blob_id: str

    @property
    def digest(self) -> str:
        """What names the content, and the file in the client's cache."""
        return self.sha256 or self.blob_id

    def describes(self, file: BinaryIO) -> bool:
        """Whether the rest of `file` is this content, by its length and hash."""
        if self.sha256:
            hashed = hashlib.sha256()
        else:  # git's own name of the content
            hashed = hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)
        length = 0
        while block := file.read(2**20):
            hashed.update(block)
            length += len(block)
        return length == self.size_bytes and hashed.hexdigest() == self.digest


@dataclass(frozen=True, slots=True)
class Listing:
    """The needed files of a repository at one commit, small ones first, weights last."""

    repo_id: str
    commit: str
    files: tuple[RemoteFile, ...]

    def request(self, file: RemoteFile) -> tuple[str, dict[str, str]]:
        """The address of a file, and headers that ask for it as it is, so that it can be cut."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(self.repo_id, file.name, revision=self.commit, endpoint=constants.ENDPOINT)
        return url, {**build_hf_headers(library_name="apertus-mlx"), "Accept-Encoding": "identity"}


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form `organisation/name` that the Hub allows."""
    return _REPO_ID.fullmatch(text) is not None


def size_of(path: Path) -> int:
    """Bytes of a file in the cache; -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


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
    api = HfApi(endpoint=constants.ENDPOINT, library_name="apertus-mlx")

    def ask() -> ModelInfo:
        try:
            return api.model_info(
                repo_id,
                revision=wanted,
                files_metadata=True,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )
        except (LookupError, TypeError, AttributeError, JSONDecodeError) as error:
            raise not_the_hub(repo_id) from error

    info = patiently(repo_id, wanted, ask)
    commit = info.sha or ""
    if not COMMIT.fullmatch(commit):
        raise not_the_hub(repo_id)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    weights = without_variants(filter(is_weights, siblings))
    files = []
    for name, sibling in siblings.items():
        if name not in _NAMES and name not in weights and not _LICENSE.fullmatch(name):
            continue
        sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
        if sibling.size is None or not _is_digest(sha256, sibling.blob_id):
            raise not_the_hub(repo_id)
        files.append(RemoteFile(name, sibling.size, sha256, sibling.blob_id or ""))
    files.sort(key=lambda file: (is_weights(file.name), file.name))
    return Listing(repo_id, commit, tuple(files))


def _is_digest(sha256: str | None, blob_id: str | None) -> bool:
    if sha256 is not None:
        return _SHA256.fullmatch(sha256) is not None
    return blob_id is not None and COMMIT.fullmatch(blob_id) is not None
