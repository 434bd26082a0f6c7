"""GET /openapi.json: what the server offers, in OpenAPI's form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apertus_mlx import __version__
from apertus_mlx.server.answer_schemas import ANSWERS, named
from apertus_mlx.server.errors import STATUSES
from apertus_mlx.server.field_schemas import (
    FLAG,
    TEXT,
    TOKEN_IDS,
    Schema,
    body_schema,
    known,
)
from apertus_mlx.server.message_schemas import MESSAGE_ANSWERS, message_body_schema
from apertus_mlx.server.response_schemas import PAGE, RESPONSE_ANSWERS, response_body_schema

VERSION = "3.1.0"
_BODY = (400, 404, 408, 413, 415)
_GENERATES = (*_BODY, 429, 503)
# Whatever is asked may be refused by its Host, Origin or key, and may fail by our fault.
_ALWAYS = (401, 403, 500)


@dataclass(frozen=True, slots=True)
class Operation:
    """What a path does.

    Attributes:
        method: of HTTP, in small letters.
        words: what it is for.
        answer: the name of what it answers, in `ANSWERS`; or a media type.
        errors: statuses that it may have beside those that all may have.
        body: what the request brings.
        chunk: the name of what an event of its stream holds; None: it does not stream.
        parameters: in the path and the query.
        error: the name of what an error is.
        others: what the path does by other methods.
    """

    method: str
    words: str
    answer: str
    errors: Sequence[int] = ()
    body: Schema | None = None
    chunk: str | None = None
    parameters: Sequence[Schema] = ()
    error: str = "Error"
    others: Sequence[Operation] = ()


def operations(names: Sequence[str]) -> dict[str, Operation]:
    """All of them by path; `names` are those of the model."""
    model: Schema = {"enum": [*names, "default"]}
    chat, text = body_schema("chat", model), body_schema("completions", model)
    response = response_body_schema(model)
    flags = {"add_special_tokens": FLAG, "parse_special": FLAG, "return_token_strs": FLAG}
    plain = {"model": model, **flags}
    name: Schema = {
        "name": "name",
        "in": "path",
        "required": True,
        "schema": {"minLength": 1, **TEXT},
    }
    kept: Schema = {**name, "name": "id"}
    deep: Schema = {"name": "deep", "in": "query", "schema": TEXT}
    tokenized: Schema = {
        "anyOf": [
            known({"prompt": TEXT, **plain}, "prompt"),
            known({"content": TEXT, **plain}, "content"),
            {**chat, "properties": {**chat["properties"], **flags}},
        ]
    }
    ids: Schema = {"type": "array", "items": TOKEN_IDS["items"]}
    return {
        "/v1/chat/completions": Operation(
            "post", "Answers to a conversation", "ChatCompletion", _GENERATES, chat,
            "ChatCompletionChunk",
        ),
        "/v1/completions": Operation(
            "post", "Goes on with texts or token ids", "Completion", _GENERATES,
            text, "CompletionChunk",
        ),
        "/v1/chat/completions/input_tokens": Operation(
            "post", "Counts the tokens of a chat's prompt", "InputTokens", _BODY, chat
        ),
        "/v1/messages": Operation(
            "post", "Answers to a conversation, as Anthropic's clients ask for them", "Message",
            _GENERATES, message_body_schema(model, "max_tokens"), "MessageEvent",
            error="MessageError",
        ),
        "/v1/messages/count_tokens": Operation(
            "post", "Counts the tokens of a prompt", "MessageTokens", _BODY,
            message_body_schema(model), error="MessageError",
        ),
        "/v1/responses": Operation(
            "post", "An answer to items, as agents ask for it", "Response", _GENERATES,
            response, "ResponseEvent",
        ),
        "/v1/responses/input_tokens": Operation(
            "post", "Counts the tokens of a response's prompt", "InputTokens", _BODY, response
        ),
        "/v1/responses/{id}": Operation(
            "get", "A response that is kept", "Response", (400, 404), parameters=[kept],
            others=[
                Operation(
                    "delete", "Forgets it", "ResponseDeleted", (404,), parameters=[kept]
                )
            ],
        ),
        "/v1/responses/{id}/input_items": Operation(
            "get", "What a kept response was made from", "ResponseItems", (400, 404),
            parameters=[kept, *PAGE],
        ),
        "/tokenize": Operation("post", "Tokens of a text or chat", "Tokens", _BODY, tokenized),
        "/detokenize": Operation(
            "post", "The text of tokens", "Text", _BODY,
            known({"model": model, "tokens": ids}, "tokens"),
        ),
        "/apply-template": Operation(
            "post", "The prompt of a chat", "RenderedPrompt", _BODY, chat
        ),
        "/v1/models": Operation("get", "The served model", "Models"),
        "/v1/models/{name}": Operation(
            "get", "One model by name", "Model", (404,), parameters=[name]
        ),
        "/v1/status": Operation("get", "What the engine is doing", "Status"),
        "/health": Operation(
            "get", "Whether the engine works", "Health", (429, 503), parameters=[deep]
        ),
        "/metrics": Operation("get", "For Prometheus", "text/plain"),
        "/openapi.json": Operation("get", "This description", "application/json"),
    }  # fmt: skip


def describe(names: Sequence[str], *, metrics: bool = False, key: bool = False) -> dict[str, Any]:
    """The document.

    Args:
        names: what the model is called.
        metrics: whether /metrics is served.
        key: whether requests must bring a key.
    """
    found = operations(names)
    if not metrics:
        del found["/metrics"]
    document: dict[str, Any] = {
        "openapi": VERSION,
        "info": {"title": "apertus-mlx", "version": __version__},
        "paths": {
            path: {one.method: _operation(one) for one in (each, *each.others)}
            for path, each in found.items()
        },
        "components": {"schemas": {**ANSWERS, **MESSAGE_ANSWERS, **RESPONSE_ANSWERS}},
    }
    if key:
        scheme = {"type": "http", "scheme": "bearer"}
        document["components"]["securitySchemes"] = {"key": scheme}
        document["security"] = [{"key": []}]
        document["paths"]["/health"]["get"]["security"] = []
    return document


def _operation(found: Operation) -> dict[str, Any]:
    answer = {"application/json": {"schema": named(found.answer)}}
    if "/" in found.answer:
        answer = {found.answer: {"schema": {}}}
    words = "The answer"
    if found.chunk is not None:
        answer["text/event-stream"] = {"schema": TEXT}
        words = "The answer; of a stream, the data of each event is "
        words += f"a {found.chunk} or {found.error}"
    told: dict[str, Any] = {"200": {"description": words, "content": answer}}
    for status in sorted({*_ALWAYS, *found.errors}):
        error: dict[str, Any] = {
            "description": STATUSES[status],
            "content": {"application/json": {"schema": named(found.error)}},
        }
        if status in (429, 503):
            error["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "required": True}}
        told[str(status)] = error
    operation: dict[str, Any] = {"summary": found.words, "responses": told}
    if found.parameters:
        operation["parameters"] = list(found.parameters)
    if found.body is not None:
        body = {"application/json": {"schema": found.body}}
        operation["requestBody"] = {"required": True, "content": body}
    return operation
