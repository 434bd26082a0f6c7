"""Answers to many prompts, several at a time: their text alone, without thoughts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from apertus_mlx.generation.batch import Batch, Row
from apertus_mlx.generation.options import SamplingOptions
from apertus_mlx.generation.sampling import Sampler, resolve_params
from apertus_mlx.generation.thought_budget import ThoughtBudget
from apertus_mlx.measure.tasks.opened import OpenModel
from apertus_mlx.text.answer_parser import AnswerParser
from apertus_mlx.text.roles import Role


class Question(NamedTuple):
    """A prompt, and how it is to be answered; `max_tokens` counts the answer without thoughts."""

    prompt: Sequence[int]
    options: SamplingOptions


def answers(
    model: OpenModel, questions: Sequence[Question], batch_size: int, max_thought_tokens: int
) -> Iterator[tuple[int, str]]:
    """Answer `questions`; yields the number of each and its answer as they end.

    Stop strings end the answer, and never a thought. A prompt that leaves no room for its answer
    and thoughts loses tokens at its front.

    Args:
        model: answers.
        questions: what to answer.
        batch_size: rows that decode together.
        max_thought_tokens: a longer deliberation is ended; it does not count as answer.

    Raises:
        ApertusError: the weights are damaged, or memory is short.
    """
    batch = Batch(model.loaded.model, prefill_step=model.prefill_step)
    waiting = deque(enumerate(questions))
    writing: dict[Row, _Writing] = {}
    while waiting or writing:
        while waiting and len(writing) < batch_size:
            number, question = waiting.popleft()
            begun = _Writing(model, number, question, max_thought_tokens)
            writing[begun.row] = begun
            batch.join(begun.row)
        for row, token, _, error in batch.turn():
            if error is not None:
                raise error
            if token is None or row not in writing:
                continue
            if writing[row].take(token) or row.left == 0:
                batch.leave(row)
                done = writing.pop(row)
                yield done.number, done.finish()


class _Writing:
    """One answer that is being written."""

    def __init__(
        self, model: OpenModel, number: int, question: Question, max_thought_tokens: int
    ) -> None:
        folder = model.loaded.folder
        roles, vocabulary = folder.tokenizer.roles, folder.config.output_vocab_size
        self.number = number
        self._stop_ids = folder.stop_ids
        self._roles = roles
        self._inside = roles.leaves_thought_open(question.prompt)
        self._left = question.options.max_tokens
        thoughts = max_thought_tokens if self._inside else 0
        # Two more: the tokens that end a deliberation and the answer.
        most = min(self._left + thoughts + 2, model.context - 1)
        prompt = list(question.prompt[-(model.context - most) :])
        pairs = list(zip(sorted(roles.thought_starts), sorted(roles.thought_ends), strict=True))
        starts = [token for token in question.prompt if token in roles.thought_starts]
        opened = starts[-1] if self._inside else None
        budget = ThoughtBudget(max_thought_tokens, pairs, Role.TOOLS.start, opened)
        params = resolve_params(folder.generation_config, question.options)
        sampler = Sampler(params, prompt, vocabulary, budget)
        self.row = Row(prompt, sampler, most, form=model.form)
        self._parser = AnswerParser(
            folder.tokenizer, question.options.stop_strings, thinking=self._inside
        )
        self._text: list[str] = []
        self._cut = True

    def take(self, token: int) -> bool:
        """Take the next token; returns whether the answer has ended."""
        if token in self._stop_ids:
            self._cut = False
            return True
        if token in self._roles.thought_starts | self._roles.thought_ends:
            self._inside = token in self._roles.thought_starts
        elif not self._inside:
            self._left -= 1
        self._text += [each.text for each in self._parser.push(token) if not each.is_thought]
        return self._parser.stopped or self._left <= 0

    def finish(self) -> str:
        """The whole text."""
        pieces = self._parser.finish(cut=self._cut)
        self._text += [each.text for each in pieces if not each.is_thought]
        return "".join(self._text)
