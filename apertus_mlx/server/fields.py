"""What the body of a request may hold: each field honoured, ignored or refused.

The one table that requests are checked by; docs/server.md has it in words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from apertus_mlx.checkpoint.generation_config import RANGES
from apertus_mlx.generation.options import MOST_BIAS
from apertus_mlx.server.errors import ApiError, wrong

Treatment = Literal["honoured", "ignored", "refused"]
Endpoint = Literal["chat", "completions", "messages", "responses"]
MOST_CHOICES, MOST_STOPS, MOST_STOP_BYTES, MOST_TOP_LOGPROBS = 8, 64, 256, 20
MOST_PROMPTS, MOST_BIASES, MOST_TOOLS, MOST_MESSAGES = 32, 1024, 256, 10_000
MOST_TOKENS, MOST_KEY = 2**31 - 1, 512


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number; `clamp` takes what is above `most` as `most`."""

    least: int
    most: int
    clamp: bool = False

    def read(self, name: str, value: Any) -> int:
        """The number."""
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong(name, f"expected a whole number, not {kind_of(value)}")
        if value > self.most and self.clamp:
            return self.most
        if not self.least <= value <= self.most:
            raise wrong(name, f"{shown(value)}: expected {self.least} to {self.most}")
        return value

    def __str__(self) -> str:
        return f"{self.least} to {self.most}" if self.most < 2**31 else f"{self.least} or more"


@dataclass(frozen=True, slots=True)
class Number:
    """A number."""

    least: float
    most: float
    or_zero: bool = False

    def read(self, name: str, value: Any) -> float:
        """The number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(name, f"expected a number, not {kind_of(value)}")
        if self.or_zero and value == 0:
            return 0.0
        if not self.least <= value <= self.most or not math.isfinite(value):
            raise wrong(name, f"{shown(value)}: expected {self}")
        return float(value)

    def __str__(self) -> str:
        return f"{self.least:.3g} to {self.most:.3g}"


@dataclass(frozen=True, slots=True)
class Flag:
    """True or false."""

    def read(self, name: str, value: Any) -> bool:
        """The value."""
        if not isinstance(value, bool):
            raise wrong(name, f"expected true or false, not {kind_of(value)}")
        return value

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True, slots=True)
class Given:
    """What a reader of its own reads; `words` say what it takes."""

    words: str

    def read(self, name: str, value: Any) -> Any:  # noqa: ARG002
        """The value as it came."""
        return value

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True, slots=True)
class Name:
    """A text of bounded length."""

    most: int

    def read(self, name: str, value: Any) -> str:
        """The text."""
        if not isinstance(value, str):
            raise wrong(name, f"expected a text, not {kind_of(value)}")
        if not 1 <= len(value) <= self.most:
            raise wrong(name, f"has {len(value)} characters; expected 1 to {self.most}")
        return value

    def __str__(self) -> str:
        return f"text of 1 to {self.most} characters"


Kind = Whole | Number | Flag | Given | Name


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a request's body.

    Attributes:
        name: on the wire.
        treatment: what is done with it. A refused one may still be null, or one of `harmless`.
        kind: what it takes, if it is honoured.
        note: what a reader must know beside it.
        endpoints: where it may stand.
        harmless: values that say what is so anyway.
    """

    name: str
    treatment: Treatment
    kind: Kind = Given("")
    note: str = ""
    endpoints: tuple[Endpoint, ...] = ("chat", "completions")
    harmless: tuple[Any, ...] = ()


def _range(name: str) -> Number:
    found = RANGES[name]
    return Number(found.least, found.most, found.or_zero)


_CHAT: tuple[Endpoint, ...] = ("chat",)
_COMPLETIONS: tuple[Endpoint, ...] = ("completions",)
_EMPTY: tuple[Any, ...] = ([], {}, "", False)

