"""A small local server that speaks the Hub's protocol, as far as its real client uses it.

Small files are served in place; large ones (weights, tokenizer.json) by a redirect to another
host name, as the Hub's storage does. Faults are injected by setting the server's attributes.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

CHUNK_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass(slots=True)
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Store a commit of these files, let `branch` point to it, and return its id."""
        text = json.dumps([len(self.commits), branch, sorted(files)])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def commit_folder(self, folder: Path, branch: str = "main") -> str:
        """Store a commit of all files below a folder."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return self.commit(
            {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}, branch
        )


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf")) or name == "tokenizer.json"


class HubServer(ThreadingHTTPServer):
    """Serves repositories, counts what it is asked and sends, and misbehaves when told to."""

    daemon_threads = True
    # A handler may be held by `stall`; closing must not wait for it.
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.large_bytes_sent = 0
        self.counting = threading.Lock()
        self.released = threading.Event()
        # Faults.
        self.cut_after_bytes: int | None = None  # once, in the next large file
        self.spoil_large_file = False  # once: the right length, a wrong byte
        self.rewrite: Callable[[str, bytes], bytes] = lambda path, content: content
        self.ignore_range = False
        self.lie_about_range = False
        self.status: Callable[[Request], int | None] = lambda request: None
        self.status_headers: dict[str, str] = {}  # beside such a status
        self.stall: Callable[[Request], bool] = lambda request: False
        self.after_request: Callable[[Request], None] = lambda request: None
        self.token: str | None = None  # the only one accepted

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        return f"http://localhost:{self.server_port}"

    def repository(self, repo_id: str) -> Repository:
        return self.repositories.setdefault(repo_id, Repository())

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave early are part of the tests; say nothing."""


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server
        request = Request(
            self.command, self.path, self.headers["Range"], self.headers["Authorization"]
        )
        # Some client versions have questions of their own; the log keeps those about repositories.
        if not self.path.startswith("/api/") or self.path.startswith("/api/models/"):
            hub.requests.append(request)
        if hub.stall(request):
            hub.released.wait(30)
            self.close_connection = True
            return
        status = hub.status(request)
        if status is not None:
            self._send(status, b'{"error": "injected"}', hub.status_headers)
        else:
            self._route([unquote(part) for part in urlsplit(self.path).path.split("/")[1:]])
        hub.after_request(request)

    def _route(self, parts: list[str]) -> None:
        match parts:
            case ["api", "models", organisation, name]:
                self._info(f"{organisation}/{name}", "main")
            case ["api", "models", organisation, name, "revision", revision]:
                self._info(f"{organisation}/{name}", revision)
            case [organisation, name, "resolve", revision, *path] if path:
                self._file(f"{organisation}/{name}", revision, "/".join(path))
            case ["storage", sha256] if sha256 in self.server.blobs:
                self._content(self.server.blobs[sha256], {"ETag": f'"{sha256}"'}, large=True)
            case _:
                self._send(404, b"")

    def _find(self, repo_id: str, revision: str) -> str | None:
        """The commit, or None after an error has been sent."""
        hub = self.server
        authorization = self.headers["Authorization"]
        if authorization is not None and authorization != f"Bearer {hub.token}":
            message = "Invalid credentials in Authorization header"
            self._send(401, b"", {"X-Error-Message": message})
            return None
        repository = hub.repositories.get(repo_id)
        if repository is None:
            # The Hub does not tell an anonymous client whether a private repository exists.
            status = 401 if authorization is None else 404
            self._send(status, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit

    def _info(self, repo_id: str, revision: str) -> None:
        commit = self._find(repo_id, revision)
        if commit is None:
            return
        siblings = []
        for name, content in self.server.repositories[repo_id].commits[commit].items():
            sibling: dict[str, object] = {
                "rfilename": name,
                "size": len(content),
                "blobId": _git_id(content),
            }
            if is_large(name):
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        answer = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        commit = self._find(repo_id, revision)
        if commit is None:
            return
        repository = self.server.repositories[repo_id]
        if repository.gated:
            status = 401 if self.headers["Authorization"] is None else 403
            self._send(status, b"", {"X-Error-Code": "GatedRepo"})
            return
        content = repository.commits[commit].get(name)
        told = content
        if content is not None and self.command == "GET":
            content = self.server.rewrite(name, content)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if content is None:
            self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        elif is_large(name):
            sha256 = hashlib.sha256(content).hexdigest()
            self.server.blobs[sha256] = content
            headers["X-Linked-ETag"] = f'"{sha256}"'
            headers["X-Linked-Size"] = str(len(content))
            headers["Location"] = f"{self.server.storage}/storage/{sha256}"
            self._send(302, b"", headers)
        else:
            headers["ETag"] = f'"{_git_id(told or content)}"'
            self._content(content, headers, large=False)

    def _content(self, content: bytes, headers: dict[str, str], *, large: bool) -> None:
        hub = self.server
        status = 200
        wanted = self.headers["Range"]
        part = content
        if wanted is not None and not hub.ignore_range:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
            if start >= len(content):
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            if hub.lie_about_range:
                start, stop = 0, stop - start
            part, status = content[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        if large and hub.spoil_large_file and self.command == "GET":
            hub.spoil_large_file = False
            part = part[:-1] + bytes([part[-1] ^ 1])
        self._send(status, part, headers, large=large)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        large: bool = False,
    ) -> None:
        hub = self.server
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if large and hub.cut_after_bytes is not None:
            body, hub.cut_after_bytes = body[: hub.cut_after_bytes], None
            self.close_connection = True
        for start in range(0, len(body), CHUNK_BYTES):
            chunk = body[start : start + CHUNK_BYTES]
            if large:  # counted first: a client may look as soon as it has the bytes
                with hub.counting:
                    hub.large_bytes_sent += len(chunk)
            self.wfile.write(chunk)


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving() -> Iterator[HubServer]:
    """Run a server in a thread until the block ends."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def point_client_at(endpoint: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Hub client of this process use `endpoint`, an own cache, and no token.

    For a subprocess set HF_ENDPOINT and HF_HOME instead: the client reads them at import.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
