"""Many rows at once give what each gives alone, and none is harmed by another."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.mlx import load_model
from apertus_mlx.cache import CacheConfig, FullCache
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.generation.batch import Batch, Row
from apertus_mlx.generation.decode import draw_tokens, prefill
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.generation.prefix_trie import PrefixTrie
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.generation.structured import AnswerRules, require_schema
from apertus_mlx.generation.thought_budget import ThoughtBudget
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.model.apertus import Model
from apertus_mlx.model.language_model import NextTokenLogits
from tests.batch_play import VOCABULARY, answer, new_row, play_many, run
from tests.builders import config_4x, write_checkpoint
from tests.cache_sequences import FORMS, TOLERANCE

FULL = CacheConfig()
STOPS = frozenset({2, 68, 72})
LONGEST = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_4x(num_attention_heads=2, head_dim=32, max_position_embeddings=4096)
    return write_checkpoint(tmp_path_factory.mktemp("model"), config)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder)


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    return open_folder(model_dir()).load(RunOptions(compute="mlx", dtype="float32"))


def prompts(count: int, length: int = 12, seed: int = 0) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(74, 330) for _ in range(length)] for _ in range(count)]


def drawn_alone(model: Model, prompt: Sequence[int], count: int, **params: Any) -> list[int]:
    caches = model.make_cache()
    sampler = Sampler(SamplingParams(**{"temperature": 0.0, **params}), prompt, VOCABULARY)
    return list(
        draw_tokens(
            lambda token: model.next_token_logits(token.reshape(1, 1), caches),
            prefill(model, prompt, caches),
            sampler,
            count,
        )
    )


def test_random_mixes(model: Model) -> None:
    counts = play_many(model, range(1), 8)
    assert counts.rows == 8 and counts.compared > 50 and counts.reused
    assert counts.beyond < counts.compared / 20


@pytest.mark.nightly
def test_many_random_mixes(model: Model) -> None:
    counts = play_many(model, range(100, 220), 12)
    print(counts)
    assert counts.forms == set(FORMS) and counts.left_early
    assert counts.beyond < counts.compared / 20


def test_logits_are_those_of_mlx_lm(folder: Path, model: Model) -> None:
    """Rows of different lengths, in one step, beside the whole prompt and answer there."""
    utils = pytest.importorskip("mlx_lm.utils")
    theirs, _ = utils.load_model(folder)
    rows = [new_row(prompts(1, length, length)[0]) for length in (1, 7, 30)]
    run(Batch(model), [row for row, _ in rows])
    for row, sampler in rows:
        wanted = np.array(theirs(mx.array([row.ids[:-1]])))[0, row.prompt_tokens - 1 :]
        for found, expected in zip(sampler.logits(8), wanted, strict=True):
            assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_what_neighbours_say_changes_no_bit(model: Model) -> None:
    """All forms in one batch, beside a neighbour with one text or another."""
    found, said = [], []
    for seed in (1, 2):
        neighbours = [new_row(prompt, max_tokens=12) for prompt in prompts(2, 70, seed)]
        rows = [
            new_row(prompt, form, max_tokens=8)
            for prompt, form in zip(prompts(len(FORMS), 70, 3), FORMS.values(), strict=True)
        ]
        run(Batch(model), [neighbours[0][0], *(row for row, _ in rows), neighbours[1][0]])
        found.append([np.stack(sampler.logits(8)) for _, sampler in rows])
        said.append(answer(neighbours[0][0]))
    assert said[0] != said[1]
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other)


def test_joining_and_leaving_touch_no_other_cache(model: Model) -> None:
    batch = Batch(model)
    first, second, third = (new_row(prompt, max_tokens=50)[0] for prompt in prompts(3))
    batch.join(first)
    batch.join(second)
    for _ in range(4):
        list(batch.turn())
    assert first.caches is not None
    kept = [id(array) for layer in first.caches for array in layer.state]
    batch.join(third)
    batch.read()
    batch.leave(second)
    batch.leave(second)
    assert [id(array) for layer in first.caches for array in layer.state] == kept
    assert batch.running == [first, third] and second.caches is None
    list(batch.turn())
    assert answer(first) == drawn_alone(model, first.ids[:12], 50)[: len(answer(first))]


def test_answers_of_a_form_in_a_batch(embedded: LoadedModel) -> None:
    """Schemas, thought budgets and seeds beside free rows: the tokens of each alone."""
    schema = require_schema({"type": "object", "properties": {"x": {"type": "integer"}},
                             "required": ["x"], "additionalProperties": False})  # fmt: skip
    tokenizer, size = embedded.folder.tokenizer, embedded.folder.config.output_vocab_size
    prompt = embedded.folder.prompt_ids("What is the capital of France?", think=True)
    kinds = [(None, None), (schema, None), (None, 2), (schema, 3)]

    def parts(index: int) -> tuple[Sampler, AnswerRules | None]:
        form, most = kinds[index]
        params = SamplingParams(temperature=0.9, seed=index, frequency_penalty=0.2 * index)
        budget = None if most is None else ThoughtBudget(most, [(69, 70)], 71, 69)
        rules = None
        if form is not None:
            think = most is not None
            rules = AnswerRules(tokenizer, size, STOPS, prompt=[], schema=form, think=think)
        return Sampler(params, prompt, size, budget), rules

    def trimmed(tokens: Sequence[int]) -> list[int]:
        end = next((i + 1 for i, token in enumerate(tokens) if token in STOPS), len(tokens))
        return list(tokens[:end])

    batch, rows = Batch(embedded.model), []
    for index in range(len(kinds)):
        sampler, rules = parts(index)
        rows.append(Row(prompt, sampler, LONGEST, rules=rules))
        batch.join(rows[-1])
    while len(batch):
        for event in batch.turn():
            assert event.error is None
            if event.token in STOPS:
                batch.leave(event.row)
    for index, row in enumerate(rows):
        sampler, rules = parts(index)
        caches = embedded.model.make_cache()

        def step(token: mx.array, caches: Any = caches) -> Any:
            return embedded.model.next_token_logits(token.reshape(1, 1), caches)

        logits = prefill(embedded.model, prompt, caches)
        expected = trimmed(list(draw_tokens(step, logits, sampler, LONGEST, rules)))
        assert answer(row) == expected, kinds[index]
        if rules is not None and expected[-1] in STOPS:
            assert tokenizer.decode(expected).lstrip().startswith("{") or kinds[index][1]


def test_a_step_comes_between_chunks_and_the_oldest_first(model: Model) -> None:
    batch = Batch(model, prefill_step=64)
    running = new_row(prompts(1)[0], max_tokens=100)[0]
    batch.join(running)
    list(batch.turn())
    first, second = (new_row(prompt)[0] for prompt in prompts(2, 200))
    batch.join(first)
    batch.join(second)
    order: list[Row] = []
    while batch.waiting:
        before = [row.read for row in (first, second)]
        events = list(batch.turn())
        assert events[0].row is running and events[0].token is not None
        moved = [row.read - was for row, was in zip((first, second), before, strict=True)]
        assert sorted(moved)[0] == 0 and 0 < sorted(moved)[1] <= 64
        order.append((first, second)[int(np.argmax(moved))])
    assert order == [first] * 4 + [second] * 4


def test_a_short_prompt_waits_for_no_long_one(model: Model) -> None:
    """Every other chunk is of the prompt with least to read; the oldest goes on meanwhile."""
    batch = Batch(model, prefill_step=64)
    long, short = (new_row(prompts(1, length)[0], max_tokens=2)[0] for length in (640, 64))
    for row in (long, short):
        batch.join(row)
    batch.read()
    batch.read()
    assert batch.running == [short] and long.read == 64
    batch.read()
    assert long.read == 128


def test_chunks_are_short_while_rows_decode(model: Model) -> None:
    batch = Batch(model, prefill_step=96, shared_step=64)
    first, second = (new_row(prompt, max_tokens=100)[0] for prompt in prompts(2, 192))
    for row, chunks in ((first, [96, 192]), (second, [64, 128, 192])):
        batch.join(row)
        found = []
        while batch.waiting:
            list(batch.turn())
            found.append(row.read)
        assert found == chunks


def test_events_tell_what_a_token_was_drawn_from(model: Model) -> None:
    """As the model computed it, whatever penalties made of it."""
    batch = Batch(model)
    (row, _), (plain, its) = (
        new_row(prompts(1)[0], repetition_penalty=penalty) for penalty in (1.9, 1.0)
    )
    for each in (row, plain):
        batch.join(each)
    while len(batch.running) < 2:
        batch.read()
    told = {event.row: event.logits for event in batch.step()}
    assert told[row] is not None
    assert np.array_equal(np.array(told[row]), its.logits(1)[0])


class Broken(FullCache):
    """A cache that fails from so many positions on."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def append(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        if self.offset >= self.last:
            raise RuntimeError("this row is broken")
        return super().append(rows)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.offset + keys.shape[2] > self.last:
            raise RuntimeError("this row is broken")
        return super().update_and_fetch(keys, values)


