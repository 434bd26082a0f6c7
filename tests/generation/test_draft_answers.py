"""Whole answers with a draft: schemas, stop strings, thoughts, interrupts, the end of a context."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx import load
from apertus_mlx.cache import FULL_PRECISION, Cache
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.draft_model import cut_head, require_draft
from apertus_mlx.generation.draft_pace import FixedPace, MeasuredPace
from apertus_mlx.generation.drafts import Drafting, LookupDraft, ModelDraft
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import DraftOptions, RunOptions, SamplingOptions
from apertus_mlx.generation.run import Generation
from apertus_mlx.memory import Device
from apertus_mlx.memory.footprint import GPU_32_BIT, footprint
from apertus_mlx.memory.report import plan_for_device
from tests.builders import config_4x, random_weights, write_checkpoint
from tests.cache_sequences import FORMS
from tests.daily import every

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
PROMPT = [1, 65, *range(80, 110), *range(80, 105), 66, 67]
WIDTH = 384
ENDLESS = {2: -100, 68: -100, 72: -100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("models")
    small = config_4x(head_dim=32, hidden_size=32, num_hidden_layers=1)
    write_checkpoint(base / "small", small, random_weights(small, 1))
    return write_checkpoint(
        base / "large", config_4x(head_dim=32, max_position_embeddings=128)
    ).parent


def opened(path: Path) -> LoadedModel:
    return open_folder(path).load(RunOptions(compute="mlx", dtype="float32"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return opened(folder / "large")


def drafts(folder: Path) -> dict[str, Callable[[], Any]]:
    def of(name: str, context: int = 128) -> Callable[[], Any]:
        return lambda: ModelDraft(opened(folder / name).model, context, WIDTH)

    return {"itself": of("large"), "small": of("small"), "lookup": LookupDraft}


def answer_of(
    loaded: LoadedModel, options: SamplingOptions, **how: Any
) -> tuple[Any, CachedPrefix]:
    prefix = how.pop("prefix", None) or CachedPrefix(loaded.model)
    run = Generation(loaded, PROMPT, options, prefix=prefix, **how)
    list(run)
    return run.answer, prefix


def with_draft(loaded: LoadedModel, draft: Any, ahead: int = 3) -> LoadedModel:
    return replace(loaded, drafting=Drafting(draft, FixedPace(ahead)))


def test_the_last_token_needs_no_guess(loaded: LoadedModel) -> None:
    """A pace that has just rested has no rest left for it."""
    pace = MeasuredPace()
    pace.rested(pace.rest, 1.0)
    assert (pace.ahead, pace.rest) == (1, 0)
    options = SamplingOptions(temperature=1, seed=3, max_tokens=2, logit_bias=ENDLESS)
    plain, _ = answer_of(loaded, options)
    drafting = Drafting(LookupDraft(), pace)
    found, _ = answer_of(replace(loaded, drafting=drafting), options)
    assert found.token_ids == plain.token_ids and len(plain.token_ids) == 2


@pytest.mark.parametrize("think", [False, True])
def test_an_answer_in_a_schema(loaded: LoadedModel, folder: Path, think: bool) -> None:
    options = SamplingOptions(
        schema=SCHEMA, temperature=1, seed=3, max_tokens=60, max_thought_tokens=6,
        logit_bias={69: 100 if think else 0},
    )  # fmt: skip
    plain, _ = answer_of(loaded, options, think=think)
    jsonschema.validate(json.loads(plain.text), SCHEMA)
    assert bool(plain.thought) is think
    for name, draft in drafts(folder).items():
        found, _ = answer_of(with_draft(loaded, draft()), options, think=think)
        assert (found.token_ids, found.finish_reason) == (plain.token_ids, "stop")
        if name == "itself":
            # Masks are those of each position, or it could not be right.
            assert found.speculation.accepted > 0.8 * found.speculation.drafted > 10


def test_a_stop_string_within_a_block(loaded: LoadedModel, folder: Path) -> None:
    whole, _ = answer_of(loaded, SamplingOptions(temperature=1, seed=1, max_tokens=24))
    for place in range(4, 12):
        stop = loaded.folder.tokenizer.decode(whole.token_ids[place : place + 2])
        if not stop.isprintable() or "\ufffd" in stop or not stop:
            continue
        options = SamplingOptions(temperature=1, seed=1, max_tokens=24, stop=stop)
        plain, _ = answer_of(loaded, options)
        found, prefix = answer_of(with_draft(loaded, drafts(folder)["itself"]()), options)
        assert (found.text, found.token_ids) == (plain.text, plain.token_ids)
        said = [*PROMPT, *found.token_ids]
        assert prefix.tokens == said[: len(prefix.tokens)]
        assert len(prefix.tokens) >= len(said) - 1


def test_the_end_of_the_context(loaded: LoadedModel, folder: Path) -> None:
    options = SamplingOptions(temperature=1, seed=2, max_tokens=1000, logit_bias=ENDLESS)
    plain, _ = answer_of(loaded, options)
    assert len(PROMPT) + len(plain.token_ids) == 128
    found, _ = answer_of(with_draft(loaded, drafts(folder)["small"](), 4), options)
    assert (found.token_ids, found.finish_reason) == (plain.token_ids, "length")
    # A draft that was made for less guesses as far as it can.
    short = ModelDraft(opened(folder / "small").model, len(PROMPT) + 20, WIDTH)
    found, _ = answer_of(with_draft(loaded, short), options)
    assert found.token_ids == plain.token_ids
    assert found.speculation.off == f"the draft's context of {len(PROMPT) + 20} tokens is full"


class Interrupting:
    """A model whose user interrupts its n-th pass over several tokens, before or behind it."""

    def __init__(self, inner: Any, at: int, behind: bool) -> None:
        self._inner, self._left, self._behind = inner, at, behind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, ids: mx.array, caches: list[Cache]) -> Any:
        self._left -= 1
        if self._left == 0 and not self._behind:
            raise KeyboardInterrupt
        logits = self._inner(ids, caches)
        if self._left == 0:
            raise KeyboardInterrupt
        return logits


@pytest.mark.parametrize(
    "case", every(2, product([False, True], ["full", "bounded", "4 bits, bounded"])), ids=str
)
def test_after_an_interrupt(loaded: LoadedModel, folder: Path, case: tuple[bool, str]) -> None:
    behind, form = case
    options = SamplingOptions(temperature=0, max_tokens=30, logit_bias=ENDLESS)
    expected, _ = answer_of(loaded, options, prefix=CachedPrefix(loaded.model, FORMS[form]))
    interrupted: Any = Interrupting(loaded.model, 3, behind)
    prefix = CachedPrefix(interrupted, FORMS[form])
    drafted = with_draft(replace(loaded, model=interrupted), drafts(folder)["itself"]())
    with pytest.raises(KeyboardInterrupt):
        answer_of(drafted, options, prefix=prefix)
    # Another one, after which draft and model hold what they held.
    found, _ = answer_of(drafted, options, prefix=prefix)
    assert found.token_ids == expected.token_ids


def test_ids_have_to_be_the_same(folder: Path, tmp_path: Path) -> None:
    large, small = open_folder(folder / "large"), open_folder(folder / "small")
    require_draft(large, small)
    other = write_checkpoint(tmp_path / "other", config_4x())
    text = (other / "tokenizer.json").read_text()
    for token_id in (3, 10, *range(61, 73)):
        name = large.tokenizer.id_to_token(token_id)
        assert name is not None
        text = text.replace(json.dumps(name), f'"<SPECIAL_{token_id}>"')
    (other / "tokenizer.json").write_text(text)
    require_draft(large, open_folder(other))
    (other / "tokenizer.json").write_text(text.replace('"<extra_350>"', '"<extra_900>"'))
    with pytest.raises(UsageError, match="id 350 is '<extra_900>' there and '<extra_350>'"):
        require_draft(large, open_folder(other))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_head_that_is_cut(tmp_path: Path, tied: bool, bits: int | None) -> None:
    import mlx.nn as nn

    loaded = opened(write_checkpoint(tmp_path / "m", config_4x(tie_word_embeddings=tied)))
    model: Any = loaded.model
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    hidden = mx.random.normal((1, 2, 64), key=mx.random.key(0))
    whole = np.array(model.logits(hidden))
    np.testing.assert_allclose(np.array(cut_head(loaded, 300)(hidden)), whole[..., :300], rtol=1e-5)
    with pytest.raises(UsageError, match="--draft-vocab 384: the draft has 384 ids"):
        cut_head(loaded, 384)


def test_a_draft_with_a_cut_head(loaded: LoadedModel, folder: Path) -> None:
    options = SamplingOptions(temperature=1, seed=4, max_tokens=20)
    plain, _ = answer_of(loaded, options)
    same = opened(folder / "large")
    draft = ModelDraft(same.model, 128, WIDTH, cut_head(same, 256))
    found, _ = answer_of(with_draft(loaded, draft), options)
    assert found.token_ids == plain.token_ids
    assert 0 < found.speculation.accepted < found.speculation.drafted


def test_options() -> None:
    assert DraftOptions(draft="lookup").model is None
    assert DraftOptions(draft=Path("a")).model == "a"
    for draft in (None, "lookup"):
        with pytest.raises(UsageError, match="--draft-vocab: cuts the head of a draft"):
            DraftOptions(draft=draft, draft_vocab=1000)


def test_what_is_looked_up() -> None:
    def never(_: mx.array) -> None:
        raise AssertionError

    def looked_up(ids: list[int], most: int) -> Any:
        found = draft.propose(ids, most, never)
        return None if found is None else found.tolist()

    draft = LookupDraft()
    draft.begin([])
    assert looked_up([5, 6, 7, 8, 5], 3) is None
    assert looked_up([5, 6, 7, 8, 5, 6], 3) == [7, 8, 5]
    # The latest place counts, and the longest run.
    assert looked_up([5, 6, 7, 8, 5, 6, 9, 5, 6], 2) == [9, 5]
    assert looked_up([5, 6, 7, 8, 5, 6, 9, 8, 5, 6], 1) == [9]
    assert looked_up([5, 6, 7, 8, 5, 6, 9, 8, 5, 6, 1, 7, 8, 5, 6], 1) == [9]
    draft.begin([])
    assert looked_up([5, 6], 1) is None


def test_python(folder: Path) -> None:
    how: dict[str, Any] = {"compute": "mlx", "dtype": "float32"}
    asked: dict[str, Any] = {"raw": True, "temperature": 1, "seed": 5, "max_tokens": 30}
    with load(folder / "large", **how) as model:
        plain = model.generate("a b a b a b", **asked)
        assert plain.speculation is None
    for draft in ("lookup", folder / "small"):
        with load(folder / "large", draft=draft, **how) as model:
            found = model.generate("a b a b a b", **asked)
            assert found.token_ids == plain.token_ids
            assert found.speculation is not None and found.speculation.passes
            # Text at random repeats nothing that could be looked up.
            assert found.speculation.drafted or draft == "lookup"


def test_the_memory_of_a_draft_is_planned(folder: Path) -> None:
    large, small = (open_folder(folder / name).inventory for name in ("large", "small"))

    def planned(memory_bytes: int, draft: Any = None) -> Any:
        device = Device("device", memory_bytes)
        return plan_for_device(large, device, 100, FULL_PRECISION, 512, on_gpu=True, draft=draft)

    alone = planned(10**9).forms[0].total_bytes
    needed = footprint(small, FULL_PRECISION, 100, 512, GPU_32_BIT).total_bytes
    assert planned(alone + needed, small).forms[0].fits
    assert not planned(alone + needed - 1, small).forms[0].fits
    assert planned(alone + needed, small).draft_bytes == needed
