"""What the body of a request to `/v1/responses` may hold; docs/server.md has it in words."""

from __future__ import annotations

from dataclasses import replace

from apertus_mlx.server.fields import (
    MOST_TOKENS,
    MOST_TOOLS,
    Endpoint,
    Field,
    Flag,
    Given,
    Whole,
    fields_of,
)

_OF: tuple[Endpoint, ...] = ("responses",)
MOST_METADATA, MOST_METADATA_KEY, MOST_METADATA_VALUE = 16, 64, 512
# Read as in a chat.
PASSED_ON = (
    *("model", "temperature", "top_p", "top_k", "min_p", "seed", "stream"),
    *("parallel_tool_calls", "cache_key", "prompt_cache_key"),
)
_CHAT = fields_of("chat")

RESPONSE_FIELDS = (
    *(replace(_CHAT[name], endpoints=_OF) for name in PASSED_ON if name != "seed"),
    Field("seed", "honoured", _CHAT["seed"].kind, "", _OF),
    Field("input", "honoured", Given("text or list of items"),
          "`message`, `function_call`, `function_call_output`, `reasoning`; text only", _OF),
    Field("instructions", "honoured", Given("text"),
          "the system message; not taken over from an earlier response", _OF),
    Field("previous_response_id", "honoured", Given("id of a kept response"),
          "its input and output come first", _OF),
    Field("store", "honoured", Flag(), "default: true; whether the response is kept", _OF),
    Field("max_output_tokens", "honoured", Whole(1, MOST_TOKENS),
          "at most the context; cut to the room that the prompt leaves", _OF),
    Field("tools", "honoured", Given("list of functions"),
          f"at most {MOST_TOOLS}; `web_search`, `image_generation` and `namespace`, which Codex "
          "offers always, are left out; other types are refused", _OF),
    Field("tool_choice", "honoured",
          Given("`auto`, `none`, `required`, a function, `allowed_tools`"), "", _OF),
    Field("text", "honoured", Given("`{format}`: `text`, `json_object`, `json_schema`"),
          "a schema is followed always; `verbosity` is ignored", _OF),
    Field("reasoning", "honoured", Given("`{effort, summary}`"),
          "efforts `none` and `minimal` do not deliberate, all others do; `summary` only as "
          "`auto`: thoughts come whole", _OF),
    Field("include", "honoured", Given("list"),
          "only `reasoning.encrypted_content`, which changes nothing: items of type `reasoning` "
          "hold their text", _OF),
    Field("metadata", "honoured", Given("object of texts"),
          f"at most {MOST_METADATA}; told again in the response", _OF),
    *(
        Field(name, "ignored", note=note, endpoints=_OF)
        for name, note in (
            ("stream_options", "there is no obfuscation"),
            ("max_tool_calls", "counts tools that the server runs; it runs none"),
            ("user", "no account is kept"),
            ("client_metadata", "no account is kept"),
            ("safety_identifier", "no account is kept"),
            ("service_tier", "there is one"),
            ("prompt_cache_retention", "memory decides"),
        )
    ),
    Field("truncation", "refused", note="nothing is ever cut from a prompt", endpoints=_OF,
          harmless=("disabled",)),
    Field("background", "refused", endpoints=_OF, harmless=(False,)),
    Field("top_logprobs", "refused", endpoints=_OF, harmless=(0,)),
    Field("conversation", "refused", note="use `previous_response_id`", endpoints=_OF),
    Field("prompt", "refused", note="no prompts are kept", endpoints=_OF),
    Field("context_management", "refused", note="nothing is ever cut from a prompt",
          endpoints=_OF, harmless=([],)),
)  # fmt: skip