class Failing(Model):
    """Breaks in the second layer of rows of a certain form, or when there are too many rows."""

    fatal = CacheConfig(bound=4000)
    last, most, once = 10**9, 10**9, 0

    def make_cache(self, form: CacheConfig = FULL) -> list[Any]:
        caches = super().make_cache(form)
        return [caches[0], Broken(self.last)] if form == self.fatal else caches

    def next_token_logits(self, *given: Any) -> Any:
        self._count(1)
        return super().next_token_logits(*given)

    def logits(self, hidden: mx.array) -> mx.array:
        self._count(hidden.shape[0])
        return super().logits(hidden)

    def _count(self, rows: int) -> None:
        if rows > self.most or self.once == rows:
            self.once = 0
            raise RuntimeError(f"{rows} rows are too many")


@pytest.fixture
def failing(model: Model) -> Failing:
    twin = Failing(model.config)
    vars(twin).update(vars(model))
    dict.update(twin, model)
    return twin


def collect(batch: Batch, rows: Sequence[Row]) -> dict[Row, Exception]:
    errors = {}
    for row in rows:
        batch.join(row)
    while len(batch):
        errors |= {event.row: event.error for event in batch.turn() if event.error is not None}
    return errors


@pytest.mark.parametrize("last", [5, 12, 18])
def test_only_the_guilty_row_fails(failing: Failing, model: Model, last: int) -> None:
    """In its prompt, or in a step that it shares with others."""
    failing.last = last
    given = prompts(4)
    rows = [new_row(prompt, max_tokens=20)[0] for prompt in given]
    guilty = new_row(prompts(1, seed=5)[0], failing.fatal, max_tokens=20)[0]
    batch = Batch(failing)
    errors = collect(batch, [*rows[:2], guilty, *rows[2:]])
    assert list(errors) == [guilty] and str(errors[guilty]) == "this row is broken"
    assert batch.faults and len(answer(guilty)) == max(0, last - 12)
    for row, prompt in zip(rows, given, strict=True):
        assert answer(row) == drawn_alone(model, prompt, 20)


