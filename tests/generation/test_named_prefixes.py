"""What a name keeps in the trie stays, whatever others leave there, and is that of its own."""

from __future__ import annotations

import random

import numpy as np
import pytest

from apertus_mlx.cache import fork
from apertus_mlx.generation.prefix_trie import PrefixTrie
from apertus_mlx.model.apertus import Model
from tests.cache_sequences import FORMS
from tests.generation.test_prefix_trie import FULL, computed, logits, model, require_counts

__all__ = ["model"]
OWN = list(range(80, 140))


def others(model: Model, trie: PrefixTrie, count: int) -> None:
    for first in range(200, 200 + count):
        trie.keep([first, 90], FULL, computed(model, [first, 90]))
        require_counts(trie)


def test_others_push_out_only_each_other(model: Model) -> None:
    trie = PrefixTrie(2**30, most=3)
    trie.keep(OWN, FULL, computed(model, OWN), "mine")
    others(model, trie, 6)
    hit = trie.find([*OWN, 150], FULL)
    assert hit is not None and hit.length == len(OWN) and len(trie) == 3
    trie.shrink(0)
    assert not trie.names and not trie.changed and not len(trie)


def test_names_leave_half_of_the_room_to_others(model: Model) -> None:
    size = sum(layer.nbytes for layer in computed(model, [80]))
    for trie in (PrefixTrie(2**40, most=8), PrefixTrie(8 * size)):
        for first in range(80, 90):
            trie.keep([first, 90], FULL, computed(model, [first, 90]), str(first))
            if first == 87:
                # Used again, it is none of the oldest.
                assert trie.find([84, 90, 91], FULL) is not None
        assert trie.names == trie.changed == {"84", "87", "88", "89"}
        others(model, trie, 3)
        assert trie.find([202, 90, 91], FULL) is not None and len(trie.names) == 4
    # One that is larger than that is kept, and its name, too.
    trie = PrefixTrie(size)
    trie.keep([80, 90], FULL, computed(model, [80, 90]), "large")
    assert trie.names == {"large"}


def test_a_name_keeps_what_it_was_given_last(model: Model) -> None:
    trie = PrefixTrie(2**30)
    for first in (80, 81):
        ids = [first, *OWN]
        trie.keep(ids, FULL, computed(model, ids), "mine")
    found = trie.named("mine")
    assert found is not None and found.ids == ids and trie.changed == {"mine"}
    assert sum(bool(s.names) for root in trie._roots.values() for s in root.snapshots()) == 1
    assert trie.named("yours") is None


def test_a_longer_one_of_others_serves_and_tells_nothing(model: Model) -> None:
    trie = PrefixTrie(2**30, most=2)
    longer = [*OWN, 300, 301]
    trie.keep(OWN, FULL, computed(model, OWN), "mine")
    trie.keep(longer, FULL, computed(model, longer))
    assert len(trie) == 1
    others(model, trie, 4)
    found = trie.named("mine")
    assert found is not None and found.ids == OWN and found.caches[0].offset == len(OWN)
    assert np.array_equal(
        logits(model, [85], found.caches), logits(model, [85], computed(model, OWN))
    )
    # The other way round.
    trie = PrefixTrie(2**30)
    trie.keep(longer, FULL, computed(model, longer), "yours")
    trie.keep(OWN, FULL, computed(model, OWN), "mine")
    assert len(trie) == 1
    kept = {name: trie.named(name) for name in ("mine", "yours")}
    assert {name: len(each.ids) for name, each in kept.items() if each} == {
        "mine": len(OWN), "yours": len(longer),
    }  # fmt: skip


@pytest.mark.parametrize("form", ["4 bits", "bounded"])
def test_a_cache_that_cannot_go_back_keeps_its_boundary_too(model: Model, form: str) -> None:
    form_, trie = FORMS[form], PrefixTrie(2**30)
    caches = computed(model, OWN, form_)
    for turn in range(3):
        ids = [*OWN, *(150 + turn for _ in range(40))]
        trie.keep(OWN, form_, fork(caches), "mine")
        trie.keep(ids, form_, computed(model, ids, form_), "mine")
        found = trie.named("mine")
        assert found is not None and found.ids == OWN
        # What an earlier turn had said is kept for nobody.
        named = [s.length for s in trie._roots[form_].snapshots() if s.names]
        assert sorted(named) == [len(OWN), len(ids)]


@pytest.mark.parametrize("seed", range(4))
def test_names_and_snapshots_agree(model: Model, seed: int) -> None:
    """Whatever is kept, found, taken and dropped at random."""
    chance = random.Random(seed)
    trie = PrefixTrie(2**30, most=5)
    for _ in range(40):
        form = FORMS[chance.choice(["full", "bounded"])]
        ids = [80 + chance.randrange(2) for _ in range(chance.choice([1, 2, 4, 30]))]
        name = chance.choice([None, "a", "b", "c"])
        if chance.random() < 0.15:
            trie.take([*ids, 90], form)
        else:
            trie.keep(ids, form, computed(model, ids, form), name)
            assert name is None or name in trie.names
        require_counts(trie)
        held = [s for root in trie._roots.values() for s in root.snapshots()]
        assert {name for s in held for name in s.names} == set(trie.names)
        assert trie.changed <= set(trie.names)
        for each in trie.names:
            found = trie.named(each)
            assert found is not None and found.caches[0].offset == len(found.ids)
            assert sum(each in s.names for s in held) <= 2
