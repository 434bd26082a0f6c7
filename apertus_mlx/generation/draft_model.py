"""A model as another one's draft: found, checked to have the same ids, loaded, its head cut."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import mlx.core as mx
import mlx.nn as nn

from apertus_mlx.backend.choose import uses_cpu
from apertus_mlx.backend.metal.text import type_key
from apertus_mlx.backend.metal.verdict import this_machine
from apertus_mlx.backend.mlx import compute_dtype
from apertus_mlx.backend.ranks import joined
from apertus_mlx.backend.row_costs import find_row_costs, products_of
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.draft_pace import MeasuredPace
from apertus_mlx.generation.drafts import Drafting, LookupDraft, ModelDraft
from apertus_mlx.generation.model_folder import LoadedModel, ModelFolder
from apertus_mlx.generation.options import DraftOptions, RunOptions
from apertus_mlx.model.apertus import Model
from apertus_mlx.text.roles import CONTROL_IDS
from apertus_mlx.text.tokenizer import Tokenizer

# Apertus v1 and v1.1 call these otherwise: [INST] and padding at 3 and 10, and the control tokens,
# whose ids mean the same in both.
OTHER_NAMES = frozenset({3, 10, *CONTROL_IDS})


def require_draft(target: ModelFolder, draft: ModelFolder) -> None:
    """Refuse a draft whose ids are not those of `target`.

    Raises:
        UsageError: an id that both have stands for something else.
    """
    if target.directory == draft.directory:
        return
    ours, theirs = target.tokenizer, draft.tokenizer
    shared = min(target.config.output_vocab_size, draft.config.output_vocab_size)
    for token_id in range(shared):
        if token_id in OTHER_NAMES:
            continue
        here, there = _meaning(ours, token_id), _meaning(theirs, token_id)
        if here != there:
            raise UsageError(
                f"--draft {draft.directory}: id {token_id} is {_shown(there)} there and "
                f"{_shown(here)} in the model; a draft needs the same vocabulary"
            )


def _meaning(tokenizer: Tokenizer, token_id: int) -> str | None:
    return tokenizer.id_to_token(token_id) if token_id < tokenizer.vocab_size else None


def _shown(name: str | None) -> str:
    return "nothing" if name is None else repr(name[:40])


def load_drafting(
    target: ModelFolder,
    draft: ModelFolder | None,
    options: DraftOptions,
    settings: RunOptions,
    on_bytes: Callable[[int, int], None] | None = None,
    context: int | None = None,
) -> Drafting | None:
    """What `options` ask for; None: no draft. The weights of `draft` are loaded.

    Args:
        target: whose answers it guesses.
        draft: the folder of `options.model`, if that is one.
        options: which draft.
        settings: how models are computed.
        on_bytes: as in `ModelFolder.load`.
        context: most positions that its memory was planned for; by default its own context.

    Raises:
        RejectedError: see `load_for`.
        UsageError: see `require_draft`; or a head that cannot be cut; or several ranks.
    """
    if options.draft is not None and joined() is not None:
        raise UsageError("--draft is for one machine; under mlx.launch leave it out")
    if draft is None:
        if options.draft is None:
            return None
        return Drafting(LookupDraft(), pace_for(target, settings))
    require_draft(target, draft)
    loaded = draft.load(settings, on_bytes)
    size, width = options.draft_vocab, target.config.output_vocab_size
    head = None if size is None else cut_head(loaded, size)
    most = min(draft.context_length, context or draft.context_length)
    return Drafting(ModelDraft(loaded.model, most, width, head), pace_for(target, settings))


def pace_for(target: ModelFolder, settings: RunOptions) -> MeasuredPace:
    """A pace that begins with what the doctor measured of `target` here, if it did."""
    if uses_cpu(settings.compute, settings.dtype):
        return MeasuredPace()
    dtype = settings.dtype or type_key(compute_dtype(target.inventory))
    return MeasuredPace(costs=find_row_costs(this_machine(), products_of(target.inventory, dtype)))


def cut_head(loaded: LoadedModel, size: int) -> Callable[[mx.array], mx.array]:
    """The model's logits of the first `size` ids alone; its weights are read as they lie.

    Raises:
        UsageError: the head is not computed by MLX, or is more than a product.
    """
    model, most = loaded.model, loaded.folder.config.output_vocab_size
    if size >= most:
        raise UsageError(f"--draft-vocab {size}: the draft has {most} ids; expected fewer")
    if not isinstance(model, Model):
        raise UsageError(
            "--draft-vocab: the CPU path computes the whole head; use --compute mlx, or leave it "
            "out"
        )
    head = model.head
    if not isinstance(head, nn.Linear | nn.QuantizedLinear | nn.Embedding | nn.QuantizedEmbedding):
        raise UsageError("--draft-vocab: this head has factors of its own; leave it out")
    first = copy(head)
    for name in ("weight", "scales", "biases"):
        if head.get(name) is not None:
            first[name] = head[name][:size]
    return first.as_linear if model.config.tie_word_embeddings else first