@pytest.mark.parametrize("once", [1, 3, 4])
def test_what_fails_once_fails_nobody(failing: Failing, model: Model, once: int) -> None:
    failing.once = once
    given = prompts(4)
    chance = [{"temperature": 1.5, "top_p": 1.0, "seed": seed} for seed in range(4)]
    rows = [
        new_row(prompt, max_tokens=20, **how)[0] for prompt, how in zip(given, chance, strict=True)
    ]
    batch = Batch(failing)
    assert not collect(batch, rows)
    assert batch.faults == 1
    for row, prompt, how in zip(rows, given, chance, strict=True):
        assert answer(row) == drawn_alone(model, prompt, 20, **how)


def test_too_many_rows_lose_the_newest(failing: Failing, model: Model) -> None:
    failing.most = 3
    rows = [new_row(prompt, max_tokens=20)[0] for prompt in prompts(4)]
    batch = Batch(failing)
    errors = collect(batch, rows)
    assert list(errors) == [rows[3]]
    for row in rows[:3]:
        assert answer(row) == drawn_alone(model, row.ids[:12], 20)


def test_rules_fail_their_own_row(model: Model) -> None:
    class Complex:
        allowed, steady = None, True

        def accept(self, token: int) -> bool:
            raise UsageError("the grammar is too complex")

    rows = [new_row(prompt)[0] for prompt in prompts(2)]
    prompt = prompts(1)[0]
    refused = Row(prompt, Sampler(SamplingParams(), prompt, VOCABULARY), 9, rules=Complex())  # type: ignore[arg-type]
    rows.append(refused)
    batch = Batch(model)
    errors = collect(batch, rows)
    assert list(errors) == [refused] and isinstance(errors[refused], UsageError)
    assert [len(answer(row)) for row in rows[:2]] == [8, 8] and batch.faults == 0


