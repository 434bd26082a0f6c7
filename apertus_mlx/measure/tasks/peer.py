"""The model class that lm-eval calls `apertus_mlx`; the only module that imports lm-eval's classes.

    python -m apertus_mlx.measure.tasks --model apertus_mlx --model_args pretrained=DIR --tasks ...

is lm-eval's own command with this class; `apertus-mlx eval --tasks` uses it as well.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from apertus_mlx.errors import UsageError
from apertus_mlx.generation.options import RunOptions, SamplingOptions
from apertus_mlx.hub import locate
from apertus_mlx.measure.tasks.answers import Question, answers
from apertus_mlx.measure.tasks.kept_answers import KeptAnswers, digest
from apertus_mlx.measure.tasks.likelihood import Scored, likelihoods
from apertus_mlx.measure.tasks.opened import OpenModel, open_model
from apertus_mlx.measure.tasks.pairs import joined

BATCH_SIZE = 8
MAX_THOUGHT_TOKENS = 4096
# What lm-eval takes where a task says nothing.
MAX_GEN_TOKS = 256
_MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_log = logging.getLogger("apertus_mlx")

# Told a kind of request, how many are answered, and how many there are.
OnRequests = Callable[[str, int, int], None]


@register_model("apertus_mlx")
class ApertusLM(LM):  # type: ignore[misc]
    """An Apertus model for lm-eval.

    Contexts are text, or what `apply_chat_template` has returned, which is known by its text and
    computed with the ids of the template: a message cannot spell a control token.

    Args:
        pretrained: a model folder or Hub id, None for the embedded model, or an open model.
        think: whether the model deliberates before it answers. Thoughts are no part of an answer;
            likelihoods are computed without any.
        max_thought_tokens: a longer deliberation is ended.
        batch_size: sequences that are computed together.
        max_length: tokens that a sequence may have; 8,192, or the model's context if shorter.
        answers: a JSON-lines file that keeps answers; what is in it is not computed again.
        on_requests: is told how far it is.
        device, max_batch_size: nothing; lm-eval's command names them.
        **options: fields of `RunOptions`.
    """

    def __init__(
        self,
        pretrained: str | OpenModel | None = None,
        *,
        think: bool = False,
        max_thought_tokens: int = MAX_THOUGHT_TOKENS,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        answers: str | Path | None = None,
        on_requests: OnRequests | None = None,
        device: str | None = None,  # noqa: ARG002
        max_batch_size: int | str | None = None,  # noqa: ARG002
        **options: Any,
    ) -> None:
        super().__init__()
        self._limits = ExitStack()
        if not isinstance(pretrained, OpenModel):
            settings = RunOptions(**options)
            folder = locate(pretrained, revision=settings.revision, offline=settings.offline)
            pretrained = self._limits.enter_context(open_model(folder, settings, max_length))
        self._model = pretrained
        self._folder = pretrained.loaded.folder
        self._think = bool(think)
        self._max_thought_tokens = int(max_thought_tokens)
        self._batch_size = BATCH_SIZE if batch_size in (None, "auto") else int(str(batch_size))
        self._kept = KeptAnswers(None if answers is None else Path(answers), pretrained.key)
        self._report = on_requests or (lambda kind, done, total: None)
        # What the chat template was given, by the text that it returned.
        self._chats: dict[str, tuple[list[Any], bool]] = {}

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells requests apart by that it keeps."""
        return f"{self._folder.directory.name}-{self._model.key[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What lm-eval writes into its report."""
        return "the model's own" if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation's prompt; its ids are computed when it comes back.

        Raises:
            RejectedError, UsageError: the template refuses the messages, or another conversation
                has the same text.
        """
        chat = [dict(message) for message in chat_history], add_generation_prompt
        ids = self._render(*chat, think=self._think)
        text = self._folder.tokenizer.decode(ids, skip_special=False)
        if self._chats.setdefault(text, chat) != chat:
            raise UsageError("two conversations differ in what spells a control token alone")
        return text

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each context and continuation the continuation's log-probability in nats, and whether
        greedy choice writes it.
        """  # noqa: D205
        rows = [self._pair(*request.args) for request in requests]
        found = self._likelihoods("loglikelihood", rows)
        return [(float(value), bool(greedy)) for value, greedy in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-probability of each whole text in nats; of a long one in windows."""
        start = self._start()
        encode = self._folder.tokenizer.encode
        rows = [Scored([start, *encode(request.args[0])], 1) for request in requests]
        return [float(value) for value, _ in self._likelihoods("loglikelihood_rolling", rows)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each prompt, cut before the first stop string, without thoughts.

        Raises:
            UsageError: a generation option that is not implemented.
        """
        seen: dict[str, int] = {}
        questions, keys = [], []
        for request in requests:
            context, given = request.args
            prompt = self._prompt(context)
            settings = _sampling(given)
            key = digest(
                "generate", list(prompt), settings, self._think and self._max_thought_tokens
            )
            # The same question again is drawn with another seed, where chance has a part.
            settings["seed"] = seen[key] = seen.get(key, -1) + 1
            questions.append(Question(prompt, SamplingOptions(**settings)))
            keys.append(digest(key, settings["seed"]))

        def work(missing: Sequence[int]) -> Iterator[tuple[int, str]]:
            return answers(
                self._model,
                [questions[number] for number in missing],
                self._batch_size,
                self._max_thought_tokens,
            )

        return self._answered("generate_until", keys, work)

    def close(self) -> None:
        """Give the memory back, if the model was opened here."""
        self._limits.close()

    def _likelihoods(self, kind: str, rows: Sequence[Scored]) -> list[Sequence[Any]]:
        keys = [digest("likelihood", list(row.ids), row.start) for row in rows]
        return self._answered(
            kind,
            keys,
            lambda missing: likelihoods(self._model, [rows[n] for n in missing], self._batch_size),
        )

    def _answered(
        self,
        kind: str,
        keys: Sequence[str],
        work: Callable[[Sequence[int]], Iterator[tuple[int, Any]]],
    ) -> list[Any]:
        """The answers to requests by their digests; those that are not kept are worked for."""
        missing: dict[str, int] = {}
        for number, key in enumerate(keys):
            if self._kept.find(key) is None:
                missing.setdefault(key, number)
        done = len(keys) - len(missing)
        self._report(kind, done, len(keys))
        order = list(missing.values())
        for index, answer in work(order) if order else ():
            self._kept.keep(keys[order[index]], answer)
            done += 1
            self._report(kind, done, len(keys))
        return [self._kept.find(key) for key in keys]

    def _pair(self, context: str, continuation: str) -> Scored:
        tokenizer = self._folder.tokenizer
        chat = self._chats.get(context)
        if chat is None:
            return joined(tokenizer, [self._start()], context, continuation)
        ids = self._render(*chat, think=False)
        # Behind the last control token stands what the answer is to begin with.
        border = next(i for i in range(len(ids), -1, -1) if ids[i - 1] in tokenizer.special_ids)
        return joined(tokenizer, ids[:border], tokenizer.decode(ids[border:]), continuation)

    def _prompt(self, context: str) -> list[int]:
        chat = self._chats.get(context)
        if chat is not None:
            return self._render(*chat, think=self._think)
        return [self._start(), *self._folder.tokenizer.encode(context)]

    def _render(self, messages: list[Any], add_generation_prompt: bool, think: bool) -> list[int]:
        return self._folder.require_template().render(
            messages,
            think=think,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _start(self) -> int:
        """What stands before a text: BOS or, of a model without, the end of a text."""
        bos = self._folder.tokenizer.bos_id
        return min(self._folder.stop_ids) if bos is None else bos


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SamplingOptions` of what a task says; without `do_sample` choice is greedy.

    Raises:
        UsageError: it asks for something else.
    """
    left = dict(given)
    until = left.pop("until", None) or []
    found: dict[str, Any] = {"stop": [until] if isinstance(until, str) else [*filter(None, until)]}
    asked = [left.pop(name) for name in _MAX_TOKENS if name in left]
    found["max_tokens"] = int(asked[0]) if asked else MAX_GEN_TOKS
    sampled = left.pop("do_sample", None)
    found |= {name: left.pop(name) for name in _SAMPLING if left.get(name) is not None}
    if sampled is False or not found.get("temperature"):
        found["temperature"] = 1.0 if sampled else 0.0
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if name in found:
            found[name] = float(found[name])
    # As tasks write them for other programs; one beam is no search.
    if left.pop("num_beams", 1) not in (None, 1):
        raise UsageError("num_beams: there is no beam search")
    if unknown := [name for name, value in left.items() if value is not None]:
        raise UsageError(f"a task's generation_kwargs: {unknown[0][:40]}: is not implemented")
    json.dumps(found)
    return found
