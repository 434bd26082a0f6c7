"""Prefixes shared by requests: caches of earlier prompts and answers, found by their token ids.

A trie whose segments are runs of ids. A snapshot, the caches of all layers after some ids, hangs
where its ids end; nobody writes to it, and who goes on from it does so in a fork. A segment counts
the snapshots that need it, and goes with the last of them.

A full cache is cut back to any prefix, so that the longest snapshot serves all shorter ones. Other
forms cannot be cut back far, and are kept at boundaries besides.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx

from apertus_mlx.cache import Cache, CacheConfig, FullCache, QuantizedCache, fork, rewind
from apertus_mlx.generation.cached_prefix import shared_length

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Snapshot:
    """The caches of all layers after `length` tokens; not to be written to.

    Attributes:
        used: when it was last used, counted in uses of all snapshots.
        reused: how often it, or a shorter one that it replaced, served a prompt.
    """

    caches: list[Cache]
    length: int
    nbytes: int
    used: int = 0
    reused: int = 0


@dataclass(slots=True, eq=False)
class Segment:
    """A run of ids behind those of its parent.

    Attributes:
        count: snapshots here and behind.
    """

    ids: Sequence[int]
    parent: Segment | None = None
    children: dict[int, Segment] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    count: int = 0

    def snapshots(self) -> Iterator[Snapshot]:
        """All that hang here or behind."""
        waiting = [self]
        while waiting:
            segment = waiting.pop()
            if segment.snapshot is not None:
                yield segment.snapshot
            waiting += segment.children.values()


class Hit(NamedTuple):
    """Caches that hold the first `length` tokens of a prompt, and belong to who asked."""

    caches: list[Cache]
    length: int


class PrefixTrie:
    """Snapshots of one model's caches: at most `limit` bytes, and at most so many.

    When there are more, those go first that are large, have long not been used and were seldom
    reused. Not for several threads at the same time.

    Args:
        limit: bytes; 0 keeps nothing.
        describe: how a token id is shown where prompts part.
        most: snapshots; None: any number.
    """

    def __init__(
        self, limit: int, describe: Callable[[int], str] = str, most: int | None = None
    ) -> None:
        self.limit = limit
        self.most = math.inf if most is None else most
        self.nbytes = 0
        self.hits = 0
        self._describe = describe
        self._uses = 0
        # By the form of the caches: what one holds means nothing to another.
        self._roots: dict[CacheConfig, Segment] = {}
        # Where each snapshot hangs, by its identity.
        self._places: dict[int, Segment] = {}

    def __len__(self) -> int:
        return len(self._places)

    def find(self, prompt: Sequence[int], form: CacheConfig) -> Hit | None:
        """The longest prefix of `prompt` that can be had, its last token left out; None if none."""
        found = self._search(prompt, form)
        return None if found is None else Hit(_cut(*found), found[1])

    def take(self, prompt: Sequence[int], form: CacheConfig) -> Hit | None:
        """As `find`, where memory is short: what is found is kept no longer, and not copied."""
        found = self._search(prompt, form)
        if found is None:
            return None
        snapshot, shared = found
        self._drop(snapshot)
        rewind(snapshot.caches, snapshot.length - shared)
        return Hit(snapshot.caches, shared)

    def _search(self, prompt: Sequence[int], form: CacheConfig) -> tuple[Snapshot, int] | None:
        """What has the longest prefix of `prompt`, and how long that is."""
        root = self._roots.get(form)
        if root is None or len(prompt) < 2:
            return None
        path = list(_path(root, prompt[:-1]))
        self._tell(prompt, path[-1])
        tried: set[int] = set()
        # From the longest on: all that hangs behind a segment shares as much as was met of it.
        for segment, shared in reversed(path[1:]):
            behind = [found for found in segment.snapshots() if id(found) not in tried]
            for snapshot in sorted(behind, key=lambda found: (found.length, -found.used)):
                tried.add(id(snapshot))
                if rewind(fork(snapshot.caches[:1]), snapshot.length - shared):
                    self._use(snapshot)
                    snapshot.reused += 1
                    self.hits += 1
                    return snapshot, shared
        return None

    def keep(self, ids: Sequence[int], form: CacheConfig, caches: Sequence[Cache]) -> None:
        """Keep caches that hold exactly `ids`; nobody may write to them from now on.

        Raises:
            ValueError: a layer does not hold as many positions.
        """
        if any(layer.offset != len(ids) for layer in caches):
            raise ValueError(f"the caches do not hold {len(ids)} positions each")
        if not ids or not self.limit or not self.most:
            return
        _compact(caches)
        snapshot = Snapshot(list(caches), len(ids), sum(layer.nbytes for layer in caches))
        if snapshot.nbytes > self.limit:
            return
        segment = self._place(tuple(ids), form)
        cuttable = not form.quantized and form.bound is None
        if segment.count and (cuttable or segment.snapshot is not None):
            # What is there serves as well.
            for found in segment.snapshots():
                self._use(found)
            return
        self._hang(snapshot, segment)
        self._use(snapshot)
        if cuttable:
            for shorter in _above(segment):
                snapshot.reused = max(snapshot.reused, shorter.reused)
                self._drop(shorter)
        self.shrink(self.limit)

    def shrink(self, nbytes: int) -> None:
        """Drop snapshots until at most `nbytes` are left."""
        while self.nbytes > nbytes or len(self) > self.most:
            snapshots = [place.snapshot for place in self._places.values()]
            self._drop(max((s for s in snapshots if s is not None), key=self._expendable))

    def clear(self) -> None:
        """Drop all."""
        self._roots, self._places, self.nbytes = {}, {}, 0

    def _expendable(self, snapshot: Snapshot) -> float:
        return snapshot.nbytes * (self._uses - snapshot.used) / (1 + snapshot.reused)

    def _use(self, snapshot: Snapshot) -> None:
        self._uses += 1
        snapshot.used = self._uses

    def _place(self, ids: tuple[int, ...], form: CacheConfig) -> Segment:
        """The segment that ends where `ids` do; made where it is missing, and not counted yet."""
        segment, met = list(_path(self._roots.setdefault(form, Segment(())), ids))[-1]
        surplus = _depth(segment) - met
        if surplus:
            segment = _split(segment, len(segment.ids) - surplus)
        if met == len(ids):
            return segment
        new = Segment(ids[met:], segment)
        segment.children[new.ids[0]] = new
        return new

    def _hang(self, snapshot: Snapshot, segment: Segment) -> None:
        segment.snapshot = snapshot
        self._places[id(snapshot)] = segment
        self.nbytes += snapshot.nbytes
        for each in _upwards(segment):
            each.count += 1

    def _drop(self, snapshot: Snapshot) -> None:
        place = self._places.pop(id(snapshot))
        place.snapshot = None
        self.nbytes -= snapshot.nbytes
        for segment in list(_upwards(place)):
            segment.count -= 1
            if segment.count == 0 and segment.parent is not None:
                del segment.parent.children[segment.ids[0]]

    def _tell(self, prompt: Sequence[int], end: tuple[Segment, int]) -> None:
        """Log the two tokens where `prompt` parts from those before it."""
        segment, met = end
        if met >= len(prompt) - 1 or not _log.isEnabledFor(logging.DEBUG):
            return
        surplus = _depth(segment) - met
        if surplus:
            before = segment.ids[len(segment.ids) - surplus]
        elif segment.children:
            before = next(reversed(segment.children))
        else:
            return
        _log.debug(
            "the prompt shares %d of its %d tokens with earlier ones; then it has %r, and the "
            "earlier %r",
            met, len(prompt), self._describe(prompt[met]), self._describe(before),
        )  # fmt: skip


def _path(root: Segment, ids: Sequence[int]) -> Iterator[tuple[Segment, int]]:
    """The segments that `ids` go through, each with how many ids agree up to there."""
    segment, met = root, 0
    yield segment, met
    while met < len(ids) and ids[met] in segment.children:
        segment = segment.children[ids[met]]
        agreed = shared_length(segment.ids, ids[met : met + len(segment.ids)])
        met += agreed
        yield segment, met
        if agreed < len(segment.ids):
            return


def _upwards(segment: Segment) -> Iterator[Segment]:
    here: Segment | None = segment
    while here is not None:
        yield here
        here = here.parent


def _above(segment: Segment) -> list[Snapshot]:
    """Snapshots of shorter prefixes."""
    above = [each.snapshot for each in _upwards(segment) if each is not segment]
    return [snapshot for snapshot in above if snapshot is not None]


def _depth(segment: Segment) -> int:
    """Ids up to the end of a segment."""
    return sum(len(each.ids) for each in _upwards(segment))


def _split(segment: Segment, length: int) -> Segment:
    """Give the first `length` ids of a segment to a new one before it; returns the new one."""
    assert segment.parent is not None
    first = Segment(segment.ids[:length], segment.parent, count=segment.count)
    segment.parent.children[first.ids[0]] = first
    segment.ids, segment.parent = segment.ids[length:], first
    first.children[segment.ids[0]] = segment
    return first


def _cut(snapshot: Snapshot, length: int) -> list[Cache]:
    """A fork that holds only the first `length` tokens."""
    excess = snapshot.length - length
    caches = fork(snapshot.caches)
    rewind(caches, excess)
    if excess:
        _compact(caches)
    return caches


def _compact(caches: Sequence[Cache]) -> None:
    for layer in caches:
        if isinstance(layer, FullCache | QuantizedCache):
            layer.compact()
    mx.eval([layer.state for layer in caches])
