"""The fields of requests as JSON schemas, made of the one table in `fields.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apertus_mlx.generation.options import MOST_BIAS
from apertus_mlx.server.chat_completions import EFFORTS
from apertus_mlx.server.fields import (
    MOST_BIASES,
    MOST_MESSAGES,
    MOST_PROMPTS,
    MOST_STOPS,
    MOST_TOOLS,
    Endpoint,
    Field,
    Flag,
    Kind,
    Name,
    Number,
    Whole,
    fields_of,
)
from apertus_mlx.text.given import FUNCTION_NAME
from apertus_mlx.text.messages import ROLES

Schema = dict[str, Any]
NULL: Schema = {"type": "null"}
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
TOKEN_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_NAME: Schema = {"type": "string", "pattern": f"^{FUNCTION_NAME.pattern}$"}


def known(properties: Mapping[str, Schema], *required: str) -> Schema:
    """An object of these keys; others may only be null, and so may those not required."""
    return {
        "type": "object",
        "properties": {
            name: each if name in required else or_null(each) for name, each in properties.items()
        },
        "required": list(required),
        "additionalProperties": NULL,
    }


def or_null(schema: Schema) -> Schema:
    """What `schema` takes, or null."""
    return {"anyOf": [schema, NULL]} if schema else {}


_PARTS: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"enum": ["text", None]}, "text": TEXT},
        "required": ["text"],
    },
}
_CALL: Schema = {
    "type": "object",
    "properties": {
        "id": or_null(TEXT),
        "type": {"enum": ["function", None]},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 64},
                "arguments": {"type": ["string", "object", "null"]},
            },
            "required": ["name"],
        },
    },
    "required": ["function"],
}
_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {"anyOf": [TEXT, _PARTS, {"type": "object"}, NULL]},
        "tool_calls": or_null({"type": "array", "items": _CALL}),
        "tool_call_id": or_null(TEXT),
    },
    "required": ["role"],
}
_FUNCTION: Schema = {
    "type": "object",
    "properties": {
        "name": _NAME,
        "description": or_null(TEXT),
        "parameters": or_null({"type": "object"}),
        "strict": or_null(FLAG),
    },
    "required": ["name"],
}
_TOOL: Schema = {
    "type": "object",
    "properties": {"type": {"enum": ["function", None]}, "function": _FUNCTION},
    "required": ["function"],
}
_CHOSEN: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": TEXT}, "required": ["name"]},
    },
    "required": ["type", "function"],
}
_ALLOWED: Schema = {
    "type": "object",
    "properties": {
        "type": {"const": "allowed_tools"},
        "allowed_tools": known(
            {
                "mode": {"enum": ["auto", "required"]},
                "tools": {"type": "array", "items": _CHOSEN, "minItems": 1},
            },
            "mode",
            "tools",
        ),
    },
    "required": ["type", "allowed_tools"],
}
_EFFORT: Schema = {"enum": list(EFFORTS)}
# What the readers of their own read, which the table has in words.
_GIVEN: Mapping[str, Schema] = {
    "messages": {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": MOST_MESSAGES},
    "prompt": {
        "anyOf": [
            {"type": "string", "minLength": 1},
            TOKEN_IDS,
            {
                "type": "array",
                "items": {"anyOf": [{"type": "string", "minLength": 1}, TOKEN_IDS]},
                "minItems": 1,
                "maxItems": MOST_PROMPTS,
            },
        ]
    },
    "stop": {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": TEXT, "maxItems": MOST_STOPS},
        ]
    },
    "stream_options": known({"include_usage": FLAG, "include_obfuscation": {}}),
    "logit_bias": {
        "type": "object",
        "patternProperties": {
            "^[0-9]{1,9}$": {"type": "number", "minimum": -MOST_BIAS, "maximum": MOST_BIAS}
        },
        "additionalProperties": False,
        "maxProperties": MOST_BIASES,
    },
    "tools": {
        "type": "array",
        "items": {"anyOf": [_TOOL, _FUNCTION]},
        "maxItems": MOST_TOOLS,
    },
    "tool_choice": {"anyOf": [{"enum": ["auto", "none", "required"]}, _CHOSEN, _ALLOWED]},
    "response_format": known(
        {
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": known(
                {
                    "name": _NAME,
                    "description": {},
                    "schema": {"type": "object"},
                    "strict": FLAG,
                },
                "name",
                "schema",
            ),
        },
        "type",
    ),
    "reasoning_effort": _EFFORT,
    "reasoning": known({"effort": _EFFORT, "summary": {}}),
    "chat_template_kwargs": known({"enable_thinking": FLAG}),
}


def body_schema(endpoint: Endpoint, model: Schema) -> Schema:
    """What the body of a request to an endpoint may be; `model` is what its name may be."""
    required = "messages" if endpoint == "chat" else "prompt"
    fields = {
        name: field_schema(field, _GIVEN)
        for name, field in fields_of(endpoint).items()
        if name != "model"
    }
    return known({"model": model, **fields}, required)


def field_schema(field: Field, given: Mapping[str, Schema]) -> Schema:
    """What a field may be; `given` has what the readers of their own read."""
    note: Schema = {"description": field.note} if field.note else {}
    if field.treatment == "ignored":
        return {}
    if field.treatment == "refused":
        return {"enum": [*field.harmless, None], **note}
    return {**_of_kind(field.name, field.kind, given), **note}


def _of_kind(name: str, kind: Kind, given: Mapping[str, Schema]) -> Schema:
    if isinstance(kind, Whole):
        most = {} if kind.clamp else {"maximum": kind.most}
        return {"type": "integer", "minimum": kind.least, **most}
    if isinstance(kind, Number):
        within: Schema = {"type": "number", "minimum": kind.least, "maximum": kind.most}
        return {"anyOf": [within, {"const": 0}]} if kind.or_zero else within
    if isinstance(kind, Name):
        return {"type": "string", "minLength": 1, "maxLength": kind.most}
    return FLAG if isinstance(kind, Flag) else given[name]
