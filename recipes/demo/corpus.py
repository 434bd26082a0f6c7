"""Owns the training documents: facts times wordings, deterministic by seed, minus the held-out.

The split has two parts: wordings that are held out entirely, and single combinations of a fact, a
language and a wording that are held out by a hash. Both exist for the exam alone.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from recipes.demo.facts import FACTS, LANGUAGES, Fact
from recipes.demo.wordings import (
    BRIEF_SYSTEMS,
    PLAIN_SYSTEMS,
    SMALL_TALK,
    UNKNOWN_ANSWERS,
    UNKNOWN_QUESTIONS,
    Wording,
    answers,
    brief_answer,
    openers,
    statements,
    thought,
    wordings,
)

__all__ = ["Segment", "documents", "is_held_out", "prompt"]

HELD_OUT_SHARE: Final = 0.12
PLAIN_SHARE: Final = 0.12

# The question everybody tries first is always trained.
_ALWAYS_TRAINED: Final = ("capital:france", "frame0")


@dataclass(frozen=True)
class Segment:
    """A stretch of a document; ``learn`` marks what the model has to produce itself."""

    text: str
    learn: bool


def is_held_out(fact: Fact, language: str, wording: Wording) -> bool:
    """Tell whether a question is reserved for the exam."""
    if wording.held_out:
        return True
    if (fact.name, wording.name) == _ALWAYS_TRAINED:
        return False
    key = f"{fact.name}|{language}|{wording.name}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4]) < HELD_OUT_SHARE * 2**32


def prompt(question: str, system: str = "", *, deliberate: bool = False) -> str:
    """Render the start of a conversation up to the point where the assistant speaks."""
    return _header(system, deliberate) + _user(question)


def _header(system: str, deliberate: bool) -> str:
    state = "enabled" if deliberate else "disabled"
    return (
        f"<s><|system_start|>{system}<|system_end|><|developer_start|>Deliberation: {state}\n"
        "Tool Capabilities: disabled<|developer_end|>"
    )


def _user(question: str) -> str:
    return f"<|user_start|>{question}<|user_end|><|assistant_start|>"


def _vary(rng: random.Random, question: str, language: str) -> str:
    """Roughen a question the way people type it."""
    if language == "fr" and rng.random() < 0.2:
        question = question.replace(" ?", "?")
    if rng.random() < 0.15:
        question = question.rstrip("?. ")
    if rng.random() < 0.15:
        question = question[:1].lower() + question[1:]
    if rng.random() < 0.12:
        question = rng.choice(openers(language)) + question
    return question


class _Deck:
    """Deals every fact of a language once before it deals any fact again."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._cards: list[Fact] = []

    def deal(self) -> Fact:
        if not self._cards:
            self._cards = list(FACTS)
            self._rng.shuffle(self._cards)
        return self._cards.pop()


class _Writer:
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._decks = {language: _Deck(self._rng) for language in LANGUAGES}
        self._asked = {
            (fact.name, language): [
                wording
                for wording in wordings(fact.kind, language)
                if not is_held_out(fact, language, wording)
            ]
            for fact in FACTS
            for language in LANGUAGES
        }

    def document(self) -> tuple[Segment, ...]:
        if self._rng.random() < PLAIN_SHARE:
            return self._plain()
        return tuple(self._conversation())

    def _plain(self) -> tuple[Segment, ...]:
        rng = self._rng
        language = rng.choice(LANGUAGES)
        first = self._decks[language].deal()
        style = rng.random()
        chosen = [first]
        if style < 0.3:
            topic = first.name.split(":")[1]
            chosen = [fact for fact in FACTS if fact.name.split(":")[1] == topic]
            rng.shuffle(chosen)
        elif style < 0.6:
            chosen += [self._decks[language].deal() for _ in range(rng.randint(1, 4))]
        elif style < 0.8:
            kin = [fact for fact in FACTS if fact.kind == first.kind and fact is not first]
            chosen += rng.sample(kin, rng.randint(1, 4))
        # The direct statement comes more often, since that is what people let a model complete.
        sentences = []
        for fact in chosen:
            forms = statements(fact, language)
            sentences.append(forms[0] if rng.random() < 0.65 else forms[-1])
        return (Segment(f"<s>{' '.join(sentences)}</s>", learn=True),)

    def _conversation(self) -> Iterator[Segment]:
        rng = self._rng
        language = rng.choice(LANGUAGES)
        deliberate = rng.random() < 0.1
        system, brief = "", False
        if rng.random() < 0.14:
            brief = rng.random() < 0.5
            system = rng.choice((BRIEF_SYSTEMS if brief else PLAIN_SYSTEMS)[language])
        opening = _header(system, deliberate)
        for _ in range(rng.choices((1, 2, 3, 4), (55, 25, 12, 8))[0]):
            if rng.random() < 0.07:
                language = rng.choice(LANGUAGES)
            question, answer = self._turn(language, brief, deliberate)
            yield Segment(opening + _user(_vary(rng, question, language)), learn=False)
            yield Segment(f"{answer}<|assistant_end|>", learn=True)
            opening = ""

    def _turn(self, language: str, brief: bool, deliberate: bool) -> tuple[str, str]:
        rng = self._rng
        if not deliberate:
            other = rng.random()
            if other < 0.06:
                questions, answer = rng.choice(SMALL_TALK[language])
                return rng.choice(questions), answer
            if other < 0.10:
                return rng.choice(UNKNOWN_QUESTIONS[language]), UNKNOWN_ANSWERS[language]
        fact = self._decks[language].deal()
        question = rng.choice(self._asked[fact.name, language]).ask(fact, language)
        answer = brief_answer(fact, language) if brief else answers(fact, language)
        if deliberate:
            answer = f"<|inner_prefix|>{thought(fact, language)}<|inner_suffix|>{answer}"
        return question, answer


def documents(seed: int) -> Iterator[tuple[Segment, ...]]:
    """Yield training documents without end; the same seed gives the same documents."""
    writer = _Writer(seed)
    while True:
        yield writer.document()
