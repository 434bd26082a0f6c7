"""Counters and histograms in Prometheus' form; nothing in them tells what was said."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from apertus_mlx.generation.answer import Answer
    from apertus_mlx.server.jobs import Job

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_TOKENS = tuple(2.0**exponent for exponent in range(8, 19))


class Metrics:
    """All numbers of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, words: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"apertus_{name}", words, labels, registry=self.registry)

        def histogram(name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"apertus_{name}", words, buckets=buckets, registry=self.registry)

        self.responses = counter("responses", "HTTP responses", ("route", "status"))
        self.finished = counter("finished", "Jobs that have ended", ("finish",))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = counter("cached_tokens", "Tokens of prompts computed before")
        self.generated_tokens = counter("generation_tokens", "Tokens generated")
        self.drafted_tokens = counter("draft_tokens", "Tokens that a draft guessed")
        self.accepted_tokens = counter("draft_accepted_tokens", "Those among them that were right")
        self.faults = counter("engine_faults", "Requests that failed by our fault")
        self.queue_s = histogram("queue_seconds", "From arrival to the first step", _SECONDS)
        self.first_token_s = histogram(
            "time_to_first_token_seconds", "From arrival to the first token", _SECONDS
        )
        self.between_s = histogram(
            "inter_token_seconds", "Mean time between the tokens of an answer", _SECONDS
        )
        self.context = histogram("request_context_tokens", "Prompt and answer", _TOKENS)
        self._running = Gauge("apertus_running", "Jobs at work", registry=self.registry)
        self._waiting = Gauge("apertus_waiting", "Jobs that wait", registry=self.registry)

    def sizes(self, running: int, waiting: int) -> None:
        """Note how many jobs there are."""
        self._running.set(running)
        self._waiting.set(waiting)

    def ended(self, job: Job, finish: str) -> None:
        """Note a job that has ended."""
        self.finished.labels(finish).inc()
        self.queue_s.observe((job.begun_s or time.monotonic()) - job.queued_s)
        if job.first_s:
            self.first_token_s.observe(job.first_s - job.queued_s)
            self.prompt_tokens.inc(len(job.task.prompt))
            self.cached_tokens.inc(job.cached)
            self.generated_tokens.inc(job.generated)
            self.context.observe(len(job.task.prompt) + job.generated)

    def answered(self, answer: Answer) -> None:
        """Note an answer that is whole."""
        if answer.decode_tokens_per_s:
            self.between_s.observe(1 / answer.decode_tokens_per_s)
        if answer.speculation is not None:
            self.drafted_tokens.inc(answer.speculation.drafted)
            self.accepted_tokens.inc(answer.speculation.accepted)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
