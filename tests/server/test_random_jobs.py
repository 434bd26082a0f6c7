"""Random jobs at once, some cancelled, in little memory: what is told is what runs alone tell."""

from __future__ import annotations

import random
import threading
from dataclasses import replace

import pytest

from apertus_mlx.cache import CacheConfig
from apertus_mlx.generation import batch as batch_module
from apertus_mlx.generation.cached_prefix import CachedPrefix
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.generation.run import Answer, Generation
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.server.jobs import Ended, Failed, Job, Task, Told
from tests.server.engines import FOLDER, LONG, Box, box_of, engine, planned
from tests.server.running import embedded

WORDS = ["the", "city", "of", "Bern", "is", "old", "and", "Zurich", "has", "a", "lake", "word"]
SETTINGS = [
    RunOptions(prefill_step=32),
    RunOptions(kv_bits=4, prefill_step=32),
    RunOptions(max_kv=40, prefill_step=16),
    RunOptions(kv_bits=8),
]


def random_jobs(chance: random.Random, count: int) -> list[Job]:
    """Now and then one that begins as an earlier one does."""
    jobs: list[Job] = []
    for _ in range(count):
        start = [FOLDER.tokenizer.bos_id or 0]
        if jobs and chance.random() < 0.6:
            start = list(chance.choice(jobs).task.prompt)[: chance.choice([5, 20, 200])]
        words = " ".join(chance.choices(WORDS, k=chance.choice([1, 4, 30])))
        options = SamplingOptions(
            temperature=chance.choice([0.0, 0.9]),
            seed=chance.randrange(1000),
            max_tokens=chance.choice([1, 3, 12, 30]),
            repetition_penalty=chance.choice([1.0, 1.2]),
            logit_bias=chance.choice([None, LONG]),
            stop=chance.choice([None, "e"]),
        )
        prompt = [*start, *FOLDER.tokenizer.encode(words)][:110]
        choices, streams = chance.choice([1, 1, 1, 2, 3]), chance.random() < 0.5
        jobs.append(Job(Task(prompt, options, choices=choices, streams=streams), Box()))
    return jobs


def alone(loaded: LoadedModel, task: Task, choice: int, form: CacheConfig) -> Answer:
    options = replace(task.options, seed=(task.options.seed or 0) + choice)
    run = Generation(loaded, task.prompt, options, prefix=CachedPrefix(loaded.model, form))
    list(run)
    return run.answer


def play(loaded: LoadedModel, seed: int, count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Have random jobs done; returns how many answers found something computed before."""
    chance = random.Random(seed)
    faults, share = random.Random(seed), chance.choice([0.0, 0.0, 0.02])
    read_chunk = batch_module.read_chunk

    def reading(*given: object) -> object:
        if faults.random() < share:
            raise RuntimeError("at random")
        return read_chunk(*given)  # type: ignore[arg-type]

    settings = chance.choice(SETTINGS)
    budget = planned(settings)
    limit = budget.total_bytes([150] * chance.choice([1, 2, 4]))
    limit += chance.choice([0, 10**5, 10**8])
    budget = replace(budget, plan=replace(budget.plan, limit_bytes=limit))
    made = engine(
        loaded, budget=budget, running=chance.choice([1, 2, 4, 8]), waiting=count,
        idle_prefixes=chance.choice([0, 1, 3, 16]),
    )  # fmt: skip
    jobs = random_jobs(chance, count)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(batch_module, "read_chunk", reading)
            for job in jobs:
                made.submit([job])
                if chance.random() < 0.15:
                    threading.Timer(chance.random() / 5, job.cancel).start()
            while any(job.left for job in jobs):
                made.wake()
                threading.Event().wait(0.005)
        report = made.report()
        assert made.healthy and report["running"] == report["waiting"] == 0
        assert report["prefix_bytes"] <= budget.left_bytes([])  # type: ignore[operator]
    finally:
        made.stop()
    found = 0
    for job in jobs:
        events = box_of(job).events
        ended = [event for event in events if isinstance(event, Ended)]
        assert not (share == 0 and any(isinstance(event, Failed) for event in events))
        if not job.cancelled:
            assert sorted(each.choice for each in ended) == list(range(job.task.choices))
        for each in ended:
            found += each.cached_tokens > 0
            expected = alone(loaded, job.task, each.choice, settings.form or CacheConfig())
            assert each.answer.token_ids == expected.token_ids, (seed, settings)
            assert each.answer.text == expected.text
            assert each.answer.finish_reason == expected.finish_reason
            told = [e for e in events if isinstance(e, Told) and e.choice == each.choice]
            if job.task.streams:
                assert "".join(event.piece.text for event in told) == expected.text
    return found


def test_random_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert play(embedded(), 1, 5, monkeypatch)


@pytest.mark.nightly
@pytest.mark.parametrize(("compute", "seeds"), [("auto", range(100, 120)), ("mlx", range(6))])
def test_many_random_jobs(compute: str, seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = embedded()
    if compute == "mlx":
        loaded = open_folder(model_dir()).load(RunOptions(compute="mlx", dtype="float32"))
    assert sum(play(loaded, seed, 14, monkeypatch) for seed in seeds) > 20
