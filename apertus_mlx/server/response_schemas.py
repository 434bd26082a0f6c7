"""What `/v1/responses` takes and answers, as JSON schemas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apertus_mlx.server.answer_schemas import just
from apertus_mlx.server.chat_completions import EFFORTS
from apertus_mlx.server.field_schemas import (
    FLAG,
    NULL,
    TEXT,
    Schema,
    field_schema,
    known,
    or_null,
)
from apertus_mlx.server.fields import MOST_MESSAGES, MOST_TOOLS, fields_of
from apertus_mlx.server.input_items import MOST_LIMIT, ORDERS
from apertus_mlx.server.response_fields import (
    MOST_METADATA,
    MOST_METADATA_KEY,
    MOST_METADATA_VALUE,
    RESPONSE_FIELDS,
)
from apertus_mlx.server.response_items import ITEM_TYPES, MESSAGE_PARTS, ROLES
from apertus_mlx.server.responses import INCLUDED, LEFT_OUT_TOOLS
from apertus_mlx.text.given import FUNCTION_NAME

_COUNT: Schema = {"type": "integer", "minimum": 0}
_NAME: Schema = {"type": "string", "pattern": f"^{FUNCTION_NAME.pattern}$"}


def _typed(kind: str, properties: Mapping[str, Schema], *required: str) -> Schema:
    """An object of a type, which may have other keys too."""
    return {
        "type": "object",
        "properties": {"type": {"const": kind}, **properties},
        "required": ["type", *required],
    }


def _list(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    found: Schema = {"type": "array", "items": items, "minItems": least}
    return found if most is None else {**found, "maxItems": most}


def _texts(*kinds: str) -> Schema:
    """A text, or parts of these types."""
    parts = [
        _typed(kind, {key: TEXT}, key)
        for kind in kinds
        for key in ("refusal" if kind == "refusal" else "text",)
    ]
    return {"anyOf": [TEXT, _list({"anyOf": parts})]}


_PARTS = _texts(*MESSAGE_PARTS)
_ITEMS: tuple[Schema, ...] = (
    {
        "type": "object",
        "properties": {
            "type": {"enum": ["message", None]},
            "role": {"enum": list(ROLES)},
            "content": _PARTS,
        },
        "required": ["role", "content"],
    },
    _typed(
        "function_call", {"call_id": TEXT, "name": _NAME, "arguments": TEXT},
        "call_id", "name", "arguments",
    ),
    _typed(
        "function_call_output",
        {"call_id": TEXT, "output": _texts("input_text", "output_text", "text")},
        "call_id", "output",
    ),
    _typed(
        "reasoning",
        {"content": or_null(_texts("reasoning_text")), "summary": or_null(_texts("summary_text"))},
    ),
)  # fmt: skip
_FUNCTION: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "name": _NAME,
        "description": or_null(TEXT),
        "parameters": or_null({"type": "object"}),
        "strict": or_null(FLAG),
    },
    "required": ["type", "name"],
    "additionalProperties": NULL,
}
_CHOSEN = _typed("function", {"name": TEXT}, "name")
_FORMAT: Schema = {
    "anyOf": [
        known({"type": {"enum": ["text", "json_object"]}}, "type"),
        known(
            {
                "type": {"const": "json_schema"},
                "name": _NAME,
                "description": {},
                "schema": {"type": "object"},
                "strict": FLAG,
            },
            *("type", "name", "schema"),
        ),
    ]
}
_AUTO: Schema = {"const": "auto"}
_GIVEN: Mapping[str, Schema] = {
    "input": {
        "anyOf": [
            {"type": "string", "minLength": 1},
            _list({"anyOf": list(_ITEMS)}, 1, MOST_MESSAGES),
        ]
    },
    "instructions": TEXT,
    "previous_response_id": TEXT,
    "tools": _list(
        {"anyOf": [_FUNCTION, *(_typed(kind, {}) for kind in LEFT_OUT_TOOLS)]}, 0, MOST_TOOLS
    ),
    "tool_choice": {
        "anyOf": [
            {"enum": ["auto", "none", "required"]},
            _CHOSEN,
            known(
                {
                    "type": {"const": "allowed_tools"},
                    "mode": {"enum": ["auto", "required"]},
                    "tools": _list(_CHOSEN, 1),
                },
                *("type", "mode", "tools"),
            ),
        ]
    },
    "text": known({"format": _FORMAT, "verbosity": {}}),
    "reasoning": known(
        {"effort": {"enum": list(EFFORTS)}, "summary": _AUTO, "generate_summary": _AUTO}
    ),
    "include": _list({"enum": list(INCLUDED)}),
    "metadata": {
        "type": "object",
        "propertyNames": {"maxLength": MOST_METADATA_KEY},
        "additionalProperties": {"type": "string", "maxLength": MOST_METADATA_VALUE},
        "maxProperties": MOST_METADATA,
    },
}


def response_body_schema(model: Schema) -> Schema:
    """What the body of a request may be; `model` is what its name may be."""
    fields = fields_of("responses", RESPONSE_FIELDS).items()
    properties = {name: field_schema(each, _GIVEN) for name, each in fields if name != "model"}
    return known({"model": model, **properties}, "input")


_STATUS: Schema = {"enum": ["in_progress", "completed", "incomplete"]}
_ITEM: dict[str, Schema] = {"id": TEXT, "status": _STATUS}
_TEXT_PART = just(
    {
        "type": {"const": "output_text"},
        "text": TEXT,
        "annotations": _list({}, 0, 0),
        "logprobs": _list({}, 0, 0),
    }
)
_THOUGHT_PART = just({"type": {"const": "reasoning_text"}, "text": TEXT})
_OUTPUT: Schema = {
    "anyOf": [
        just(
            {
                **_ITEM,
                "type": {"const": "message"},
                "role": {"const": "assistant"},
                "content": _list(_TEXT_PART),
            }
        ),
        just(
            {
                **_ITEM,
                "type": {"const": "reasoning"},
                "summary": _list({}, 0, 0),
                "encrypted_content": NULL,
                "content": _list(_THOUGHT_PART),
            }
        ),
        just(
            {
                **_ITEM,
                "type": {"const": "function_call"},
                "call_id": TEXT,
                "name": TEXT,
                "arguments": TEXT,
            }
        ),
    ]
}
_USAGE = just(
    {
        "input_tokens": _COUNT,
        "input_tokens_details": just({"cached_tokens": _COUNT, "cache_write_tokens": _COUNT}),
        "output_tokens": _COUNT,
        "output_tokens_details": just({"reasoning_tokens": _COUNT}),
        "total_tokens": _COUNT,
    }
)
_RESPONSE = just(
    {
        "id": TEXT,
        "object": {"const": "response"},
        "created_at": _COUNT,
        "status": {"enum": ["in_progress", "completed", "incomplete", "failed"]},
        "background": {"const": False},
        "error": or_null(just({"code": TEXT, "message": TEXT})),
        "incomplete_details": or_null(just({"reason": {"const": "max_output_tokens"}})),
        "instructions": or_null(TEXT),
        "max_output_tokens": or_null(_COUNT),
        "previous_response_id": or_null(TEXT),
        "temperature": or_null({"type": "number"}),
        "top_p": or_null({"type": "number"}),
        "metadata": {"type": "object", "additionalProperties": TEXT},
        "model": TEXT,
        "output": _list(_OUTPUT),
        "parallel_tool_calls": FLAG,
        "reasoning": just({"effort": or_null(TEXT), "summary": NULL}),
        "store": FLAG,
        "text": just({"format": {"type": "object"}}),
        "tool_choice": {"type": ["string", "object"]},
        "tools": _list({"type": "object"}),
        "truncation": {"const": "disabled"},
        "usage": or_null(_USAGE),
    }
)


def _event(kinds: tuple[str, ...], **properties: Any) -> Schema:
    kind = {"enum": [f"response.{each}" for each in kinds]}
    return just({"type": kind, "sequence_number": _COUNT, **properties})


def _events() -> Schema:
    item: dict[str, Schema] = {"output_index": _COUNT}
    inside: dict[str, Schema] = {**item, "item_id": TEXT}
    part: dict[str, Schema] = {**inside, "content_index": _COUNT}
    none: dict[str, Schema] = {"logprobs": _list({}, 0, 0)}
    call = "function_call_arguments"
    lives = ("created", "in_progress", "completed", "incomplete", "failed")
    return {
        "anyOf": [
            _event(lives, response=_RESPONSE),
            _event(("output_item.added", "output_item.done"), **item, item=_OUTPUT),
            _event(
                ("content_part.added", "content_part.done"), **part,
                part={"anyOf": [_TEXT_PART, _THOUGHT_PART]},
            ),
            _event(("output_text.delta",), **part, delta=TEXT, **none),
            _event(("output_text.done",), **part, text=TEXT, **none),
            _event(("reasoning_text.delta",), **part, delta=TEXT),
            _event(("reasoning_text.done",), **part, text=TEXT),
            _event((f"{call}.delta",), **inside, delta=TEXT),
            _event((f"{call}.done",), **inside, arguments=TEXT, name=TEXT),
        ]
    }  # fmt: skip


# What the query of a list of items may hold.
PAGE: tuple[Schema, ...] = (
    {"name": "after", "in": "query", "schema": TEXT},
    {"name": "limit", "in": "query",
     "schema": {"type": "integer", "minimum": 1, "maximum": MOST_LIMIT}},
    {"name": "order", "in": "query", "schema": {"enum": list(ORDERS)}},
)  # fmt: skip
RESPONSE_ANSWERS: dict[str, Schema] = {
    "Response": _RESPONSE,
    "ResponseEvent": _events(),
    "ResponseItems": just(
        {
            "object": {"const": "list"},
            "data": _list(
                {
                    "type": "object",
                    "properties": {"id": TEXT, "type": {"enum": list(ITEM_TYPES)}},
                    "required": ["id", "type"],
                },
                0,
                MOST_LIMIT,
            ),
            "first_id": or_null(TEXT),
            "last_id": or_null(TEXT),
            "has_more": FLAG,
        }
    ),
    "ResponseDeleted": just(
        {"id": TEXT, "object": {"const": "response"}, "deleted": {"const": True}}
    ),
}
