"""What `/v1/messages` takes and answers, as JSON schemas."""

from __future__ import annotations

from apertus_mlx.server.answer_schemas import just
from apertus_mlx.server.field_schemas import FLAG, TEXT, Schema, field_schema, known, or_null
from apertus_mlx.server.fields import MOST_MESSAGES, MOST_STOPS, MOST_TOOLS, fields_of
from apertus_mlx.server.message_blocks import ROLES
from apertus_mlx.server.message_errors import MESSAGE_ERROR_TYPES
from apertus_mlx.server.message_fields import MESSAGE_FIELDS
from apertus_mlx.server.message_tools import IGNORED_OF_TOOLS
from apertus_mlx.server.messages import DISPLAYS, EFFORTS
from apertus_mlx.text.given import FUNCTION_NAME

_COUNT: Schema = {"type": "integer", "minimum": 0}


def _block(kind: str, properties: dict[str, Schema], *required: str) -> Schema:
    return {
        "type": "object",
        "properties": {"type": {"const": kind}, **properties},
        "required": ["type", *required],
    }


def _list(items: Schema, most: int | None = None) -> Schema:
    found: Schema = {"type": "array", "items": items}
    return found if most is None else {**found, "maxItems": most}


_TEXT = _block("text", {"text": TEXT}, "text")
_TEXTS: Schema = {"anyOf": [TEXT, _list(_TEXT)]}
_CALL = _block(
    "tool_use", {"id": TEXT, "name": TEXT, "input": {"type": "object"}}, "id", "name", "input"
)
_RESULT = _block(
    "tool_result",
    {"tool_use_id": TEXT, "content": or_null(_TEXTS), "is_error": or_null(FLAG)},
    "tool_use_id",
)
_THINKING = _block("thinking", {"thinking": TEXT}, "thinking")
_BLOCKS = _list({"anyOf": [_TEXT, _CALL, _RESULT, _THINKING, _block("redacted_thinking", {})]})
_MESSAGE: Schema = {
    "type": "object",
    "properties": {"role": {"enum": list(ROLES)}, "content": {"anyOf": [TEXT, _BLOCKS]}},
    "required": ["role", "content"],
}
_TOOL = known(
    {
        "name": {"type": "string", "pattern": f"^{FUNCTION_NAME.pattern}$"},
        "input_schema": {"type": "object"},
        "description": TEXT,
        "strict": FLAG,
        "type": {"const": "custom"},
        "defer_loading": {"const": False},
        "allowed_callers": {"const": ["direct"]},
        "input_examples": {"const": []},
        **{name: {} for name in IGNORED_OF_TOOLS},
    },
    "name",
    "input_schema",
)
_ALONE: dict[str, Schema] = {"disable_parallel_tool_use": FLAG}
_DISPLAY: dict[str, Schema] = {"display": {"enum": list(DISPLAYS)}}
_FORMAT = known({"type": {"const": "json_schema"}, "schema": {"type": "object"}}, "type", "schema")
_GIVEN: dict[str, Schema] = {
    "messages": {**_list(_MESSAGE, MOST_MESSAGES), "minItems": 1},
    "system": _TEXTS,
    "stop_sequences": _list(TEXT, MOST_STOPS),
    "tools": _list(_TOOL, MOST_TOOLS),
    "tool_choice": {
        "anyOf": [
            known({"type": {"enum": ["auto", "any", "none"]}, **_ALONE}, "type"),
            known({"type": {"const": "tool"}, "name": TEXT, **_ALONE}, "type", "name"),
        ]
    },
    "thinking": {
        "anyOf": [
            known({"type": {"enum": ["adaptive", "disabled"]}, **_DISPLAY}, "type"),
            known(
                {
                    "type": {"const": "enabled"},
                    "budget_tokens": {"type": "integer", "minimum": 1},
                    **_DISPLAY,
                },
                "type",
                "budget_tokens",
            ),
        ]
    },
    "output_config": known({"format": _FORMAT, "effort": {"enum": list(EFFORTS)}}),
}


def message_body_schema(model: Schema, *required: str) -> Schema:
    """What a body may be; `model` is what its name may be, `messages` are required anyway."""
    fields = fields_of("messages", MESSAGE_FIELDS)
    found = {name: field_schema(field, _GIVEN) for name, field in fields.items() if name != "model"}
    return known({"model": model, **found}, "messages", *required)


_USAGE = just(
    {
        "input_tokens": _COUNT,
        "cache_read_input_tokens": _COUNT,
        "cache_creation_input_tokens": _COUNT,
        "output_tokens": _COUNT,
    }
)
_STOP: dict[str, Schema] = {
    "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use", None]},
    "stop_sequence": or_null(TEXT),
}
_TOLD_BLOCK: Schema = {
    "anyOf": [
        just({"type": {"const": "text"}, "text": TEXT}),
        just({"type": {"const": "thinking"}, "thinking": TEXT, "signature": TEXT}),
        just({"type": {"const": "tool_use"}, "id": TEXT, "name": TEXT, "input": {}}),
    ]
}
_DELTA: Schema = {
    "anyOf": [
        just({"type": {"const": f"{name}_delta"}, key: TEXT})
        for name, key in (
            ("text", "text"),
            ("thinking", "thinking"),
            ("signature", "signature"),
            ("input_json", "partial_json"),
        )
    ]
}
_WHOLE = just(
    {
        "id": TEXT,
        "type": {"const": "message"},
        "role": {"const": "assistant"},
        "model": TEXT,
        "content": _list(_TOLD_BLOCK),
        "usage": _USAGE,
        **_STOP,
    }
)
_EVENTS: dict[str, dict[str, Schema]] = {
    "message_start": {"message": _WHOLE},
    "content_block_start": {"index": _COUNT, "content_block": _TOLD_BLOCK},
    "ping": {},
    "content_block_delta": {"index": _COUNT, "delta": _DELTA},
    "content_block_stop": {"index": _COUNT},
    "message_delta": {"delta": just(_STOP), "usage": _USAGE},
    "message_stop": {},
}
_ERROR = just({"type": {"enum": [*dict.fromkeys(MESSAGE_ERROR_TYPES.values())]}, "message": TEXT})
MESSAGE_ANSWERS: dict[str, Schema] = {
    "Message": _WHOLE,
    "MessageEvent": {
        "anyOf": [just({"type": {"const": name}, **each}) for name, each in _EVENTS.items()]
    },
    "MessageTokens": just({"input_tokens": _COUNT}),
    "MessageError": just({"type": {"const": "error"}, "error": _ERROR, "request_id": TEXT}),
}
