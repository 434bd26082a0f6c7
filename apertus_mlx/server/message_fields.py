"""What the body of a request to `/v1/messages` may hold; docs/server.md has it in words."""

from __future__ import annotations

from apertus_mlx.checkpoint.generation_config import RANGES
from apertus_mlx.server.fields import (
    MOST_KEY,
    MOST_STOP_BYTES,
    MOST_STOPS,
    MOST_TOKENS,
    MOST_TOOLS,
    Endpoint,
    Field,
    Flag,
    Given,
    Name,
    Number,
    Whole,
)

_OF: tuple[Endpoint, ...] = ("messages",)
_TEMPERATURE, _TOP_P = RANGES["temperature"], RANGES["top_p"]

MESSAGE_FIELDS = (
    Field("model", "honoured", Given("text"), "the served name, an alias or `default`; else 404",
          _OF),
    Field("messages", "honoured", Given("list of messages"),
          "blocks `text`, `tool_use`, `tool_result`, `thinking`; `redacted_thinking` is left out",
          _OF),
    Field("max_tokens", "honoured", Whole(1, MOST_TOKENS),
          "required; at most the context; cut to the room that the prompt leaves", _OF),
    Field("system", "honoured", Given("text or list of text blocks"),
          "blocks are joined by an empty line", _OF),
    Field("temperature", "honoured",
          Number(_TEMPERATURE.least, _TEMPERATURE.most, _TEMPERATURE.or_zero),
          "default: the model's", _OF),
    Field("top_p", "honoured", Number(_TOP_P.least, _TOP_P.most), "default: the model's", _OF),
    Field("top_k", "honoured", Whole(-1, 2**63 - 1, clamp=True),
          "0 and -1 take all; above the vocabulary too", _OF),
    Field("stop_sequences", "honoured", Given("list of texts"),
          f"at most {MOST_STOPS} of {MOST_STOP_BYTES} bytes; empty ones are dropped", _OF),
    Field("stream", "honoured", Flag(), "", _OF),
    Field("tools", "honoured", Given("list of tools with `input_schema`"),
          f"at most {MOST_TOOLS}; tools that the server would run are refused by their type", _OF),
    Field("tool_choice", "honoured", Given("`{type}`: `auto`, `any`, `tool`, `none`"),
          "with `disable_parallel_tool_use`", _OF),
    Field("thinking", "honoured", Given("`{type}`: `enabled`, `adaptive`, `disabled`"),
          "`budget_tokens` ends the deliberation; `display` `omitted` hides it", _OF),
    Field("output_config", "honoured", Given("`{format, effort}`"),
          "`format` is a `json_schema`, which is followed always; `effort` changes nothing", _OF),
    Field("cache_key", "honoured", Name(MOST_KEY), "the slot that keeps what was computed", _OF),
    *(
        Field(name, "ignored", note=note, endpoints=_OF)
        for name, note in (
            ("metadata", "no account is kept"),
            ("service_tier", "there is one"),
            ("cache_control", "prefixes are found by their tokens"),
            ("context_management", "nothing is ever cut from a prompt"),
            ("user_profile_id", "no account is kept"),
        )
    ),
    Field("mcp_servers", "refused", note="no URL is ever fetched", endpoints=_OF, harmless=([],)),
    Field("container", "refused", note="nothing is run", endpoints=_OF),
    Field("inference_geo", "refused", endpoints=_OF),
    Field("speed", "refused", endpoints=_OF, harmless=("standard",)),
    Field("diagnostics", "refused", endpoints=_OF),
)  # fmt: skip