def test_rules_that_change_have_the_draw_made_again(model: Model) -> None:
    """A token drawn ahead under rules that hold no more is drawn anew, by the same key."""

    class OnlyAfterThree:
        """Steady; after three tokens only one is allowed, and then all again."""

        def __init__(self) -> None:
            self.count, self.allowed, self.steady = 0, None, True

        def accept(self, token: int) -> bool:
            self.count += 1
            only = mx.arange(VOCABULARY) == 99
            self.allowed = only if self.count == 3 else None
            return self.count in (3, 4)

    given = prompts(2)
    how = {"temperature": 1.5, "top_p": 1.0}
    rows = []
    for seed, prompt in enumerate(given):
        sampler = Sampler(SamplingParams(**how, seed=seed), prompt, VOCABULARY)
        rows.append(Row(prompt, sampler, 12, rules=OnlyAfterThree()))  # type: ignore[arg-type]
    run(Batch(model), rows)
    for seed, row in enumerate(rows):
        caches = model.make_cache()
        sampler = Sampler(SamplingParams(**how, seed=seed), row.ids[:12], VOCABULARY)
        logits, expected = prefill(model, row.ids[:12], caches), []
        for index in range(12):
            allowed = mx.arange(VOCABULARY) == 99 if index == 3 else None
            expected.append(int(sampler(NextTokenLogits(logits), allowed)))
            token = mx.array([expected[-1:]])
            logits = model.next_token_logits(token, caches).values
        assert answer(row) == expected and expected[3] == 99


def test_damaged_logits_fail_their_own_row(folder: Path, model: Model) -> None:
    """One token's embedding is no number; who has it gets the error, others their answers."""
    damaged = load_model(folder)
    weight = damaged.model.embed_tokens.weight
    weight[380] = float("nan")
    given = prompts(3)
    rows = [new_row(prompt)[0] for prompt in given]
    guilty = new_row([*given[0], 380])[0]
    batch = Batch(damaged, PrefixTrie(2**24))
    errors = collect(batch, [*rows[:2], guilty, rows[2]])
    assert list(errors) == [guilty] and isinstance(errors[guilty], RejectedError)
    assert "no finite logits" in str(errors[guilty]) and batch.faults == 0
    for row, prompt in zip(rows, given, strict=True):
        assert answer(row) == drawn_alone(model, prompt, 8)


def test_rows_go_on_where_others_stopped(model: Model) -> None:
    """A conversation's next prompt computes only what is new; its answer is that of a fresh run."""
    trie = PrefixTrie(2**24)
    batch = Batch(model, trie)
    first = new_row(prompts(1, 40)[0])[0]
    run(batch, [first])
    assert len(trie) == 1
    ids = [*first.ids, *prompts(1, 5, 1)[0]]
    second = new_row(ids)[0]
    run(batch, [second])
    # The last token of an answer has not been fed.
    assert second.reused == len(first.ids) - 1
    assert answer(second) == drawn_alone(model, ids, 8)
    again = new_row(first.ids[:40])[0]
    run(batch, [again])
    assert again.reused == 39 and answer(again) == answer(first)


@pytest.mark.parametrize("form", [FULL, CacheConfig(4, 4, window=8)])
def test_other_models_take_turns(folder: Path, form: CacheConfig) -> None:
    """On the CPU path rows are computed one after the other, each as alone, to the bit."""
    pytest.importorskip("onnxruntime")
    model = open_folder(folder).load(RunOptions(dtype="float32", compute="cpu")).model
    pairs = [new_row(prompt, form) for prompt in prompts(3, 40)]
    run(Batch(model, PrefixTrie(2**24)), [row for row, _ in pairs])
    for row, sampler in pairs:
        lone, its = new_row(row.ids[:40], form)
        run(Batch(model), [lone])
        assert answer(row) == answer(lone)
        assert np.array_equal(np.stack(sampler.logits(8)), np.stack(its.logits(8)))
