"""Prefixes shared by requests: caches of earlier prompts and answers, found by their token ids.

A trie whose segments are runs of ids. A snapshot, the caches of all layers after some ids, hangs
where its ids end; nobody writes to it, and who goes on from it does so in a fork. A segment counts
the snapshots that need it, and goes with the last of them.

A full cache is cut back to any prefix, so that the longest snapshot serves all shorter ones. Other
forms cannot be cut back far, and are kept at boundaries besides.

What has a name goes only when nothing without one is left. A name keeps the prefix that was given
it last, in forms that cannot be cut back with the boundary before it. Names keep at most half of
what there is room for: the one that was used last always, others as long as they fit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

import mlx.core as mx

from apertus_mlx.cache import Cache, CacheConfig, FullCache, QuantizedCache, fork, rewind
from apertus_mlx.generation.prefix_segments import (
    Segment,
    Snapshot,
    above,
    depth,
    path_of,
    split,
    upwards,
)

_log = logging.getLogger(__name__)


class Hit(NamedTuple):
    """Caches that hold the first `length` tokens of a prompt, and belong to who asked."""

    caches: list[Cache]
    length: int


class Named(NamedTuple):
    """What a name keeps: ids, and caches that hold these and belong to who asked."""

    ids: list[int]
    form: CacheConfig
    caches: list[Cache]


class PrefixTrie:
    """Snapshots of one model's caches: at most `limit` bytes, and at most so many.

    When there are more, those go first that have no name, are large, have long not been used and
    were seldom reused. Not for several threads at the same time.

    Args:
        limit: bytes; 0 keeps nothing.
        describe: how a token id is shown where prompts part.
        most: snapshots; None: any number.

    Attributes:
        changed: names that keep something else than when they were last taken from here.
    """

    def __init__(
        self, limit: int, describe: Callable[[int], str] = str, most: int | None = None
    ) -> None:
        self.limit = limit
        self.most = math.inf if most is None else most
        self.nbytes = 0
        self.hits = 0
        self.changed: set[str] = set()
        self._describe = describe
        self._uses = 0
        # By the form of the caches: what one holds means nothing to another.
        self._roots: dict[CacheConfig, Segment] = {}
        # Where each snapshot hangs, by its identity.
        self._places: dict[int, Segment] = {}
        # What each name keeps, the latest last.
        self._named: dict[str, list[Snapshot]] = {}

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
        path = list(path_of(root, prompt[:-1]))
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

    @property
    def names(self) -> Set[str]:
        """Those that keep something."""
        return self._named.keys()

    def named(self, name: str) -> Named | None:
        """What a name keeps that a longer prompt goes on from; None: nothing."""
        held = self._named.get(name)
        if not held:
            return None
        # Where there are two, the boundary: what comes behind it may be written otherwise.
        snapshot = min(held, key=lambda each: each.names[name])
        segment, length = self._places[id(snapshot)], snapshot.names[name]
        ids = [id for each in reversed(list(upwards(segment))) for id in each.ids]
        form = next(form for form, root in self._roots.items() if root in upwards(segment))
        return Named(ids[:length], form, _cut(snapshot, length))

    def keep(
        self,
        ids: Sequence[int],
        form: CacheConfig,
        caches: Sequence[Cache],
        name: str | None = None,
    ) -> None:
        """Keep caches that hold exactly `ids`; nobody may write to them from now on.

        `name`: who keeps them, instead of what it kept before.

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
            if name is not None:
                there = segment.snapshot or min(segment.snapshots(), key=lambda each: each.length)
                self._name(there, name, len(ids), cuttable)
                self._release_names()
            return
        self._hang(snapshot, segment)
        self._use(snapshot)
        if cuttable:
            for shorter in above(segment):
                snapshot.reused = max(snapshot.reused, shorter.reused)
                for other, length in list(shorter.names.items()):
                    self._name(snapshot, other, length, cuttable)
                self._drop(shorter)
        if name is not None:
            self._name(snapshot, name, len(ids), cuttable)
            self._release_names()
        self.shrink(self.limit)

    def shrink(self, nbytes: int) -> None:
        """Drop snapshots until at most `nbytes` are left."""
        while self.nbytes > nbytes or len(self) > self.most:
            snapshots = [place.snapshot for place in self._places.values()]
            self._drop(max((s for s in snapshots if s is not None), key=self._expendable))

    def clear(self) -> None:
        """Drop all."""
        self._roots, self._places, self.nbytes = {}, {}, 0
        self._named.clear()
        self.changed.clear()

    def _expendable(self, snapshot: Snapshot) -> tuple[bool, float]:
        size = snapshot.nbytes * (self._uses - snapshot.used) / (1 + snapshot.reused)
        return not snapshot.names, size

    def _name(self, snapshot: Snapshot, name: str, length: int, cuttable: bool) -> None:
        """Let a name keep the first `length` tokens of a snapshot, and what it kept last."""
        held = [each for each in self._named.get(name, []) if each is not snapshot]
        for old in held if cuttable else held[:-1]:
            del old.names[name]
        snapshot.names[name] = length
        self._named[name] = [*([] if cuttable else held[-1:]), snapshot]
        self.changed.add(name)

    def _release_names(self) -> None:
        """Let go of the names that were not used for the longest time, as far as they are many."""
        while len(self._named) > 1:
            snapshots = {id(each): each for held in self._named.values() for each in held}.values()
            nbytes = sum(each.nbytes for each in snapshots)
            if 2 * nbytes <= self.limit and 2 * len(snapshots) <= max(self.most, 2):
                return
            used = {name: max(each.used for each in held) for name, held in self._named.items()}
            oldest = min(used, key=lambda name: used[name])
            for each in self._named.pop(oldest):
                del each.names[oldest]
            self.changed.discard(oldest)

    def _use(self, snapshot: Snapshot) -> None:
        self._uses += 1
        snapshot.used = self._uses

    def _place(self, ids: tuple[int, ...], form: CacheConfig) -> Segment:
        """The segment that ends where `ids` do; made where it is missing, and not counted yet."""
        segment, met = list(path_of(self._roots.setdefault(form, Segment(())), ids))[-1]
        surplus = depth(segment) - met
        if surplus:
            segment = split(segment, len(segment.ids) - surplus)
        if met == len(ids):
            return segment
        new = Segment(ids[met:], segment)
        segment.children[new.ids[0]] = new
        return new

    def _hang(self, snapshot: Snapshot, segment: Segment) -> None:
        segment.snapshot = snapshot
        self._places[id(snapshot)] = segment
        self.nbytes += snapshot.nbytes
        for each in upwards(segment):
            each.count += 1

    def _drop(self, snapshot: Snapshot) -> None:
        place = self._places.pop(id(snapshot))
        place.snapshot = None
        self.nbytes -= snapshot.nbytes
        for name in snapshot.names:
            self._named[name] = [each for each in self._named[name] if each is not snapshot]
            if not self._named[name]:
                del self._named[name]
                self.changed.discard(name)
        for segment in list(upwards(place)):
            segment.count -= 1
            if segment.count == 0 and segment.parent is not None:
                del segment.parent.children[segment.ids[0]]

    def _tell(self, prompt: Sequence[int], end: tuple[Segment, int]) -> None:
        """Log the two tokens where `prompt` parts from those before it."""
        segment, met = end
        if met >= len(prompt) - 1 or not _log.isEnabledFor(logging.DEBUG):
            return
        surplus = depth(segment) - met
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