FIELDS = (
    Field("model", "honoured", Given("text"), "the served name, an alias or `default`; else 404"),
    Field("messages", "honoured", Given("list of messages"), "text only", _CHAT),
    Field(
        "prompt", "honoured", Given("text, token ids, or a list of either"),
        f"at most {MOST_PROMPTS} prompts; no text becomes a control token", _COMPLETIONS,
    ),
    Field("max_completion_tokens", "honoured", Whole(1, MOST_TOKENS), "wins over `max_tokens`",
          _CHAT),
    Field("max_tokens", "honoured", Whole(1, MOST_TOKENS),
          "at most the context; cut to the room that the prompt leaves"),
    Field("temperature", "honoured", _range("temperature"), "default: the model's"),
    Field("top_p", "honoured", _range("top_p"), "default: the model's"),
    Field("top_k", "honoured", Whole(-1, 2**63 - 1, clamp=True),
          "0 and -1 take all; above the vocabulary too"),
    Field("min_p", "honoured", _range("min_p")),
    Field("seed", "honoured", Whole(0, 2**63 - 1 - MOST_CHOICES),
          "choice `i` is drawn with `seed + i`"),
    Field("stop", "honoured", Given("text or list of texts"),
          f"at most {MOST_STOPS} of {MOST_STOP_BYTES} bytes; empty ones in a list are dropped"),
    Field("stream", "honoured", Flag()),
    Field("stream_options", "honoured", Given("object"),
          "`include_usage`; `include_obfuscation` is ignored"),
    Field("logprobs", "honoured", Flag(),
          "of the model's own logits, before penalties and temperature", _CHAT),
    Field("logprobs", "honoured", Whole(0, MOST_TOP_LOGPROBS), "likewise", _COMPLETIONS),
    Field("top_logprobs", "honoured", Whole(0, MOST_TOP_LOGPROBS), "needs `logprobs`", _CHAT),
    Field("prompt_logprobs", "honoured", Whole(0, MOST_TOP_LOGPROBS), "not with `stream`",
          _COMPLETIONS),
    Field("logit_bias", "honoured", Given("object of token ids"),
          f"-{MOST_BIAS} to {MOST_BIAS}, at most {MOST_BIASES}"),
    Field("presence_penalty", "honoured", Number(-2, 2)),
    Field("frequency_penalty", "honoured", Number(-2, 2)),
    Field("repetition_penalty", "honoured", _range("repetition_penalty")),
    Field("n", "honoured", Whole(1, MOST_CHOICES), "from one prefill"),
    Field("tools", "honoured", Given("list of functions"), f"at most {MOST_TOOLS}", _CHAT),
    Field("tool_choice", "honoured",
          Given("`auto`, `none`, `required`, a function, `allowed_tools`"), "", _CHAT),
    Field("parallel_tool_calls", "honoured", Flag(), "", _CHAT),
    Field("response_format", "honoured", Given("`text`, `json_object`, `json_schema`"),
          "a schema is followed always", _CHAT),
    Field("reasoning_effort", "honoured", Given("text"),
          "`none` and `minimal` do not deliberate, all others do", _CHAT),
    Field("reasoning", "honoured", Given("`{effort}`"), "as `reasoning_effort`", _CHAT),
    Field("chat_template_kwargs", "honoured", Given("`{enable_thinking}`"), "nothing else", _CHAT),
    Field("continue_final_message", "honoured", Flag(), "the last message is the assistant's",
          _CHAT),
    Field("add_generation_prompt", "honoured", Flag(),
          "false only with `continue_final_message`", _CHAT),
    Field("add_special_tokens", "honoured", Flag(), "of texts: one BOS first, by default",
          _COMPLETIONS),
    Field("cache_key", "honoured", Name(MOST_KEY), "the slot that keeps what was computed"),
    Field("prompt_cache_key", "honoured", Name(MOST_KEY), "as `cache_key`, which wins"),
    *(
        Field(name, "ignored", note=note)
        for name, note in (
            ("user", "no account is kept"),
            ("metadata", "nothing is stored"),
            ("service_tier", "there is one"),
            ("safety_identifier", "no account is kept"),
            ("prompt_cache_retention", "memory decides"),
            ("verbosity", "the model has no such switch"),
            ("prediction", "changes speed alone"),
            ("cache_control", "prefixes are found by their tokens"),
            ("context_management", "nothing is ever cut from a prompt"),
        )
    ),
    Field("store", "refused", note="nothing is stored", harmless=(False,)),
    Field("best_of", "refused", endpoints=_COMPLETIONS, harmless=(1,)),
    Field("echo", "refused", note="see `prompt_logprobs`", endpoints=_COMPLETIONS,
          harmless=(False,)),
    Field("suffix", "refused", endpoints=_COMPLETIONS, harmless=("",)),
    Field("response_format", "refused", endpoints=_COMPLETIONS, harmless=({"type": "text"},)),
    Field("functions", "refused", note="use `tools`", endpoints=_CHAT, harmless=_EMPTY),
    Field("function_call", "refused", note="use `tool_choice`", endpoints=_CHAT),
    Field("modalities", "refused", endpoints=_CHAT, harmless=(["text"],)),
    Field("audio", "refused", endpoints=_CHAT),
    Field("web_search_options", "refused", endpoints=_CHAT),
    Field("previous_response_id", "refused", endpoints=_CHAT),
    Field("chat_template", "refused", note="the model's own is used", endpoints=_CHAT),
    Field("adapters", "refused"),
    Field("draft_model", "refused"),
    Field("guided_json", "refused", note="use `response_format`", endpoints=_CHAT),
    Field("guided_regex", "refused", endpoints=_CHAT),
    Field("guided_choice", "refused", endpoints=_CHAT),
    Field("guided_grammar", "refused", endpoints=_CHAT),
    Field("grammar", "refused"),
)  # fmt: skip


