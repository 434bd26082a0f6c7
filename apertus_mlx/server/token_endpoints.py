"""Tokens without generating: of texts and conversations, back to text, and counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apertus_mlx.errors import ApertusError
from apertus_mlx.server.chat_completions import read_chat_prompt
from apertus_mlx.server.completions import require_ids
from apertus_mlx.server.errors import in_request, wrong
from apertus_mlx.server.fields import Flag, unsupported
from apertus_mlx.server.sampling_fields import require_text
from apertus_mlx.server.served_model import ServedModel

_FLAGS = {"add_special_tokens", "parse_special", "return_token_strs", "add_generation_prompt"}
_TEXT_KEYS = {"model", "prompt", "content", *_FLAGS} - {"add_generation_prompt"}


def tokenize(body: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """POST /tokenize: `{prompt}` or `{messages}`, as vLLM has it.

    Texts of control tokens become their ids unless `parse_special` is false: nothing is generated
    from them. One BOS stands first unless `add_special_tokens` is false, or the text begins with
    it. In a conversation no text becomes a control token.
    """
    flags = {name: Flag().read(name, body[name]) for name in _FLAGS if body.get(name) is not None}
    if body.get("messages") is not None:
        fields = {key: body[key] for key in body if key not in _FLAGS - {"add_generation_prompt"}}
        ids = read_chat_prompt(fields, model)
    else:
        model.require_name(body.get("model"))
        for key in body:
            if key not in _TEXT_KEYS and body[key] is not None:
                raise unsupported(key)
        name = "prompt" if body.get("prompt") is not None else "content"
        if body.get(name) is None:
            raise wrong("prompt", "is missing", "missing_required_parameter")
        text = require_text(name, body[name])
        special = flags.get("parse_special", True)
        ids = _ids(name, text, model, special)
        bos = model.folder.tokenizer.bos_id
        if flags.get("add_special_tokens", True) and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
    found: dict[str, Any] = {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": model.folder.context_length,
    }
    if flags.get("return_token_strs"):
        names = (model.folder.tokenizer.token_bytes(each) for each in ids)
        found["token_strs"] = [each.decode("utf-8", "replace") for each in names]
    return found


def _ids(name: str, text: str, model: ServedModel, special: bool) -> list[int]:
    tokenizer = model.folder.tokenizer
    pieces = tokenizer.split_special(text) if special else [text]
    ids: list[int] = []
    for piece in pieces:
        ids += [piece] if isinstance(piece, int) else model.text_prompt(name, piece, False)
    return ids


def detokenize(body: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """POST /detokenize: `{tokens}` to `{prompt}`; control tokens are written as their texts."""
    model.require_name(body.get("model"))
    for key in body:
        if key not in ("model", "tokens") and body[key] is not None:
            raise unsupported(key)
    if body.get("tokens") is None:
        raise wrong("tokens", "is missing", "missing_required_parameter")
    ids = require_ids("tokens", body["tokens"], model)
    return {"prompt": model.folder.tokenizer.decode(ids, skip_special=False)}


def apply_template(body: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """POST /apply-template: the prompt of a chat's body as text, and its ids."""
    ids = read_chat_prompt(body, model)
    return {"prompt": model.folder.tokenizer.decode(ids, skip_special=False), "tokens": ids}


def count_input(body: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """POST /v1/chat/completions/input_tokens: how long the prompt of a chat's body is."""
    ids = read_chat_prompt(body, model)
    try:
        model.folder.require_room(len(ids))
    except ApertusError as error:
        raise in_request(error, "messages") from None
    return {"object": "response.input_tokens", "input_tokens": len(ids)}
