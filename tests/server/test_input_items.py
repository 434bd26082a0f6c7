"""What a response was made from, read by the openai client page by page as its own types."""

from __future__ import annotations

from collections.abc import Iterator

import jsonschema
import openai
import pytest
from openai.types.responses.response_item_list import ResponseItemList

from tests.server.running import Server
from tests.server.test_conformance import ARGUMENTS
from tests.server.test_responses import TOOLS, connected

ITEMS = [
    {"role": "user", "content": "Weather?"},
    {"type": "reasoning", "id": "rs_1", "content": [{"type": "reasoning_text", "text": "Hm."}]},
    {"role": "assistant", "content": "Let me see."},
    {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": ARGUMENTS},
    {"type": "function_call_output", "call_id": "c1", "output": "sun"},
]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    yield from connected(server)


@pytest.fixture(scope="module")
def made(client: openai.OpenAI) -> str:
    """A response that goes on from another."""
    first = client.responses.create(
        model="default", input=ITEMS, tools=TOOLS, max_output_tokens=2  # type: ignore[arg-type]
    )  # fmt: skip
    return client.responses.create(
        model="default", input="And?", previous_response_id=first.id, max_output_tokens=2
    ).id


def test_the_client_reads_all_pages(client: openai.OpenAI, made: str) -> None:
    """Each item once, in both orders; the answer itself is none of them."""
    pages = {
        (order, limit): list(client.responses.input_items.list(made, order=order, limit=limit))
        for order in ("asc", "desc")
        for limit in (1, 3, 100)
    }
    items = pages["asc", 100]
    assert all(pages["asc", limit] == items for limit in (1, 3))
    assert all(pages["desc", limit] == items[::-1] for limit in (1, 3, 100))
    assert list(client.responses.input_items.list(made)) == items[::-1]
    assert len({each.id for each in items}) == len(items) and items[1].id == "rs_1"
    told = [each.to_dict() for each in items]
    kinds = ["message", "reasoning", "message", "function_call", "function_call_output"]
    assert [each["type"] for each in told] == [*kinds, "message", "message"]
    assert told[0]["content"] == [{"type": "input_text", "text": "Weather?"}]
    assert told[-1]["content"] == [{"type": "input_text", "text": "And?"}]
    assert (told[3]["arguments"], told[4]["output"]) == (ARGUMENTS, "sun")
    kept = client.responses.retrieve(made)
    assert not {each.id for each in kept.output} & {each.id for each in items}


def test_pages_are_as_told(server: Server, made: str) -> None:
    path = f"/v1/responses/{made}/input_items"
    described = server.get("/openapi.json").json()
    schema = {"$ref": "#/components/schemas/ResponseItems", "components": described["components"]}
    page = server.get(path, params={"order": "asc", "limit": 3}).json()
    jsonschema.Draft202012Validator(schema).validate(page)
    assert ResponseItemList.model_validate(page).has_more
    for item in page["data"]:
        # Strictly, which `has_more` above does not ask for.
        read = ResponseItemList.model_validate({**page, "data": [item]}).data[0]
        assert read.type == item["type"] and read.id == item["id"]
    last = server.get(path, params={"after": page["last_id"], "order": "asc"}).json()
    assert not last["has_more"] and len(last["data"]) == 4
    empty = server.get(path, params={"after": last["last_id"], "order": "asc"}).json()
    assert empty["data"] == [] and empty["last_id"] is None and not empty["has_more"]
    jsonschema.Draft202012Validator(schema).validate(empty)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": "0"}, "limit"), ({"limit": "101"}, "limit"), ({"limit": "²"}, "limit"),
        ({"limit": "9" * 9000}, "limit"), ({"order": "up"}, "order"), ({"after": "x"}, "after"),
        ({"after": ""}, "after"), ({"include[]": "x"}, "include[]"), ({"limit": ""}, "limit"),
    ],
)  # fmt: skip
def test_wrong_queries(server: Server, made: str, query: dict[str, str], param: str) -> None:
    response = server.get(f"/v1/responses/{made}/input_items", params=query)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_what_is_not_kept(server: Server) -> None:
    for name in ("resp_x", "%2e%2e", "x" * 5000):
        assert server.get(f"/v1/responses/{name}/input_items").status_code == 404
