"""A model on several machines of which rank 0 alone knows what is asked, as in a server.

Rank 0 draws all tokens. Before each of its passes it tells the others for which sequences it is,
and they compute the same pass with caches of their own. The tokens go over MLX's connections. So do
the hidden states of which it wants logits, where the others have a share of the head.

A cache is named by a number. What a fork of it computes is another one's, and so is what comes
after some positions were taken back: under one number positions are only added, so that each rank
can fork it at any length.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from apertus_mlx.backend.memory_limits import clear_pool
from apertus_mlx.cache import Cache, CacheConfig, FullCache, QuantizedCache, fork, rewind
from apertus_mlx.cache.rows import Rows, rows_of
from apertus_mlx.errors import ApertusError
from apertus_mlx.model.apertus import Model
from apertus_mlx.model.split_model import SplitModel

# Where the first layer's cache has its name; a fork takes it along.
_NAME = "_led_as"
Order = Mapping[str, Any]
Sum = Callable[[mx.array], mx.array]


class _Name:
    """The number of a cache, for as long as it or a fork of it lives.

    Attributes:
        length: positions that the other ranks hold under it.
        owner: the identity of the cache that goes on under it.
    """

    def __init__(self, number: int, owner: object) -> None:
        self.number = number
        self.length = 0
        self.owner = weakref.ref(owner)


class Lead:
    """What rank 0 has all ranks compute; the others hear of it by `tell`.

    `failed` is told first of what fails, and may not return.
    """

    def __init__(
        self, tell: Callable[[Order], None], failed: Callable[[Exception], object]
    ) -> None:
        self.tell, self._failed = tell, failed
        self._broken = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Tell of something and begin it, so that all ranks exchange everything in one order.

        Raises:
            ApertusError: it has failed before, and nobody knows what the others have computed.
        """
        if self._broken:
            raise ApertusError("the ranks are out of step; start them again")
        self._broken = True
        try:
            yield
        except Exception as error:
            self._failed(error)
            raise
        self._broken = False


class LedDecoder(nn.Module):
    """Rank 0's decoder; see `Model.model`. A pass is waited for before the next one."""

    def __init__(self, decoder: nn.Module, ids: Callable[[mx.array], mx.array], lead: Lead) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Embedding, layers and norm, as whoever asks for them knows them.
        dict.update(self, decoder)
        self._pass: Callable[..., mx.array] = decoder.__call__
        self._ids, self._lead = ids, lead
        # What the latest pass computes.
        self._latest: list[mx.array] = []
        self._numbers = 0
        self._gone: deque[int] = deque()

    def __call__(self, inputs: mx.array, cache: Sequence[Cache]) -> mx.array:
        """Final hidden states of `inputs` `[B, L]`; the same on all ranks.

        Raises:
            ApertusError: see `Lead`.
        """
        with self._lead.together():
            mx.eval(self._latest)
            rows = [self._row(first) for first in _firsts(cache)]
            gone = [self._gone.popleft() for _ in range(len(self._gone))]
            self._lead.tell({"rows": rows, "shape": list(inputs.shape), "gone": gone})
            hidden = self._pass(self._ids(inputs), cache)
            mx.async_eval(hidden)
            for first in _firsts(cache):
                vars(first)[_NAME].length = first.offset
            self._latest = [hidden]
        return hidden

    def _row(self, first: FullCache | QuantizedCache) -> tuple[int, int | None, int]:
        """The number of a sequence, that which it is a fork of, and the positions it holds."""
        old: _Name | None = vars(first).get(_NAME)
        if old is not None and old.owner() is first and first.offset == old.length:
            return old.number, None, old.length
        self._numbers += 1
        name = vars(first)[_NAME] = _Name(self._numbers, first)
        weakref.finalize(name, self._gone.append, name.number).atexit = False
        return name.number, None if old is None else old.number, first.offset


def follow(model: Model, form: CacheConfig, summed: Sum, orders: Iterable[Order]) -> None:
    """Compute the passes that rank 0 tells of, with caches of `form`, until it says `end`.

    Raises:
        KeyboardInterrupt: rank 0 was interrupted.
        ApertusError: an order makes no sense.
    """
    held: dict[int, list[Cache]] = {}
    ids = _ids(model, summed)
    latest: list[mx.array] = []
    for order in orders:
        if "end" in order:
            if order["end"] == "interrupted":
                raise KeyboardInterrupt
            return
        if "logits" in order:
            shape = (*order["logits"], model.config.hidden_size)
            hidden = summed(mx.zeros(shape, model.model.norm.weight.dtype))
            mx.async_eval(model.logits(hidden))
            continue
        rows = [_caches(held, model, form, *row) for row in order["rows"]]
        for number in order["gone"]:
            del held[number]
        used: Sequence[Cache] = rows[0]
        if len(rows) > 1:
            used = rows_of([_ours(each) for each in rows])
        mx.eval(latest)
        latest = [model.model(ids(mx.zeros(order["shape"], mx.uint32)), used)]
        mx.async_eval(latest)
        if order["shape"][1] > 1:
            clear_pool()


def _ids(model: Model, summed: Sum) -> Callable[[mx.array], mx.array]:
    """What makes rank 0's token ids those of all ranks.

    Where a connection is lost, MLX computes on with whatever memory held, and would crash where an
    id of that kind is looked up.
    """
    most = model.config.vocab_size - 1
    return lambda ids: mx.minimum(summed(ids.astype(mx.uint32)), most)


def _caches(
    held: dict[int, list[Cache]],
    model: Model,
    form: CacheConfig,
    number: int,
    origin: int | None,
    length: int,
) -> list[Cache]:
    """The caches of a number with so many positions; new, or a fork of what has those and more."""
    found = held.get(number)
    if found is None:
        found = model.make_cache(form) if origin is None else fork(held[origin])
        held[number] = found
    if not rewind(found, found[0].offset - length):
        raise ApertusError("this rank is out of step with rank 0; start them again")
    return found


def _firsts(cache: Sequence[Cache]) -> Sequence[FullCache | QuantizedCache]:
    """The first layer's cache of each sequence."""
    first = cache[0]
    return first.caches if isinstance(first, Rows) else _ours([first])


def _ours(caches: Iterable[Cache]) -> list[FullCache | QuantizedCache]:
    return [each for each in caches if isinstance(each, FullCache | QuantizedCache)]


def lead(
    model: Model,
    summed: Sum,
    tell: Callable[[Order], None],
    failed: Callable[[Exception], object] = lambda _: None,
) -> None:
    """Have the other ranks compute with `model`, too; for `tell` and `failed` see `Lead`."""
    leading = Lead(tell, failed)
    model.model = LedDecoder(model.model, _ids(model, summed), leading)  # type: ignore[assignment]
    if not isinstance(model, SplitModel) or not model.shares_head:
        return

    def logits(hidden: mx.array) -> mx.array:
        with leading.together():
            leading.tell({"logits": list(hidden.shape[:2])})
            found = model.gathered(summed(hidden))
            mx.async_eval(found)
        return found

    model.ask(logits)


def end(tell: Callable[[Order], None], interrupted: bool) -> None:
    """Tell the other ranks that there is no more to do, as far as they still hear it."""
    with suppress(ApertusError):
        tell({"end": "interrupted" if interrupted else "done"})
