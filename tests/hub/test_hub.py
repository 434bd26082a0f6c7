"""The Hub: pinning, what is fetched, resuming, offline, errors, and headers by range request."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from apertus_mlx import hub
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.errors import (
    ApertusError,
    NotFoundError,
    RejectedError,
    ResourceError,
    UsageError,
)
from apertus_mlx.hub import remote_headers, snapshot
from apertus_mlx.hub import transfer as hub_transfer
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.hub.errors import seconds_to_wait
from apertus_mlx.hub.listing import list_files
from apertus_mlx.system.progress import Progress
from tests import hub_server
from tests.hub_server import CHUNK_BYTES, HubServer, Request, is_large, point_client_at, serving

REPO = "swiss-ai/Tiny"
ROOT = Path(__file__).parents[2]


def shard(names: list[str], size: int = 50_000, seed: int = 0) -> bytes:
    """A real safetensors file; random, so that no two parts of it are alike."""
    generator = np.random.default_rng(seed)
    tensors = {name: generator.integers(0, 2**15, size, dtype=np.int16) for name in names}
    return save(tensors, metadata={"format": "pt"})


def model_files(seed: int = 0) -> dict[str, bytes]:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = {"metadata": {}, "weight_map": {"a": first, "b": first, "c": second}}
    return {
        "config.json": b'{"model_type": "apertus", "seed": %d}' % seed,
        "generation_config.json": b'{"eos_token_id": [2, 68, 72]}',
        "tokenizer.json": b'{"version": "1.0"}' + b" " * 1000,
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "LICENSE": b"Apache",
        "README.md": b"# Tiny",
        "model.safetensors.index.json": json.dumps(index).encode(),
        first: shard(["a", "b"], seed=seed),
        second: shard(["c"], seed=seed + 1),
    }


UNWANTED = {
    "modeling_apertus.py": b"raise SystemExit",
    "pytorch_model.bin": b"\x80",
    "model.py": b"",
    "model-q4.gguf": b"GGUF",
    "adapter_model.safetensors": b"\0" * 10,
    "consolidated.safetensors": b"\0" * 10,
    "original/model.safetensors": b"\0" * 10,
    "original/config.json": b"{}",
    ".gitattributes": b"",
    "LICENSE.py": b"",
    "logo.png": b"",
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import close_session

    with serving() as server:
        point_client_at(server.endpoint, tmp_path / "home", monkeypatch)
        # The client waits between attempts; nothing here needs waiting for.
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        close_session()
        yield server
        close_session()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(action: Callable[[], object], kind: type[ApertusError], *words: str) -> str:
    """The message of the refusal, which is one line and holds the words."""
    with pytest.raises(ApertusError) as caught:
        action()
    message = str(caught.value)
    assert caught.value.exit_code == kind.exit_code and isinstance(caught.value, kind), message
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# --- which repository, which files


@pytest.mark.parametrize("text", ["swiss-ai/Apertus-8B-Instruct-2509", "a/b", "A_1/x.y-z"])
def test_repository_ids(text: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(text)
    assert hub.is_repo_id(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "a", "a/", "/a", "a/b/c", "./a", "../a", "a/..", "a b/c", "a/b--c", "a/b.git"),
        *("é/b", "a/b\n", "-a/b", "a/b-", "a/.b", "~/a", "a\\b", "a/" + "b" * 97, "https://x/y"),
    ],
)
def test_not_repository_ids(text: str) -> None:
    assert not hub.is_repo_id(text)
    refused(lambda: hub.resolve(text), UsageError, "organisation/name")


@pytest.mark.parametrize(
    "revision", ["", "../../x", "a b", "/etc", "a\0", "x" * 256, ".hidden", "a/.b", "a..b", "-x"]
)
def test_bad_revisions(server: HubServer, revision: str) -> None:
    refused(lambda: hub.resolve(REPO, revision=revision), UsageError, "--revision")
    assert not server.requests


def test_fetches_the_needed_files_of_one_commit(server: HubServer) -> None:
    commit = server.repository(REPO).commit({**model_files(), **UNWANTED})
    snapshot = hub.resolve(REPO)
    assert (snapshot.commit, snapshot.repo_id) == (commit, REPO)
    assert contents(snapshot.directory) == model_files()
    # Only the first question is about a branch; every file is asked for by commit.
    assert server.requests[0].path.startswith(f"/api/models/{REPO}/revision/main")
    resolved = [request.path for request in server.requests if "/resolve/" in request.path]
    assert resolved and all(f"/resolve/{commit}/" in path for path in resolved)
    names = {path.rsplit("/", 1)[1] for path in resolved}
    assert names == set(model_files())


def test_files_are_where_the_hub_client_looks_for_them(server: HubServer) -> None:
    from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache

    commit = server.repository(REPO).commit(model_files())
    directory = hub.resolve(REPO).directory
    for name in model_files():
        assert try_to_load_from_cache(REPO, name) == str(directory / name)
    (repository,) = scan_cache_dir(constants.HF_HUB_CACHE).repos
    (revision,) = repository.revisions
    assert revision.commit_hash == commit and revision.refs == {"main"}
    assert not list(directory.parent.parent.rglob("*.incomplete"))


def test_second_time_asks_one_question(server: HubServer) -> None:
    server.repository(REPO).commit(model_files())
    first = hub.resolve(REPO)
    server.requests.clear()
    assert hub.resolve(REPO) == first
    assert len(server.requests) == 1


def test_a_file_lost_from_the_cache_is_fetched_again(server: HubServer) -> None:
    server.repository(REPO).commit(model_files())
    directory = hub.resolve(REPO).directory
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (directory / name).resolve().unlink()
    refused(lambda: hub.resolve(REPO, offline=True), NotFoundError, "partly")
    assert contents(hub.resolve(REPO).directory) == model_files()


def test_revisions(server: HubServer) -> None:
    repository = server.repository(REPO)
    step = repository.commit(model_files(seed=5), branch="steps/1000")
    main = repository.commit(model_files())
    assert hub.resolve(REPO).commit == main
    by_branch = hub.resolve(REPO, revision="steps/1000")
    assert by_branch.commit == step
    assert contents(by_branch.directory) == model_files(seed=5)
    assert hub.resolve(REPO, revision=step) == by_branch
    assert hub.resolve(REPO, revision="steps/1000", offline=True) == by_branch


def test_a_branch_that_moves_meanwhile_does_not_mix(server: HubServer) -> None:
    repository = server.repository(REPO)
    old = repository.commit(model_files(seed=1))

    def move(request: Request) -> None:
        if request.path.startswith("/api/"):
            repository.commit(model_files(seed=7))

    server.after_request = move
    snapshot = hub.resolve(REPO)
    assert snapshot.commit == old
    assert contents(snapshot.directory) == model_files(seed=1)


def test_token_goes_to_the_hub_and_not_to_the_storage(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.token = "hf_secret"
    commit = server.repository(REPO).commit(model_files())
    hub.resolve(REPO)
    remote_headers.fetch_headers(REPO, commit)
    for request in server.requests:
        expected = None if request.path.startswith("/storage/") else "Bearer hf_secret"
        assert request.authorization == expected, request.path


def test_refuses_repositories_without_a_readable_model(server: HubServer) -> None:
    server.repository("a/pickle").commit({"config.json": b"{}", "pytorch_model.bin": b"\x80"})
    server.repository("a/data").commit({"README.md": b"", "data.csv": b""})
    refused(lambda: hub.resolve("a/pickle"), RejectedError, "safetensors")
    refused(lambda: hub.resolve("a/data"), RejectedError, "config.json")
    assert not any("/resolve/" in request.path for request in server.requests)


# --- interrupted downloads


def test_goes_on_where_the_connection_was_cut(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    # The client writes in pieces of 10 MB; what a cut leaves of a piece is lost.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK_BYTES)
    server.repository(REPO).commit(model_files())
    large_bytes = sum(len(content) for name, content in model_files().items() if is_large(name))
    weights = "model-00001-of-00002.safetensors"
    cut_bytes = 2 * CHUNK_BYTES

    def cut_then_fail(request: Request) -> int | None:
        # The first transfer of this shard is cut; then the Hub is away until told otherwise.
        if weights in request.path and request.method == "GET" and server.cut_after_bytes is None:
            if "cut" not in done:
                done.append("cut")
                server.cut_after_bytes = cut_bytes
                return None
            return 503
        return None

    done: list[str] = []
    server.status = cut_then_fail
    refused(lambda: hub.resolve(REPO), NotFoundError, REPO)
    sent_before = server.large_bytes_sent
    refused(lambda: hub.resolve(REPO, offline=True), NotFoundError, "not in the cache")

    server.status = lambda request: None
    server.requests.clear()
    snapshot = hub.resolve(REPO)
    assert contents(snapshot.directory) == model_files()
    resumed = [request.range for request in server.requests if request.range is not None]
    assert resumed[0] == f"bytes={cut_bytes}-"
    assert server.large_bytes_sent == large_bytes  # not a byte twice
    assert server.large_bytes_sent > sent_before > cut_bytes


def test_a_damaged_transfer_is_not_kept(server: HubServer) -> None:
    server.repository(REPO).commit(model_files())
    server.spoil_large_file = True
    refused(lambda: hub.resolve(REPO), NotFoundError, "SHA-256")
    assert contents(hub.resolve(REPO).directory) == model_files()


def another_page(name: str, content: bytes) -> bytes:
    return b"<html>login</html>" if name == "config.json" else content


def another_value(name: str, content: bytes) -> bytes:
    return content.replace(b'"seed": 0', b'"seed": 1') if name == "config.json" else content


@pytest.mark.parametrize("rewrite", [another_page, another_value])
def test_a_small_file_that_arrives_changed_is_not_kept(
    server: HubServer, rewrite: Callable[[str, bytes], bytes]
) -> None:
    server.repository(REPO).commit(model_files())
    server.rewrite = rewrite
    refused(lambda: hub.resolve(REPO), NotFoundError, "config.json")
    server.rewrite = lambda name, content: content
    assert contents(hub.resolve(REPO).directory) == model_files()


def test_what_the_client_fetches_by_itself_is_checked_too(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page in place of an answer also answers the client's own question for the hash."""
    server.repository(REPO).commit(model_files())
    honest = list_files(REPO)
    git_id = hub_server._git_id
    monkeypatch.setattr(hub_server, "_git_id", lambda content: git_id(content)[::-1])
    monkeypatch.setattr(snapshot, "list_files", lambda repo_id, revision: honest)
    asked = []

    def changed_the_second_time(name: str, content: bytes) -> bytes:
        asked.append(name)
        return content if asked.count(name) < 2 else another_value(name, content)

    server.rewrite = changed_the_second_time
    refused(lambda: hub.resolve(REPO), NotFoundError, "config.json", "SHA-1")
    server.rewrite = lambda name, content: content
    assert contents(hub.resolve(REPO).directory) == model_files()


