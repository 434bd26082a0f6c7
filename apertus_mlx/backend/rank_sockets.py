"""Connections between rank 0 and each other rank, beside those over which MLX sends numbers."""

from __future__ import annotations

import hmac
import secrets
import socket
import time

from apertus_mlx.backend.ranks import Ranks, lost
from apertus_mlx.errors import NotFoundError

CONNECT_S = 10.0
_SECRET_BYTES = 16


def connect(ranks: Ranks) -> dict[int, socket.socket]:
    """New connections, by the rank at their other end; every rank has to ask for them.

    Raises:
        NotFoundError: a rank cannot be reached.
    """
    try:
        return _accept(ranks) if ranks.rank == 0 else {0: _connect(ranks)}
    except OSError as error:
        raise NotFoundError(f"the ranks cannot watch each other ({error})") from None
    except RuntimeError as error:
        raise lost(error) or error from None


def _accept(ranks: Ranks) -> dict[int, socket.socket]:
    """Rank 0's connections to all others. Its port and a secret go over MLX's connections."""
    host = ranks.hosts[0] if ranks.hosts else ""
    secret = secrets.token_bytes(_SECRET_BYTES)
    found: dict[int, socket.socket] = {}
    with socket.create_server((host, 0)) as server:
        ranks.shared([server.getsockname()[1], *secret])
        end = time.monotonic() + CONNECT_S
        while len(found) < ranks.size - 1:
            server.settimeout(max(end - time.monotonic(), 0.001))
            connection, _ = server.accept()
            connection.settimeout(CONNECT_S)
            first = b""
            while len(first) <= _SECRET_BYTES and (more := connection.recv(1)):
                first += more
            known = hmac.compare_digest(first[:_SECRET_BYTES], secret)
            if known and len(first) > _SECRET_BYTES and 0 < first[-1] < ranks.size:
                found[first[-1]] = connection
            else:
                connection.close()
    return found


def _connect(ranks: Ranks) -> socket.socket:
    port, *secret = ranks.shared([])
    host = ranks.hosts[0] if ranks.hosts else "127.0.0.1"
    connection = socket.create_connection((host, port), CONNECT_S)
    connection.sendall(bytes([*secret, ranks.rank]))
    return connection
