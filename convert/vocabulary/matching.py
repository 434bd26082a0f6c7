"""Two models of which one has a part of the other's vocabulary: what they can be compared by.

The one with more tokens counts as if it had the kept ones alone: its rows of the others are left
out, which spreads what it gives to them over the kept tokens in proportion. Both read the tokens of
the smaller vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from apertus_mlx.convert.evaluation.layerwise import SourceWeights
from apertus_mlx.convert.evaluation.texts import same_tokens
from apertus_mlx.convert.vocabulary.byte_pairs import Ids
from apertus_mlx.convert.vocabulary.kept_rows import keep_rows
from apertus_mlx.text.tokenizer import Tokenizer


def kept_ids(whole: Tokenizer, part: Tokenizer) -> Ids | None:
    """For each id of `part` the id of the same token in `whole`, ascending.

    None where `part` is no part of `whole`, or has its tokens in another order. Ids without a token
    count where all others stay in place.
    """
    if part.vocab_size > whole.vocab_size:
        return None
    names = [part.id_to_token(token_id) for token_id in range(part.vocab_size)]
    if all(whole.id_to_token(token_id) == name for token_id, name in enumerate(names)):
        return np.arange(len(names), dtype=np.int64)
    found = [None if name is None else whole.token_to_id(name) for name in names]
    ids = np.array([-1 if token_id is None else token_id for token_id in found], np.int64)
    return None if ids.min(initial=0) < 0 or (np.diff(ids) <= 0).any() else ids


def on_part(weights: SourceWeights, whole: Tokenizer, part: Tokenizer) -> SourceWeights:
    """The model that has the tokens of `part` alone; `kept_ids` must not be None."""
    if same_tokens(whole, part):
        return weights
    ids = kept_ids(whole, part)
    assert ids is not None
    return replace(weights, source=keep_rows(weights.source, ids))
