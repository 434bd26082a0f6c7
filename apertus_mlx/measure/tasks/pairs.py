"""A context and its continuation as one sequence of ids, and where the continuation begins."""

from __future__ import annotations

from collections.abc import Sequence

from apertus_mlx.measure.tasks.likelihood import Scored
from apertus_mlx.text.tokenizer import Tokenizer


def joined(tokenizer: Tokenizer, before: Sequence[int], context: str, continuation: str) -> Scored:
    """The sequence `before` + `context` + `continuation`, judged from the continuation on.

    White space at the end of the context belongs to what follows it. Where a token reaches across
    the border, as the tokenizer may merge what stands on both sides, it is judged as a whole: no
    letter of the continuation is left out.

    Args:
        tokenizer: of the model.
        before: ids that come first, such as BOS or a chat template's; at least one.
        context: plain text after them.
        continuation: plain text whose likelihood is asked for.
    """
    kept = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    alone = tokenizer.encode(kept)
    shared = 0
    while shared < min(len(whole), len(alone)) and whole[shared] == alone[shared]:
        shared += 1
    return Scored([*before, *whole], len(before) + shared)