def fields_of(endpoint: Endpoint, table: Sequence[Field] = FIELDS) -> dict[str, Field]:
    """The fields of an endpoint by name."""
    return {field.name: field for field in table if endpoint in field.endpoints}


def read_fields(
    body: Mapping[str, Any], endpoint: Endpoint, table: Sequence[Field] = FIELDS
) -> dict[str, Any]:
    """The fields of a body that are honoured and given, checked; null counts as not given.

    Args:
        body: of the request.
        endpoint: that it was sent to.
        table: of an API that has one of its own.

    Raises:
        ApiError: 400, one is wrong or not supported.
    """
    known, found = fields_of(endpoint, table), {}
    for name, value in body.items():
        if value is None:
            continue
        field = known.get(name)
        if field is None:
            raise unsupported(name)
        if field.treatment == "ignored":
            continue
        if field.treatment == "refused":
            if not any(value == each and type(value) is type(each) for each in field.harmless):
                raise unsupported(name, field.note)
            continue
        found[name] = field.kind.read(name, value)
    return found


def unsupported(name: str, note: str = "") -> ApiError:
    """400: a field that would have to change the answer, and cannot."""
    name = shown(name)
    words = "is not supported" + (f"; {note}" if note else "")
    return wrong(name, words, code="unsupported_parameter")


def read_cache_key(fields: Mapping[str, Any]) -> str | None:
    """The slot that a request names."""
    key: str | None = fields.get("cache_key", fields.get("prompt_cache_key"))
    return key


def ignored_fields(endpoint: Endpoint, table: Sequence[Field] = FIELDS) -> list[str]:
    """What may stand in a body and changes nothing."""
    fields = fields_of(endpoint, table).items()
    return [name for name, field in fields if field.treatment == "ignored"]


def read_object(name: str, value: Any, keys: tuple[str, ...]) -> Mapping[str, Any]:
    """An object of known keys.

    Raises:
        ApiError: 400, it is none, or has another key.
    """
    if not isinstance(value, dict):
        raise wrong(name, f"expected an object, not {kind_of(value)}")
    for key in value:
        if key not in keys and value[key] is not None:
            raise unsupported(f"{name}.{key}")
    return value


def require_messages(messages: Any) -> None:
    """Check that a conversation is a list of at least one message, and not of too many.

    Raises:
        ApiError: 400, it is not.
    """
    if not isinstance(messages, list):
        raise wrong("messages", f"expected a list of messages, not {kind_of(messages)}")
    if not messages:
        raise wrong("messages", "there is no message")
    if len(messages) > MOST_MESSAGES:
        raise wrong("messages", f"there are {len(messages)}; at most {MOST_MESSAGES}")


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    if value is None:
        return "null"
    kinds = ((bool, "a boolean"), (str, "a text"), (int | float, "a number"), (list, "a list"))
    return next((words for kind, words in kinds if isinstance(value, kind)), "an object")


def shown(value: Any) -> str:
    """A value in a message: short, without line breaks and other controls."""
    text = value if isinstance(value, str) else str(value) if _short(value) else repr(value)[:60]
    return "".join(c if c.isprintable() else "?" for c in text[:60])


def _short(value: Any) -> bool:
    return not isinstance(value, int) or abs(value) < 10**50
