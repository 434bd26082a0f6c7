"""What the server answers, as JSON schemas: every key there is, and no other."""

from __future__ import annotations

from typing import Any

from apertus_mlx.server.errors import ERROR_TYPES
from apertus_mlx.server.field_schemas import FLAG, NULL, TEXT, Schema, or_null

_COUNT: Schema = {"type": "integer", "minimum": 0}
_BYTES: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}}
_NUMBERS: Schema = {"type": "array", "items": {"type": "number"}}
_TEXTS: Schema = {"type": "array", "items": TEXT}
_IDS: Schema = {"type": "array", "items": _COUNT}


def just(properties: dict[str, Schema], *optional: str) -> Schema:
    """An object of these keys, all of them but for `optional`, and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_FUNCTION = just({"name": TEXT, "arguments": TEXT})
_CALL = just({"id": TEXT, "type": {"const": "function"}, "function": _FUNCTION})
_CALL_PART = just(
    {
        "index": _COUNT,
        "id": TEXT,
        "type": {"const": "function"},
        "function": just({"name": TEXT, "arguments": TEXT}, "name"),
    },
    "id",
    "type",
)
_TOKEN: dict[str, Schema] = {"token": TEXT, "logprob": {"type": "number"}, "bytes": _BYTES}
_LOGPROBS = or_null(
    just({"content": _list(just({**_TOKEN, "top_logprobs": _list(just(_TOKEN))})), "refusal": NULL})
)
_TEXT_LOGPROBS = or_null(
    just(
        {
            "tokens": _TEXTS,
            "token_logprobs": _NUMBERS,
            "top_logprobs": _list({"type": "object", "additionalProperties": {"type": "number"}}),
            "text_offset": _IDS,
            "bytes": _list(_BYTES),
        }
    )
)
_PROMPT_LOGPROBS: Schema = _list(
    or_null(
        {
            "type": "object",
            "additionalProperties": just({"logprob": {"type": "number"}, "decoded_token": TEXT}),
        }
    )
)
_THOUGHTS: dict[str, Schema] = {"reasoning_content": TEXT, "reasoning": TEXT}
_MESSAGE = just(
    {
        "role": {"const": "assistant"},
        "content": or_null(TEXT),
        "refusal": NULL,
        **_THOUGHTS,
        "tool_calls": _list(_CALL),
    },
    *_THOUGHTS,
    "tool_calls",
)
_DELTA = just(
    {"role": {"const": "assistant"}, "content": TEXT, **_THOUGHTS, "tool_calls": _list(_CALL_PART)},
    *("role", "content", "tool_calls"),
    *_THOUGHTS,
)
_USAGE = just(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": just({"cached_tokens": _COUNT}),
        "completion_tokens_details": just({"reasoning_tokens": _COUNT}),
    },
    "completion_tokens_details",
)
_FINISH: Schema = {"enum": ["stop", "length", "tool_calls"]}


def _answer(kind: str, choice: Schema, *optional: str) -> Schema:
    return just(
        {
            "id": TEXT,
            "object": {"const": kind},
            "created": _COUNT,
            "model": TEXT,
            "choices": _list(choice),
            "usage": _USAGE,
        },
        *optional,
    )


def _text_choice(finish: Schema) -> Schema:
    return just(
        {
            "index": _COUNT,
            "text": TEXT,
            "logprobs": _TEXT_LOGPROBS,
            "finish_reason": finish,
            "reasoning_content": TEXT,
            "prompt_logprobs": _PROMPT_LOGPROBS,
            "prompt_token_ids": _IDS,
        },
        *("reasoning_content", "prompt_logprobs", "prompt_token_ids"),
    )


_MODEL = just(
    {
        "id": TEXT,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": TEXT,
        "aliases": _TEXTS,
        "context_length": _COUNT,
        "max_model_len": _COUNT,
        "meta": just({"n_ctx_train": _COUNT, "n_vocab": _COUNT, "size": _COUNT}),
    }
)
_ERROR = just(
    {
        "message": TEXT,
        "type": {"enum": [*dict.fromkeys(ERROR_TYPES.values())]},
        "param": or_null(TEXT),
        "code": or_null(TEXT),
    }
)
_IGNORED = just({"chat": _TEXTS, "completions": _TEXTS, "messages": _TEXTS, "responses": _TEXTS})
ANSWERS: dict[str, Schema] = {
    "Error": just({"error": _ERROR, "status": TEXT}, "status"),
    "ChatCompletion": _answer(
        "chat.completion",
        just(
            {"index": _COUNT, "message": _MESSAGE, "logprobs": _LOGPROBS, "finish_reason": _FINISH}
        ),
    ),
    "ChatCompletionChunk": _answer(
        "chat.completion.chunk",
        just(
            {
                "index": _COUNT,
                "delta": _DELTA,
                "logprobs": _LOGPROBS,
                "finish_reason": or_null(_FINISH),
            }
        ),
        "usage",
    ),
    "Completion": _answer("text_completion", _text_choice(_FINISH)),
    "CompletionChunk": _answer("text_completion", _text_choice(or_null(_FINISH)), "usage"),
    "InputTokens": just({"object": {"const": "response.input_tokens"}, "input_tokens": _COUNT}),
    "Model": _MODEL,
    "Models": just({"object": {"const": "list"}, "data": _list(_MODEL)}),
    "Status": just(
        {
            "model": _MODEL,
            # What it counts is told, not promised.
            "engine": {"type": "object", "properties": {"state": TEXT, "healthy": FLAG}},
            "cache": TEXT,
            "memory_limit_bytes": _COUNT,
            "accepted_but_ignored": _IGNORED,
        }
    ),
    "Health": just({"status": {"enum": ["ok", "sleeping"]}}),
    "Tokens": just(
        {"tokens": _IDS, "count": _COUNT, "max_model_len": _COUNT, "token_strs": _TEXTS},
        "token_strs",
    ),
    "Text": just({"prompt": TEXT}),
    "RenderedPrompt": just({"prompt": TEXT, "tokens": _IDS}),
}


def named(name: str) -> dict[str, Any]:
    """A reference to one of `ANSWERS`."""
    return {"$ref": f"#/components/schemas/{name}"}
