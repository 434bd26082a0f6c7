"""GET /v1/responses/ID/input_items: what a kept response was made from, in pages."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from apertus_mlx.server.errors import wrong
from apertus_mlx.server.fields import shown, unsupported
from apertus_mlx.server.response_items import Item
from apertus_mlx.server.response_store import Stored

DEFAULT_LIMIT, MOST_LIMIT = 20, 100
ORDERS = ("desc", "asc")
_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
}


def list_input(stored: Stored, query: Mapping[str, str]) -> dict[str, Any]:
    """A page of all items that the response was made from, also those of responses before it.

    Raises:
        ApiError: 400, the query is wrong.
    """
    for name in query:
        if name not in ("after", "limit", "order"):
            raise unsupported(name)
    limit = query.get("limit", str(DEFAULT_LIMIT))
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 4) or not (
        1 <= int(limit) <= MOST_LIMIT
    ):
        raise wrong("limit", f"{shown(limit)}: expected 1 to {MOST_LIMIT}")
    order = query.get("order", ORDERS[0])
    if order not in ORDERS:
        raise wrong("order", f"{shown(order)}: expected asc or desc")
    own = len(stored.items) - len(stored.response["output"])
    seed = stored.response["id"]
    items = [_told(item, f"{seed} {index}") for index, item in enumerate(stored.items[:own])]
    if order == "desc":
        items.reverse()
    if (after := query.get("after")) is not None:
        ids = [each["id"] for each in items]
        if after not in ids:
            raise wrong("after", f"{shown(after)} is no item of this response")
        items = items[ids.index(after) + 1 :]
    page = items[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(page) < len(items),
    }


def _told(item: Item, seed: str) -> dict[str, Any]:
    """An item as OpenAI tells it: with an id, which stays the same, and texts as parts."""
    kind = item.get("type") or "message"
    given = item.get("id")
    made = f"{_PREFIXES[kind]}_{hashlib.sha256(seed.encode()).hexdigest()[:48]}"
    found = {**item, "type": kind, "id": given if isinstance(given, str) and given else made}
    found.setdefault("status", "completed")
    if kind == "message" and isinstance(item["content"], str):
        part: dict[str, Any] = {"type": "input_text", "text": item["content"]}
        if item["role"] == "assistant":
            part = {"type": "output_text", "text": item["content"], "annotations": []}
        found["content"] = [part]
    if kind == "reasoning":
        found["summary"] = item.get("summary") or []
    return found
