"""Requests that schemathesis makes of the server's own description, beside a running server."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.process import Process

schemathesis = pytest.importorskip("schemathesis")
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]
PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/chat/completions/input_tokens", "/tokenize",
    "/detokenize", "/apply-template", "/v1/models", "/v1/models/{name}", "/v1/status", "/health",
    "/metrics", "/openapi.json", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/responses", "/v1/responses/input_tokens", "/v1/responses/{id}",
    "/v1/responses/{id}/input_items",
)  # fmt: skip
SOUND = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")

NAMES = [
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance",
]  # fmt: skip


@pytest.fixture(scope="module")
def described() -> Iterator[str]:
    process = Process("--metrics", "--max-tokens", "8")
    process.client().completions.create(model="default", prompt="a", max_tokens=1)
    yield f"http://127.0.0.1:{process.port}/openapi.json"
    process.client().completions.create(model="default", prompt="a", max_tokens=1)
    assert process.end() == 0
    assert not any("Traceback" in line for line in process.lines), process.lines


@pytest.mark.parametrize("path", PATHS)
def test_right_and_wrong_requests(described: str, path: str) -> None:
    """No fault of ours, no status or answer that is not described, nothing wrong accepted.

    What the description allows may still be refused: fields can contradict each other.
    """
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", described, "--include-path", path,
         "--max-examples", "40", "--seed", "1", "--exclude-checks", "positive_data_acceptance",
         "--suppress-health-check", "all", "--warnings", "off", "--no-color", "--no-shrink"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.parametrize("path", SOUND)
def test_sound_requests_are_answered_as_described(described: str, path: str) -> None:
    """With fields that do not contradict each other, so that there are answers to check."""
    from hypothesis import HealthCheck, given, settings
    from schemathesis import checks

    operation = schemathesis.openapi.from_url(described)[path]["POST"]
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(case=operation.as_strategy(schemathesis.GenerationMode.POSITIVE))
    def ask(case: Any) -> None:
        case.body = sound(case.body, path)
        response = case.call()
        case.validate_response(response, checks=checks.CHECKS.get_by_names(NAMES))
        statuses[response.status_code] += 1

    ask()
    assert statuses[200] > 10, statuses


def sound(body: dict[str, Any], path: str) -> dict[str, Any]:
    """The same without contradictions; some fields are left out."""
    chance = random.Random(repr(body))
    kept = {
        key: value for key, value in body.items() if chance.random() < 0.5 and value is not None
    }
    for key in ("continue_final_message", "add_generation_prompt", "tools", "tool_choice",
                "reasoning", "chat_template_kwargs", "logit_bias", "stream_options",
                "previous_response_id", "thinking", "output_config"):  # fmt: skip
        kept.pop(key, None)
    if path == "/v1/responses":
        text = str(body["input"])[:200]
        kept["input"] = chance.choice([text, [{"role": "user", "content": text}]])
        kept["text"] = chance.choice([None, {"format": {"type": "json_object"}}])
        return {**kept, "max_output_tokens": 8}
    if path == "/v1/messages":
        kept["messages"] = [{"role": "user", "content": str(body["messages"])[:200]}]
    elif "prompt" in body:
        kept.update(prompt=chance.choice(["a", ["a", "b"], [1, 500], body["prompt"]]))
        if kept.get("stream"):
            kept.pop("prompt_logprobs", None)
    else:
        kept["messages"] = [{"role": "user", "content": str(body["messages"])[:200]}]
        kept["response_format"] = chance.choice([None, {"type": "json_object"}])
        if not kept.get("logprobs"):
            kept.pop("top_logprobs", None)
        kept.pop("max_completion_tokens", None)
    return {**kept, "max_tokens": 8}
