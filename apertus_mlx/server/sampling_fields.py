"""From the fields of a body to how answers are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apertus_mlx.errors import TooLongError
from apertus_mlx.generation.model_folder import ModelFolder
from apertus_mlx.generation.options import MOST_BIAS, SamplingOptions
from apertus_mlx.server.errors import in_request, wrong
from apertus_mlx.server.fields import (
    MOST_BIASES,
    MOST_STOP_BYTES,
    MOST_STOPS,
    kind_of,
    read_object,
    shown,
)

_PLAIN = (
    *("temperature", "top_p", "min_p", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)


def read_sampling(
    fields: Mapping[str, Any],
    folder: ModelFolder,
    prompt_tokens: int,
    most_tokens: int,
    schema: str | None = None,
    max_thought_tokens: int | None = None,
) -> SamplingOptions:
    """How to draw an answer to a prompt of so many tokens.

    Args:
        fields: what `read_fields` returned.
        folder: of the model.
        prompt_tokens: how long the prompt is.
        most_tokens: of an answer, where the request does not say.
        schema: that the answer follows, checked.
        max_thought_tokens: of a deliberation.

    Raises:
        ApiError: 400, a value is wrong, or the prompt leaves no room.
    """
    try:
        room = folder.require_room(prompt_tokens)
    except TooLongError as error:
        raise in_request(error, "prompt" if "prompt" in fields else "messages") from None
    name = "max_completion_tokens"
    asked = fields.get(name)
    if asked is None:
        name = "max_tokens"
        asked = fields.get(name)
    if asked is not None and asked > folder.context_length:
        raise wrong(name, f"{asked} is more than the model's context of {folder.context_length}")
    top_k = fields.get("top_k")
    return SamplingOptions(
        max_tokens=min(room, most_tokens if asked is None else asked),
        top_k=None if top_k is None else max(top_k, 0),
        logit_bias=_biases(fields.get("logit_bias"), folder.config.output_vocab_size),
        stop=_stops(fields.get("stop")),
        schema=schema,
        max_thought_tokens=max_thought_tokens,
        **{name: fields[name] for name in _PLAIN if name in fields},
    )


def _biases(value: Any, size: int) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong("logit_bias", f"expected an object, not {kind_of(value)}")
    if len(value) > MOST_BIASES:
        raise wrong("logit_bias", f"has {len(value)} tokens; at most {MOST_BIASES}")
    found = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < size):
            raise wrong("logit_bias", f"{shown(token)}: the model's tokens are 0 to {size - 1}")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise wrong("logit_bias", f"{token}: expected a number, not {kind_of(bias)}")
        if not -MOST_BIAS <= bias <= MOST_BIAS:
            raise wrong("logit_bias", f"{token}: expected -{MOST_BIAS} to {MOST_BIAS}")
        found[int(token)] = float(bias)
    return found


def _stops(value: Any) -> list[str] | None:
    if value is None:
        return None
    if value == "":
        raise wrong("stop", "an empty text would stop at once")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise wrong("stop", f"expected a text or a list of texts, not {kind_of(value)}")
    if len(texts) > MOST_STOPS:
        raise wrong("stop", f"has {len(texts)} texts; at most {MOST_STOPS}")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise wrong("stop", f"[{index}]: expected a text, not {kind_of(text)}")
        if len(require_text(f"stop[{index}]", text).encode()) > MOST_STOP_BYTES:
            raise wrong("stop", f"[{index}] is longer than {MOST_STOP_BYTES} bytes")
    return [text for text in texts if text] or None


def require_text(name: str, value: Any) -> str:
    """A text of characters.

    Raises:
        ApiError: 400, it is none, or holds a lone surrogate.
    """
    if not isinstance(value, str):
        raise wrong(name, f"expected a text, not {kind_of(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise wrong(name, "holds a lone surrogate, which is no character") from None
    return value


def read_stream_options(fields: Mapping[str, Any]) -> bool:
    """Whether the stream ends with usage.

    Raises:
        ApiError: 400, the options are wrong.
    """
    value = fields.get("stream_options")
    if value is None:
        return False
    options = read_object("stream_options", value, ("include_usage", "include_obfuscation"))
    if not fields.get("stream"):
        raise wrong("stream_options", "needs stream")
    wanted = options.get("include_usage")
    if wanted is not None and not isinstance(wanted, bool):
        raise wrong(
            "stream_options", f"include_usage: expected true or false, not {kind_of(wanted)}"
        )
    return bool(wanted)
