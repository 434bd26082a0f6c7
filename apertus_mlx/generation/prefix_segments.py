"""Runs of token ids in a tree, and the caches that hang where they end; see `prefix_trie.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from apertus_mlx.cache import Cache
from apertus_mlx.generation.cached_prefix import shared_length


@dataclass(slots=True)
class Snapshot:
    """The caches of all layers after `length` tokens; not to be written to.

    Attributes:
        used: when it was last used, counted in uses of all snapshots.
        reused: how often it, or a shorter one that it replaced, served a prompt.
        names: who keeps it, and how many of its tokens.
    """

    caches: list[Cache]
    length: int
    nbytes: int
    used: int = 0
    reused: int = 0
    names: dict[str, int] = field(default_factory=dict)


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


def path_of(root: Segment, ids: Sequence[int]) -> Iterator[tuple[Segment, int]]:
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


def upwards(segment: Segment) -> Iterator[Segment]:
    """A segment, its parent, and so on."""
    here: Segment | None = segment
    while here is not None:
        yield here
        here = here.parent


def above(segment: Segment) -> list[Snapshot]:
    """Snapshots of shorter prefixes."""
    found = [each.snapshot for each in upwards(segment) if each is not segment]
    return [snapshot for snapshot in found if snapshot is not None]


def depth(segment: Segment) -> int:
    """Ids up to the end of a segment."""
    return sum(len(each.ids) for each in upwards(segment))


def split(segment: Segment, length: int) -> Segment:
    """Give the first `length` ids of a segment to a new one before it; returns the new one."""
    assert segment.parent is not None
    first = Segment(segment.ids[:length], segment.parent, count=segment.count)
    segment.parent.children[first.ids[0]] = first
    segment.ids, segment.parent = segment.ids[length:], first
    first.children[segment.ids[0]] = segment
    return first
