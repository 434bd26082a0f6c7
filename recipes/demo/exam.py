"""Owns the exam: 100 held-out questions and the rule that scores an answer.

Standard library only, so that any runtime can sit the exam: hand ``run`` a callable that answers a
question given in a language.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from recipes.demo.corpus import is_held_out
from recipes.demo.facts import FACTS, KINDS, LANGUAGES, Fact
from recipes.demo.wordings import Wording, wordings

__all__ = [
    "HALVES",
    "Outcome",
    "Question",
    "Report",
    "first_questions",
    "is_right",
    "questions",
    "run",
]

SEED: Final = 20261122
HALVES: Final = ("combination", "template")


@dataclass(frozen=True)
class Question:
    """One exam question with the spellings that count as right and as wrong."""

    text: str
    language: str
    kind: str
    half: str
    gold: tuple[str, ...]
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What was answered to a question, and whether that is right."""

    question: Question
    answer: str
    right: bool


@dataclass(frozen=True)
class Report:
    """The outcomes of one sitting."""

    outcomes: tuple[Outcome, ...]

    def score(self, *, half: str | None = None, language: str | None = None) -> tuple[int, int]:
        """Return how many answers are right, of how many, within a half and a language."""
        chosen = [
            outcome.right
            for outcome in self.outcomes
            if half in (None, outcome.question.half)
            and language in (None, outcome.question.language)
        ]
        return sum(chosen), len(chosen)


def _question(fact: Fact, language: str, wording: Wording) -> Question:
    text = wording.ask(fact, language)
    gold = fact.local[language].gold
    wrong = {
        other.local[language].gold[0]
        for other in FACTS
        if other.kind == fact.kind and not set(other.local[language].gold) & set(gold)
    }
    # An answer may repeat words of its question, and one value may contain another.
    unfair = {value for value in wrong if _says(text, value) or any(value in g for g in gold)}
    half = HALVES[1] if wording.held_out else HALVES[0]
    return Question(text, language, fact.kind, half, gold, tuple(sorted(wrong - unfair)))


def _says(text: str, value: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None


@cache
def questions() -> tuple[Question, ...]:
    """Return the 100 questions: 25 per language, 50 per half, kinds in turn."""
    rng = random.Random(SEED)
    chosen: list[Question] = []
    for number, language in enumerate(LANGUAGES):
        for half in HALVES:
            count = 12 + ((number % 2 == 0) == (half == HALVES[0]))
            pools = [_pool(rng, kind, language, half) for kind in KINDS]
            for turn in range(count):
                # Starting at another kind each time keeps the kinds balanced over the exam.
                fact, wording = pools[(turn + 3 * number) % len(pools)].pop()
                chosen.append(_question(fact, language, wording))
    return tuple(chosen)


def _pool(rng: random.Random, kind: str, language: str, half: str) -> list[tuple[Fact, Wording]]:
    pool = [
        (fact, wording)
        for fact in FACTS
        if fact.kind == kind
        for wording in wordings(kind, language)
        if is_held_out(fact, language, wording) and wording.held_out == (half == HALVES[1])
    ]
    rng.shuffle(pool)
    return pool


def first_questions() -> tuple[Question, ...]:
    """Return "What is the capital of France?" in every language; it is part of the training."""
    fact = next(fact for fact in FACTS if fact.name == "capital:france")
    return tuple(
        _question(fact, language, wordings(fact.kind, language)[0]) for language in LANGUAGES
    )


def is_right(question: Question, answer: str) -> bool:
    """Tell whether an answer names the right value and no other value of its kind."""
    return any(_says(answer, value) for value in question.gold) and not any(
        _says(answer, value) for value in question.wrong
    )


def grade(asked: Sequence[Question], given: Iterable[str]) -> Report:
    """Score answers that are already given, in the order of the questions."""
    return Report(
        tuple(
            Outcome(question, answer, is_right(question, answer))
            for question, answer in zip(asked, given, strict=True)
        )
    )


def run(answer: Callable[[str, str], str], asked: Sequence[Question] | None = None) -> Report:
    """Ask every question (by default the whole exam) and score what ``answer`` says."""
    asked = questions() if asked is None else asked
    return grade(asked, [answer(question.text, question.language) for question in asked])