def test_headers_refuse_a_config_that_arrives_changed(server: HubServer) -> None:
    commit = server.repository(REPO).commit(model_files())
    server.rewrite = another_value
    refused(lambda: remote_headers.fetch_headers(REPO, commit), NotFoundError, "config.json")


def test_a_file_cut_in_the_cache_is_fetched_again(server: HubServer) -> None:
    server.repository(REPO).commit(model_files())
    folder = hub.resolve(REPO).directory
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        blob = (folder / name).resolve()
        blob.write_bytes(blob.read_bytes()[:-7])
    assert contents(hub.resolve(REPO).directory) == model_files()


def test_a_partial_file_that_is_too_long_is_dropped(server: HubServer, tmp_path: Path) -> None:
    server.repository(REPO).commit(model_files())
    content = model_files()["model-00002-of-00002.safetensors"]
    blobs = tmp_path / "home/hub/models--swiss-ai--Tiny/blobs"
    blobs.mkdir(parents=True)
    name = f"{hashlib.sha256(content).hexdigest()}.incomplete"
    (blobs / name).write_bytes(b"x" * (len(content) + 1))
    assert contents(hub.resolve(REPO).directory) == model_files()


def test_resumes_on_a_server_that_ignores_ranges(server: HubServer, tmp_path: Path) -> None:
    server.repository(REPO).commit(model_files())
    content = model_files()["model-00002-of-00002.safetensors"]
    blobs = tmp_path / "home/hub/models--swiss-ai--Tiny/blobs"
    blobs.mkdir(parents=True)
    partial = blobs / f"{hashlib.sha256(content).hexdigest()}.incomplete"
    partial.write_bytes(content[:1000])
    server.ignore_range = True
    assert contents(hub.resolve(REPO).directory) == model_files()


