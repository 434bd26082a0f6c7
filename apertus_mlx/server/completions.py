"""POST /v1/completions: texts or token ids that the model goes on with, without a template."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from apertus_mlx.errors import ApertusError
from apertus_mlx.server.errors import in_request, wrong
from apertus_mlx.server.fields import (
    MOST_PROMPTS,
    kind_of,
    read_cache_key,
    read_fields,
    unsupported,
)
from apertus_mlx.server.jobs import Ended, Event, PromptRead, Task, Told
from apertus_mlx.server.sampling_fields import read_sampling, read_stream_options, require_text
from apertus_mlx.server.served_model import ServedModel
from apertus_mlx.server.token_watch import TokenLogprob
from apertus_mlx.text.pieces import Piece


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A checked request: a task for each prompt."""

    tasks: Sequence[Task]
    streams: bool
    usage: bool


def read_completion(body: Mapping[str, Any], model: ServedModel) -> CompletionRequest:
    """Check a body.

    Raises:
        ApiError: 400, something in it is wrong; 404, another model.
    """
    model.require_name(body.get("model"))
    fields = read_fields(body, "completions")
    if "prompt" not in fields:
        raise wrong("prompt", "is missing", "missing_required_parameter")
    prompts = _prompts(fields["prompt"], model, fields.get("add_special_tokens", True))
    streams = bool(fields.get("stream"))
    told = fields.get("logprobs"), fields.get("prompt_logprobs")
    if model.filtered and told != (None, None):
        name = "logprobs" if told[0] is not None else "prompt_logprobs"
        raise unsupported(name, "they would tell what the output filter hides")
    if streams and told[1] is not None:
        raise unsupported("prompt_logprobs", "not with stream")
    usage = read_stream_options(fields)
    tasks = []
    for prompt in prompts:
        try:
            options = read_sampling(fields, model.folder, len(prompt), model.most_tokens)
        except ApertusError as error:
            raise in_request(error, "prompt") from None
        task = Task(
            prompt,
            options,
            choices=fields.get("n", 1),
            top_logprobs=told[0],
            prompt_logprobs=told[1],
            streams=streams,
            cache_key=read_cache_key(fields),
        )
        tasks.append(task)
    return CompletionRequest(tasks, streams, usage)


def _prompts(value: Any, model: ServedModel, add_special_tokens: bool) -> list[list[int]]:
    several = isinstance(value, list) and bool(value) and not _is_id(value[0])
    given = value if several else [value]
    if len(given) > MOST_PROMPTS:
        raise wrong("prompt", f"has {len(given)} prompts; at most {MOST_PROMPTS}")
    found = []
    for index, each in enumerate(given):
        place = f"prompt[{index}]" if several else "prompt"
        if not isinstance(each, str | list):
            raise wrong(place, f"expected a text or a list of token ids, not {kind_of(each)}")
        if not each:
            raise wrong(place, "is empty")
        if isinstance(each, str):
            require_text(place, each)
            found.append(model.text_prompt(place, each, add_special_tokens))
        else:
            found.append(require_ids(place, each, model))
    return found


def require_ids(place: str, value: Any, model: ServedModel) -> list[int]:
    """Token ids of the model.

    Raises:
        ApiError: 400, something else.
    """
    if not isinstance(value, list):
        raise wrong(place, f"expected a list of token ids, not {kind_of(value)}")
    size = model.folder.tokenizer.vocab_size
    for index, each in enumerate(value):
        if not _is_id(each):
            raise wrong(f"{place}[{index}]", f"expected a token id, not {kind_of(each)}")
        if not 0 <= each < size:
            raise wrong(f"{place}[{index}]", f"the model's tokens are 0 to {size - 1}")
    return list(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(slots=True)
class CompletionReply:
    """What a client is told of one request's answers."""

    model: str
    tasks: Sequence[Task]
    usage: bool = False
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    _ended: dict[int, list[Ended]] = field(default_factory=dict)
    _offsets: dict[int, int] = field(default_factory=dict)

    def whole(self, answers: Sequence[tuple[Sequence[Ended], PromptRead | None]]) -> dict[str, Any]:
        """The body of an answer that is no stream."""
        choices: list[dict[str, Any]] = []
        for task, (ended, prompt) in zip(self.tasks, answers, strict=True):
            for each in ended:
                text = _text_of(each)
                choice = self._choice(len(choices), text, each.logprobs, _finish(each))
                if each.answer.thought:
                    choice["reasoning_content"] = each.answer.thought
                if prompt is not None:
                    choice["prompt_logprobs"] = [None, *map(_by_id, prompt.logprobs)]
                    choice["prompt_token_ids"] = list(task.prompt)
                choices.append(choice)
        usage = _usage([ended for ended, _ in answers])
        return {**self._head(), "choices": choices, "usage": usage}

    def chunks(self, prompt: int, event: Event) -> Iterator[dict[str, Any]]:
        """What an event of the job of a prompt becomes in a stream."""
        if isinstance(event, Told):
            index = prompt * self.tasks[prompt].choices + event.choice
            if event.piece.is_thought:
                choice = self._choice(index, "", (), None)
                choice["reasoning_content"] = event.piece.text
            else:
                choice = self._choice(index, _text(event.piece), event.logprobs, None)
            yield {**self._head(), "choices": [choice]}
        elif isinstance(event, Ended):
            index = prompt * self.tasks[prompt].choices + event.choice
            self._ended.setdefault(prompt, []).append(event)
            yield {**self._head(), "choices": [self._choice(index, "", (), _finish(event))]}

    def last(self) -> Iterator[dict[str, Any]]:
        """What follows all answers in a stream."""
        if self.usage:
            usage = _usage(list(self._ended.values()))
            yield {**self._head(), "choices": [], "usage": usage}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def _choice(
        self, index: int, text: str, found: Sequence[TokenLogprob], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        top = self.tasks[0].top_logprobs
        if top is not None:
            offsets, at = [], self._offsets.get(index, 0)
            for each in found:
                offsets.append(at)
                at += len(each.text)
            self._offsets[index] = at
            logprobs = {
                "tokens": [each.text for each in found],
                "token_logprobs": [each.logprob for each in found],
                "top_logprobs": [{o.text: o.logprob for o in each.top} for each in found],
                "text_offset": offsets,
                "bytes": [list(each.data) for each in found],
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _usage(answers: Sequence[Sequence[Ended]]) -> dict[str, Any]:
    prompt = sum(each[0].answer.prompt_tokens for each in answers)
    made = sum(one.answer.generated_tokens for each in answers for one in each)
    cached = sum(each[0].cached_tokens for each in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _text(piece: Piece) -> str:
    """Of an answer without tools a call is text like any other."""
    if piece.call is None:
        return piece.text
    return f"{piece.call.name} " * (piece.call.name is not None) + piece.call.arguments


def _text_of(ended: Ended) -> str:
    calls = [f"{each.name} {each.arguments}" for each in ended.answer.tool_calls]
    return ended.answer.text + "".join(calls)


def _finish(ended: Ended) -> str:
    return "length" if ended.answer.finish_reason == "length" else "stop"


def _by_id(found: TokenLogprob) -> dict[str, Any]:
    """The probabilities at one token of the prompt, by id as vLLM has them."""
    every = {each.token_id: each for each in (found, *found.top)}
    return {
        str(token): {"logprob": each.logprob, "decoded_token": each.text}
        for token, each in every.items()
    }
