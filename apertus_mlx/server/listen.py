"""Listens on a port and serves an application until a signal ends it."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from apertus_mlx.errors import NotFoundError, UsageError
from apertus_mlx.server.engine import Engine
from apertus_mlx.server.errors import busy
from apertus_mlx.server.options import ServeOptions
from apertus_mlx.server.patience import PatientProtocol
from apertus_mlx.server.security import Access, Application, is_loopback
from apertus_mlx.system.model_files import read_own_file

_log = logging.getLogger(__name__)
KEY_VARIABLE = "APERTUS_MLX_API_KEY"
# Connections beyond these are answered 503 by uvicorn itself.
MOST_CONNECTIONS = 4096
MAX_HEADER_BYTES = 64 * 2**10
MAX_KEY_BYTES = 4096


def _raise_file_limit() -> None:
    """Each connection is a file; systems begin with few, and allow more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST_CONNECTIONS
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound, before anything takes long.

    Raises:
        UsageError: the port is taken, or the address is none of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host[:100]}: no address of this machine ({error})") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"--port {port}: is in use already; take another one") from None
        if error.errno == errno.EACCES:
            raise UsageError(
                f"--port {port}: not allowed to this user ({error.strerror})"
            ) from None
        raise UsageError(f"--host {host[:100]}: cannot be listened on ({error.strerror})") from None
    found.set_inheritable(False)
    return found


def read_access(options: ServeOptions) -> Access:
    """Who may ask, by the options and the environment.

    Raises:
        NotFoundError: there is no such file of a key.
        UsageError: an address beyond this machine without a key, or a file without one.
    """
    key = options.api_key or os.environ.get(KEY_VARIABLE) or None
    if options.api_key_file is not None:
        key = _key_in(options.api_key_file)
    if key is not None and not (key.isascii() and key.isprintable()):
        raise UsageError("the API key: expected printable ASCII characters")
    if key is None and not is_loopback(options.host):
        raise UsageError(
            f"--host {options.host[:100]}: others could ask this server; set a key with "
            f"--api-key-file or {KEY_VARIABLE}, or stay with 127.0.0.1"
        )
    anywhere = options.host.strip("[]") in ("0.0.0.0", "::", "")  # noqa: S104
    name = socket.gethostname().lower()
    own = [name, f"{name.partition('.')[0]}.local"] if anywhere else [options.host.lower()]
    hosts = [*own, *(each.lower() for each in options.allow_host or ())]
    return Access(hosts, anywhere, list(options.allow_origin or ()), key)


def _key_in(path: Path) -> str:
    if not path.exists():
        raise NotFoundError(f"--api-key-file {path}: no such file")
    key = read_own_file(path, MAX_KEY_BYTES).decode("utf-8", "replace").strip()
    if not key:
        raise UsageError(f"--api-key-file {path}: holds no key")
    return key


class _Server(uvicorn.Server):
    """Stops as `engine` wants: first no new requests, after a while an end of all."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace_s: float) -> None:
        super().__init__(config)
        self._engine, self._grace_s = engine, grace_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What a signal does; a second one of Ctrl-C ends at once."""
        self._engine.drain()
        if not self.should_exit:
            timer = threading.Timer(self._grace_s, self._end_all)
            timer.daemon = True
            timer.start()
        super().handle_exit(sig, frame)

    def _end_all(self) -> None:
        self._engine.end_all(busy(503, "the server is shutting down", "draining", final=True))


def serve(
    app: Application,
    engine: Engine,
    listening: socket.socket,
    grace_s: float,
    announce: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, or until the engine could not load the model.

    `announce` says that there is a server: from then on a signal ends it in order.

    Raises:
        Exception: what kept the model from being loaded.
        KeyboardInterrupt: Ctrl-C ended it.
    """
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(grace_s) + 5,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    server = _Server(config, engine, grace_s)
    engine.on_failure = lambda: setattr(server, "should_exit", True)
    _raise_file_limit()
    # uvicorn takes signals only once it runs, and raises them once more when it has ended.
    before: Any = signal.signal(signal.SIGTERM, server.handle_exit)
    try:
        announce()
        engine.start()
        server.run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
        engine.stop()
        listening.close()
    if engine.failure is not None:
        raise engine.failure