def test_two_at_once_fetch_once(server: HubServer) -> None:
    server.repository(REPO).commit(model_files())
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(hub.resolve, [REPO, REPO])
    assert first == second and contents(first.directory) == model_files()
    large = [content for name, content in model_files().items() if is_large(name)]
    assert server.large_bytes_sent == sum(map(len, large))


# --- offline


def test_offline_uses_the_last_complete_download(server: HubServer) -> None:
    repository = server.repository(REPO)
    repository.commit(model_files())
    online = hub.resolve(REPO)
    repository.commit(model_files(seed=9))
    server.requests.clear()
    assert hub.resolve(REPO, offline=True) == online
    assert hub.resolve(REPO, revision=online.commit, offline=True) == online
    assert hub.locate(REPO, offline=True) == online.directory
    assert not server.requests


def test_offline_by_environment(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    server.repository(REPO).commit(model_files())
    online = hub.resolve(REPO)
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve(REPO) == online
    refused(lambda: hub.resolve("a/b"), NotFoundError, "offline")
    refused(lambda: remote_headers.fetch_headers(REPO, online.commit), NotFoundError, "OFFLINE")
    assert not server.requests


def test_offline_without_a_complete_copy(server: HubServer) -> None:
    server.repository(REPO).commit(model_files())
    how = "run once without --offline"
    refused(lambda: hub.resolve(REPO, offline=True), NotFoundError, REPO, "not in the cache", how)
    directory = hub.resolve(REPO).directory
    (directory / "model-00002-of-00002.safetensors").unlink()
    refused(lambda: hub.resolve(REPO, offline=True), NotFoundError, "partly", how)
    # Online the missing file comes back from the cache's blob.
    assert contents(hub.resolve(REPO).directory) == model_files()
    refused(lambda: hub.resolve(REPO, revision="other", offline=True), NotFoundError, "other")
    (directory.parent.parent / "refs/main").write_text("../../..")
    refused(lambda: hub.resolve(REPO, offline=True), NotFoundError, "not in the cache")


def test_a_fresh_process_reads_the_environment(server: HubServer, tmp_path: Path) -> None:
    server.repository(REPO).commit(model_files())
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(tmp_path / "other"),
        "NO_PROXY": "127.0.0.1,localhost",
    }
    environment.pop("HF_HUB_CACHE", None)
    code = f"from apertus_mlx import hub; print(hub.resolve({REPO!r}).directory)"

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**environment, **more},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    online = run()
    assert online.returncode == 0, online.stderr
    directory = Path(online.stdout.removesuffix("\n"))  # nothing else on stdout
    assert contents(directory) == model_files()
    assert directory.is_relative_to(tmp_path / "other")
    assert not online.stderr
    server.requests.clear()
    assert run(HF_HUB_OFFLINE="1").stdout == online.stdout
    assert not server.requests


