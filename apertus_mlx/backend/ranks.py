"""Ranks: the processes, one on each machine, that `mlx.launch` starts to compute a model together.

MLX's distributed engine moves the numbers (ring over any network, JACCL over Thunderbolt 5).
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from apertus_mlx.errors import NotFoundError, RejectedError, UsageError
from apertus_mlx.system.model_files import read_own_file

# So long a rank waits for the others; MLX itself tries to connect for half of it.
MEETING_S = 60
# A hash as numbers that MLX exchanges.
_HASH_WORDS = 8
_joined: list[Ranks] = []


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the others.

    Where another one is gone, MLX raises what `lost` knows, or waits for ever; `RankWatch` ends it.

    Attributes:
        rank: its number, from 0 on. Rank 0 speaks for all.
        size: how many there are.
        hosts: where each is, as far as that is known.
    """

    rank: int
    size: int
    hosts: tuple[str, ...]
    group: mx.distributed.Group

    def name(self, rank: int) -> str:
        """What messages call a rank: its number and its machine."""
        host = self.hosts[rank] if rank < len(self.hosts) else ""
        return f"rank {rank}" + (f" ({host})" if host else "")

    def sum(self, x: mx.array) -> mx.array:
        """The sum of `x` over all ranks; every rank has to ask for it."""
        return mx.distributed.all_sum(x, group=self.group)

    def gather(self, x: mx.array) -> mx.array:
        """See `Exchange`: all ranks' `x`, one after the other along the first axis."""
        return mx.distributed.all_gather(x, group=self.group)

    def from_before(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array | None:
        """See `Links`: what the rank before this one sends."""
        if self.rank == 0:
            return None
        return mx.distributed.recv(shape, dtype, self.rank - 1, group=self.group)

    def to_next(self, x: mx.array) -> mx.array:
        """See `Links`: send `x` to the rank after this one; returns the last one's, on all."""
        if self.rank < self.size - 1:
            sent = mx.distributed.send(x, self.rank + 1, group=self.group)
            x = mx.depends(mx.zeros_like(x), sent)
        return self.sum(x)

    def gathered(self, number: int) -> list[int]:
        """The numbers (32 bits) of all ranks, in their order."""
        own = mx.array([number], mx.uint32)
        return [int(each) for each in np.array(mx.distributed.all_gather(own, group=self.group))]

    def shared(self, numbers: Sequence[int]) -> list[int]:
        """Return rank 0's `numbers` (32 bits each) on every rank, whatever theirs are."""
        own = list(numbers) if self.rank == 0 else []
        count = int(np.array(self.sum(mx.array(len(own), mx.uint32))))
        own = own or [0] * count
        total = self.sum(mx.array(own, mx.uint32))
        return [int(each) for each in np.array(total)]

    def any(self, word: bool) -> bool:
        """Whether any rank says so; every rank has to ask."""
        return bool(self.sum(mx.array(int(word), mx.uint32)).item())

    def require_alike(self, facts: Mapping[str, bytes]) -> None:
        """Refuse to go on where a rank has another value of one of the facts than rank 0.

        Raises:
            UsageError: it names the first such fact and the rank.
        """
        hashes = [hashlib.sha256(value).digest() for value in facts.values()]
        own = np.frombuffer(b"".join(hashes), np.uint32).reshape(1, len(facts), _HASH_WORDS)
        found = np.array(mx.distributed.all_gather(mx.array(own), group=self.group))
        for rank in range(1, self.size):
            for index, fact in enumerate(facts):
                if (found[rank, index] != found[0, index]).any():
                    raise UsageError(f"{self.name(rank)} has another {fact} than {self.name(0)}")


class RankLostError(NotFoundError):
    """The connection to another rank was lost; `RankWatch` finds out to which."""


def lost(error: BaseException) -> NotFoundError | None:
    """What it means to a user if the connection to another rank was lost; else None."""
    if isinstance(error, RankLostError):
        return error
    if isinstance(error, RuntimeError) and "connection to a peer was lost" in str(error):
        return RankLostError("the connection to another rank was lost")
    return None


def settle() -> None:
    """Wait until what this rank exchanges is done; of a process that computes alone for nothing.

    Threads of Python run meanwhile. Some calls of MLX wait for the same and let none run
    (`clear_cache` and `set_cache_limit` without a GPU): where another rank stands still,
    `RankWatch` could then not end this one.

    Raises:
        RuntimeError: see `lost`.
    """
    if _joined:
        mx.eval(mx.zeros((1,), stream=mx.cpu))  # it comes after all exchanges


def is_launched() -> bool:
    """Whether `mlx.launch` has started this process as one of several."""
    return "MLX_RANK" in os.environ


def joined() -> Ranks | None:
    """The ranks that this process computes with; None where it computes alone."""
    return _joined[0] if _joined else None


def join() -> Ranks | None:
    """Meet the other processes that `mlx.launch` has started; None if there are none.

    Raises:
        NotFoundError: they cannot be reached.
    """
    if not is_launched() or _joined:
        return joined()
    try:
        with _bounded_wait():
            group = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())[:200]
        raise NotFoundError(f"mlx.launch: the ranks cannot reach each other ({words})") from None
    if group.size() == 1:
        return None
    _joined.append(Ranks(group.rank(), group.size(), _hosts(), group))
    return joined()


@contextmanager
def _bounded_wait() -> Iterator[None]:
    """End the process where MLX waits too long; it lets no thread of Python run meanwhile."""
    with tempfile.TemporaryFile("w") as unread:
        faulthandler.dump_traceback_later(MEETING_S, exit=True, file=unread)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _hosts() -> tuple[str, ...]:
    """The machines of the ring, or of JACCL that of rank 0, which is what it tells."""
    path = os.environ.get("MLX_HOSTFILE")
    if path:
        try:
            rings = json.loads(read_own_file(Path(path)))
            return tuple(str(addresses[0]).rpartition(":")[0] for addresses in rings)
        except (RejectedError, ValueError, LookupError, TypeError):
            return ()
    coordinator = os.environ.get("MLX_JACCL_COORDINATOR", "")
    return (coordinator.rpartition(":")[0],) if coordinator else ()