# --- what can go wrong


@pytest.mark.parametrize("status", [429, 500, 502, 503])
@pytest.mark.parametrize("where", ["/api/", "config.json", "/storage/"])
def test_a_hub_that_fails(server: HubServer, status: int, where: str) -> None:
    server.repository(REPO).commit(model_files())
    server.status = lambda request: status if where in request.path else None
    message = refused(lambda: hub.resolve(REPO), NotFoundError, REPO, str(status))
    assert "--offline" not in message  # nothing is in the cache to go on with
    refused(lambda: hub.resolve(REPO, offline=True), NotFoundError)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that anybody wanted to wait; nobody does."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def failing(server: HubServer, times: int, status: int, where: str) -> None:
    """Let the first requests for something fail."""
    left = [status] * times

    def fail(request: Request) -> int | None:
        return left.pop() if where in request.path and left else None

    server.status = fail


# The answer to a request -> the seconds after which it is asked again.
WAITS = [
    (503, {"Retry-After": "7"}, 7),
    (429, {"Retry-After": "30"}, 30),
    (429, {"RateLimit": '"api";r=0;t=42'}, 42),
    (502, {}, 1),
    (500, {"Retry-After": "soon"}, 1),
    (503, {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, 1),
]


@pytest.mark.parametrize(("status", "headers", "seconds"), WAITS)
def test_asks_again_when_the_hub_says(
    server: HubServer, waits: list[float], status: int, headers: dict[str, str], seconds: float
) -> None:
    server.repository(REPO).commit(model_files())
    server.status_headers = headers
    failing(server, 1, status, "/api/models/")
    assert contents(hub.resolve(REPO).directory) == model_files()
    assert waits == [seconds]


@pytest.mark.parametrize("where", ["/api/models/", "config.json", "/storage/"])
def test_asks_a_few_times(server: HubServer, waits: list[float], where: str) -> None:
    server.repository(REPO).commit(model_files())
    failing(server, 3, 503, where)
    assert contents(hub.resolve(REPO).directory) == model_files()
    assert waits == [1, 2, 4]
    hub_commit = server.repository(REPO).branches["main"]
    failing(server, 3, 503, "config.json")
    assert remote_headers.fetch_headers(REPO, hub_commit).files["config.json"]


def test_does_not_wait_for_long(server: HubServer, waits: list[float]) -> None:
    server.repository(REPO).commit(model_files())
    server.status_headers = {"Retry-After": "600"}
    server.status = lambda request: 429
    refused(lambda: hub.resolve(REPO), NotFoundError, "HTTP 429", "wait 600 s")
    assert waits == [] and len(server.requests) == 1


def test_a_date_to_wait_for() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    assert 3500 < seconds_to_wait({"Retry-After": date}) <= 3600


def test_what_is_refused_for_good_is_asked_once(server: HubServer, waits: list[float]) -> None:
    server.status = lambda request: 403
    refused(lambda: hub.resolve(REPO), NotFoundError, "HTTP 403")
    assert waits == [] and len(server.requests) == 1


VARIANTS = {
    "model.fp16.safetensors": b"\0" * 10,
    "model.fp16-00001-of-00002.safetensors": b"\0" * 10,
    "model.safetensors.index.fp16.json": b"{}",
}


def test_variants_are_left_alone(server: HubServer) -> None:
    commit = server.repository(REPO).commit(model_files() | VARIANTS)
    assert contents(hub.resolve(REPO).directory) == model_files()
    assert set(remote_headers.fetch_headers(REPO, commit).headers) == {
        name for name in model_files() if name.endswith(".safetensors")
    }
    single = {"config.json": b"{}", "model.safetensors": shard(["a"])}
    server.repository(REPO).commit(single | VARIANTS, branch="single")
    assert contents(hub.resolve(REPO, revision="single").directory) == single


def test_a_failing_hub_points_to_the_cached_copy(server: HubServer) -> None:
    server.repository(REPO).commit(model_files())
    commit = hub.resolve(REPO).commit
    server.status = lambda request: 503
    refused(lambda: hub.resolve(REPO), NotFoundError, "503", "--offline", commit[:12])


def test_no_such_repository(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("'no/such'", "no such folder", "no such repository", "hf auth login")
    refused(lambda: hub.locate("no/such"), NotFoundError, *words)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    server.token = "hf_good"
    refused(lambda: hub.locate("no/such"), NotFoundError, *words)


def test_no_such_revision(server: HubServer) -> None:
    server.repository(REPO).commit(model_files())
    refused(lambda: hub.resolve(REPO, revision="gone"), NotFoundError, REPO, "'gone'")
    refused(lambda: hub.resolve(REPO, revision="0" * 40), NotFoundError, "0" * 40)


@pytest.mark.parametrize("token", [None, "hf_mine"])
def test_gated(server: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    repository = server.repository(REPO)
    commit = repository.commit(model_files())
    repository.gated = True
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
        server.token = token
    words = ("gated", "licence", f"{server.endpoint}/{REPO}", "hf auth login")
    refused(lambda: hub.resolve(REPO), NotFoundError, *words)
    refused(lambda: remote_headers.fetch_headers(REPO, commit), NotFoundError, *words)


def test_refused_token(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repository(REPO).commit(model_files())
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    message = refused(lambda: hub.resolve(REPO), NotFoundError, "token", "hf auth login")
    assert "hf_expired" not in message


def test_a_malformed_token_is_not_shown(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repository(REPO).commit(model_files())
    monkeypatch.setenv("HF_TOKEN", "hf_\x7fsecret")
    assert "secret" not in refused(lambda: hub.resolve(REPO), NotFoundError, "hf auth login")


def test_nobody_listens(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    point_client_at(f"http://127.0.0.1:{port}", tmp_path, monkeypatch)
    refused(lambda: hub.resolve(REPO), NotFoundError, "connection", "network")


def test_no_secure_connection(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server that answers TLS's first message in plain text.
    point_client_at(server.endpoint.replace("http:", "https:"), tmp_path, monkeypatch)
    refused(lambda: hub.resolve(REPO), NotFoundError, "secure connection")


@pytest.mark.parametrize("endpoint", ["nowhere", "ftp://127.0.0.1", "http://"])
def test_bad_endpoints(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    point_client_at(endpoint, tmp_path, monkeypatch)
    refused(lambda: hub.resolve(REPO), NotFoundError, endpoint)


def test_bad_proxy(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "nonsense://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY")
    refused(lambda: hub.resolve(REPO), NotFoundError, "proxy")


@pytest.mark.parametrize("where", ["/api/", "config.json", "/storage/"])
def test_a_hub_that_never_answers(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from huggingface_hub import constants, file_download

    server.repository(REPO).commit(model_files())
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    if hasattr(file_download, "_ETAG_RETRY_TIMEOUT"):
        monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", 0.1)
    server.stall = lambda request: where in request.path
    refused(lambda: hub.resolve(REPO), NotFoundError, "in time")


def test_something_else_answers(server: HubServer) -> None:
    # A captive portal: 200 and a page.
    server.status = lambda request: 200
    server.repository(REPO).commit(model_files())
    refused(lambda: hub.resolve(REPO), NotFoundError)


def test_disk_space_is_checked_before_anything_is_fetched(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    server.repository(REPO).commit(model_files())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    refused(lambda: hub.resolve(REPO), ResourceError, "to download", "free", "HF_HOME")
    assert not any("/resolve/" in request.path for request in server.requests)


def test_a_disk_that_fills_up(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from huggingface_hub import file_download

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    server.repository(REPO).commit(model_files())
    monkeypatch.setattr(file_download, "http_get", full)
    refused(lambda: hub.resolve(REPO), ResourceError, "disk is full")


def test_a_cache_that_is_a_file(server: HubServer, tmp_path: Path) -> None:
    server.repository(REPO).commit(model_files())
    (tmp_path / "home").write_text("")
    refused(lambda: hub.resolve(REPO), ResourceError, "HF_HOME")


def test_bugs_of_ours_are_not_explained_away(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise KeyError("a bug")

    server.repository(REPO).commit(model_files())
    monkeypatch.setattr(hub_transfer, "_download_file", broken)
    with pytest.raises(KeyError):
        hub.resolve(REPO)


# --- local folders


def test_local_folders(tmp_path: Path, server: HubServer) -> None:
    assert hub.locate(str(tmp_path)) == tmp_path
    refused(lambda: hub.locate(str(tmp_path), revision="main"), UsageError, "--revision")
    file = tmp_path / "model.safetensors"
    file.touch()
    refused(lambda: hub.locate(str(file)), UsageError, "file")
    assert hub.locate("embedded") == hub.locate(None) == model_dir()
    refused(lambda: hub.locate("embedded", revision="main"), UsageError, "--revision")
    for missing in (str(tmp_path / "x"), "./x/y", "no-such", "~nobody-here/x", "a\0b", "x" * 5000):
        refused(lambda source=missing: hub.locate(source), NotFoundError, "folder", "Hub")
    assert not server.requests


# --- progress


def test_progress_goes_to_the_callback_only(
    server: HubServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.repository(REPO).commit(model_files())
    seen: list[Progress] = []
    hub.resolve(REPO, progress=seen.append)
    total_bytes = sum(map(len, model_files().values()))
    assert seen[0] == Progress("downloading", 0, total_bytes, "bytes")
    assert seen[-1] == Progress("downloading", total_bytes, total_bytes, "bytes")
    assert capfd.readouterr() == ("", "")
    seen.clear()
    hub.resolve(REPO, progress=seen.append)
    assert not seen  # nothing to fetch, nothing to report


# --- headers by range request


def header_of(name: str, content: bytes) -> list[TensorInfo]:
    """The tensors of a weight file, in the order of their data."""
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    entries.pop("__metadata__", None)
    tensors = [
        TensorInfo(
            key, entry["dtype"], tuple(entry["shape"]), name, 8 + length + begin, end - begin
        )
        for key, entry in entries.items()
        for begin, end in [entry["data_offsets"]]
    ]
    return sorted(tensors, key=lambda tensor: tensor.offset)


def test_headers_equal_the_files_and_cost_little(server: HubServer) -> None:
    files = {**model_files(), **UNWANTED}
    files["model-00001-of-00002.safetensors"] = shard(["a", "b"], size=4_000_000)
    # More tensors than the first request covers.
    many = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2000)]
    files["model-00002-of-00002.safetensors"] = shard(many, size=1000)
    commit = server.repository(REPO).commit(files)
    remote = remote_headers.fetch_headers(REPO, commit)
    assert (remote.repo_id, remote.commit) == (REPO, commit)
    json_names = ("config.json", "generation_config.json", "model.safetensors.index.json")
    assert remote.files == {name: files[name] for name in json_names}
    assert set(remote.headers) == {name for name in model_files() if name[:6] == "model-"}
    for name, tensors in remote.headers.items():
        assert tensors == header_of(name, files[name])
    long_header = int.from_bytes(files["model-00002-of-00002.safetensors"][:8], "little")
    assert long_header > 64 * 2**10
    # 16 MB and 4 MB of weights: one first part each, and the rest of the long header.
    assert server.large_bytes_sent == 64 * 2**10 + 8 + long_header


def test_headers_of_a_branch_are_pinned(server: HubServer) -> None:
    repository = server.repository(REPO)
    commit = repository.commit(model_files())
    server.after_request = lambda request: (
        request.path.startswith("/api/") and repository.commit(model_files(seed=3))
    )
    remote = remote_headers.fetch_headers(REPO, "main")
    assert remote.commit == commit
    assert remote.files["config.json"] == model_files()["config.json"]


def test_a_server_that_ignores_ranges_is_not_read_to_the_end(server: HubServer) -> None:
    files = model_files()
    del files["model-00002-of-00002.safetensors"], files["model.safetensors.index.json"]
    size_bytes = 64 * 2**20
    content = shard(["a"], size=size_bytes // 2)
    files["model-00001-of-00002.safetensors"] = content
    commit = server.repository(REPO).commit(files)
    server.ignore_range = True
    ((name, tensors),) = remote_headers.fetch_headers(REPO, commit).headers.items()
    assert tensors == header_of(name, content)
    # What the sockets' buffers took before the connection was closed.
    assert server.large_bytes_sent < size_bytes / 4


def test_a_server_that_lies_about_ranges(server: HubServer) -> None:
    files = model_files()
    files["model-00002-of-00002.safetensors"] = shard([f"tensor{i}" for i in range(3000)], size=4)
    commit = server.repository(REPO).commit(files)
    server.lie_about_range = True
    refused(lambda: remote_headers.fetch_headers(REPO, commit), NotFoundError, "asked for bytes")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        (2**40).to_bytes(8, "little") + b"{}",
        (17 * 2**20).to_bytes(8, "little") + b" " * (17 * 2**20),
        (100).to_bytes(8, "little") + b"{}",
        b"version https://git-lfs.github.com/spec/v1\n",
        (2**64 - 1).to_bytes(8, "little") * 2,
    ],
    ids=["empty", "short", "huge", "over-the-cap", "past-the-end", "pointer", "overflow"],
)
def test_unsound_weight_files(server: HubServer, content: bytes) -> None:
    commit = server.repository(REPO).commit({**model_files(), "model-x.safetensors": content})
    refused(lambda: remote_headers.fetch_headers(REPO, commit), RejectedError, "model-x")
    assert server.large_bytes_sent < 2**20


def test_a_huge_config_is_not_fetched(server: HubServer) -> None:
    commit = server.repository(REPO).commit({**model_files(), "config.json": b" " * (2**24 + 1)})
    refused(lambda: remote_headers.fetch_headers(REPO, commit), RejectedError, "config.json")


def test_a_server_that_drips(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = server.repository(REPO).commit(model_files())
    monkeypatch.setattr(remote_headers, "_DEADLINE_S", -1.0)
    refused(lambda: remote_headers.fetch_headers(REPO, commit), NotFoundError, "slow")


@pytest.mark.parametrize("status", [429, 500])
def test_headers_from_a_hub_that_fails(server: HubServer, status: int) -> None:
    commit = server.repository(REPO).commit(model_files())
    server.status = lambda request: status if "/storage/" in request.path else None
    refused(lambda: remote_headers.fetch_headers(REPO, commit), NotFoundError, str(status))


def test_headers_when_the_connection_is_cut(server: HubServer) -> None:
    commit = server.repository(REPO).commit(model_files())
    server.cut_after_bytes = 100
    refused(lambda: remote_headers.fetch_headers(REPO, commit), NotFoundError, "connection")


def test_importing_is_cheap() -> None:
    code = (
        "import sys, apertus_mlx.hub, apertus_mlx.hub.remote_headers; "
        "print([name for name in sys.modules if name.split('.')[0] in "
        "('huggingface_hub', 'httpx', 'httpx2', 'mlx', 'numpy')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "[]\n", done.stderr
