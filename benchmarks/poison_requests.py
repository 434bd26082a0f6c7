"""Sends random requests that are wrong in some way, and counts how a server answers each kind.

    python -m benchmarks.poison_requests [--count 10000] [--seed 0] [--every 50]

Each answer must be a stated error or a sound answer, never a fault of ours; after every so many
requests the server must generate a token. In the second half it must not open any more files, and
on Linux its memory may grow by 5 %; in the first, all that it keeps within bounds fills up. The
server runs in this process, on the embedded model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

Request = tuple[str, str, bytes, dict[str, str]]
Kind = Callable[[random.Random], Request]
CHAT, TEXT, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = "/v1/messages"
# 200 where chance made a sound request; 503 has a reason of its own.
STATED = {200, 204, 400, 403, 404, 405, 413, 415, 429, 503}
ERROR_KEYS = {"message", "type", "param", "code"}
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 5, 2**31, 2**63, 2**70, -(2**70), 0.5, -0.5, 1e308, -1e308, 1e-320,
    "", "a", "5", "true", "null", "\ud800", "\u0000", "\u2028", "x" * 5000, "<|assistant_end|>",
    "../../etc/passwd", "http://127.0.0.1/x", "{{ 7*7 }}", [], [None], [[]], [1], ["a"], [{}], {},
    {"a": 1}, {"type": "x"}, {"": None}, [True], [-1], [10**6], ["", ""], [["a"]],
]  # fmt: skip
NAMES = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "max_tokens", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "stream", "stream_options"),
    *("max_completion_tokens", "logprobs", "top_logprobs", "tools", "tool_choice", "user"),
    *("response_format", "reasoning", "reasoning_effort", "chat_template_kwargs", "store"),
    *("parallel_tool_calls", "continue_final_message", "metadata", "functions", "model"),
)
RESPONSE_NAMES = (
    *("input", "instructions", "previous_response_id", "max_output_tokens", "text", "include"),
    *("truncation", "background", "conversation", "prompt", "max_tool_calls"),
)


def chat(**fields: Any) -> dict[str, Any]:
    """The body of a small chat."""
    return {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **fields}


def sent(path: str, body: Any, **headers: str) -> Request:
    """A request with a body in JSON, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return "POST", path, data, {"content-type": "application/json", **headers}


def field(rng: random.Random) -> Request:
    """Junk in a field that is known."""
    return sent(CHAT, chat(**{rng.choice(NAMES): rng.choice(JUNK)}))


def two_fields(rng: random.Random) -> Request:
    """Junk in several."""
    return sent(CHAT, chat(**{rng.choice(NAMES): rng.choice(JUNK) for _ in range(3)}))


def completion_field(rng: random.Random) -> Request:
    """Junk in a field of completions."""
    name = rng.choice([*NAMES, "suffix", "echo", "best_of", "prompt_logprobs"])
    return sent(TEXT, {"prompt": "Hi", "max_tokens": 2, name: rng.choice(JUNK)})


def unknown_field(rng: random.Random) -> Request:
    """A field that nobody knows."""
    name = "".join(rng.choice("abcxyz_\n\u202e\x1b") for _ in range(rng.randrange(12)))
    return sent(CHAT, chat(**{name: rng.choice(JUNK)}))


def messages(rng: random.Random) -> Request:
    """Junk for messages."""
    return sent(CHAT, {"messages": rng.choice([*JUNK, [[{}]] * 3]), "max_tokens": 2})


def message(rng: random.Random) -> Request:
    """Junk within a message."""
    found = {"role": "user", "content": "Hi"}
    key = rng.choice(["role", "content", "tool_calls", "tool_call_id", "audio", "name"])
    given = [{"role": "user", "content": "Hi"}, {**found, key: rng.choice(JUNK)}]
    return sent(CHAT, {"messages": given[:: rng.choice([1, -1])], "max_tokens": 2})


def roles(rng: random.Random) -> Request:
    """Roles in any order."""
    names = ["system", "developer", "user", "assistant", "tool", "function", "root"]
    given = [{"role": rng.choice(names), "content": "x"} for _ in range(rng.randrange(1, 6))]
    return sent(CHAT, {"messages": given, "max_tokens": 2})


def parts(rng: random.Random) -> Request:
    """Parts of content that are no text."""
    kind = rng.choice(["image_url", "input_audio", "file", "video_url", "text", "", None, 5])
    part = {"type": kind, rng.choice(["image_url", "text", "data"]): rng.choice(JUNK)}
    return sent(CHAT, {"messages": [{"role": "user", "content": [part]}], "max_tokens": 2})


def prompts(rng: random.Random) -> Request:
    """Junk for a prompt."""
    return sent(TEXT, {"prompt": rng.choice(JUNK), "max_tokens": 2})


def token_ids(rng: random.Random) -> Request:
    """Ids in and out of the vocabulary."""
    ids = [rng.choice([0, 1, 2, 61, 67, 68, 72, 500, 1791, 1792, -1, 2**40]) for _ in range(4)]
    return sent(TEXT, {"prompt": rng.choice([ids, [ids, ids]]), "max_tokens": 2})


def control_texts(rng: random.Random) -> Request:
    """Texts of control tokens."""
    names = ["<s>", "</s>", "<|user_start|>", "<|assistant_end|>", "<|tools_prefix|>", "\n", "a"]
    text = "".join(rng.choice(names) for _ in range(5))
    body = chat(messages=[{"role": "user", "content": text}])
    return sent(CHAT, body) if rng.random() < 0.5 else sent(TEXT, {"prompt": text, "max_tokens": 2})


def tools(rng: random.Random) -> Request:
    """Damaged tools and choices."""
    function: Any = {"name": rng.choice(["f", "f g", "", "x" * 65, None, "é", 'f"']),
                     "parameters": rng.choice([*JUNK, {"type": "object"}])}  # fmt: skip
    tool = {"type": rng.choice(["function", "function", "namespace"]), "function": function}
    choice = rng.choice(["auto", "none", "required", "f", *JUNK])
    return sent(CHAT, chat(tools=[tool] * rng.choice([1, 2]), tool_choice=choice))


def schemas(rng: random.Random) -> Request:
    """Schemas that cannot be, or cannot be enforced."""
    schema = rng.choice(
        [
            {"type": "zzz"}, {"not": {}}, {"$ref": "http://127.0.0.1/x"}, {"$ref": "#/nowhere"},
            {"type": "array", "uniqueItems": True}, {"enum": []}, {"pattern": "(a*)*b"},
            {"minimum": 5, "maximum": 1, "type": "integer"}, {"$ref": "#"}, *JUNK,
        ]
    )  # fmt: skip
    inner = {"name": rng.choice(["x", "", 5]), "schema": schema}
    form = {"type": rng.choice(["json_schema", "json_object", "regex"]), "json_schema": inner}
    return sent(CHAT, chat(response_format=form))


def calls(rng: random.Random) -> Request:
    """Calls and results that do not belong together."""
    arguments = rng.choice(['{"a": 1}', "{", "[]", "NaN", '{"a": "\ud800"}', *JUNK])
    call = {"id": rng.choice(["c1", None, ""]), "type": rng.choice(["function", "x"]),
            "function": {"name": rng.choice(["f", "", 5]), "arguments": arguments}}  # fmt: skip
    given = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call] * rng.choice([1, 2])},
        {"role": "tool", "tool_call_id": rng.choice(["c1", "c2", None]), "content": "7"},
    ]
    return sent(CHAT, {"messages": given[: rng.choice([2, 3])], "max_tokens": 2})


def long_prompts(rng: random.Random) -> Request:
    """More than the context holds."""
    text = rng.choice(["a ", "ab", "\U0001f600", " "]) * rng.choice([3000, 30_000, 200_000])
    return sent(TEXT, {"prompt": text, "max_tokens": rng.choice([1, 10**9])})


def not_json(rng: random.Random) -> Request:
    """Bodies that are no JSON."""
    data = rng.choice(
        [
            b"", b"{", b"nul", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN}', b'{"a": 1, "a": 2}',
            b"[]", b'"x"', b'{"messages": ' + b"9" * 5000 + b"}", b"\x00", b"{}" * 2,
        ]
    )  # fmt: skip
    return sent(rng.choice([CHAT, TEXT, "/tokenize"]), data)


def cut_json(rng: random.Random) -> Request:
    """A sound body with bytes cut away or changed."""
    data = bytearray(json.dumps(chat(stop=["a"], n=1)).encode())
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return sent(CHAT, bytes(data[: rng.randrange(1, len(data) + 1)]))


def media_types(rng: random.Random) -> Request:
    """Types of bodies that are not JSON's."""
    kind = rng.choice(["text/plain", "application/x-www-form-urlencoded", "", "json", "a/b; c"])
    method, path, data, _ = sent(CHAT, chat())
    return method, path, data, {"content-type": kind}


def paths(rng: random.Random) -> Request:
    """Paths that there are not."""
    path = rng.choice(
        ["//", "/v1/embeddings", "/v1/../etc/passwd", "/v1/models/%2e%2e/x", "/v1", "/admin",
         "/v1/chat/completions/", "/v1/models/a%00b", "/v1/models//", "/metrics", "/%ff"]
    )  # fmt: skip
    return rng.choice(["GET", "POST"]), path, b"", {}


def methods(rng: random.Random) -> Request:
    """Methods that do not work at a path."""
    path = rng.choice([CHAT, TEXT, "/v1/models", "/health", "/tokenize"])
    return rng.choice(["PUT", "DELETE", "PATCH", "OPTIONS", "GET"]), path, b"", {}


def places(rng: random.Random) -> Request:
    """Hosts and origins of others."""
    name = rng.choice(["host", "origin"])
    values = ["evil.example", "null", "http://evil.example", "127.0.0.1.evil.example", "[", "a:b"]
    return sent(CHAT, chat(), **{name: rng.choice(values)})


def token_endpoints(rng: random.Random) -> Request:
    """Junk for what counts and reads tokens."""
    path = rng.choice(
        ["/tokenize", "/detokenize", "/apply-template", "/v1/chat/completions/input_tokens"]
    )
    keys = ["prompt", "tokens", "messages", "content", "add_special_tokens", "model", "x"]
    return sent(path, {rng.choice(keys): rng.choice(JUNK) for _ in range(2)})


def models(rng: random.Random) -> Request:
    """Other models."""
    name = rng.choice(["gpt-4", "../x", "http://127.0.0.1/m", "/etc/passwd", "a\nb", "x" * 9999])
    return sent(CHAT, chat(model=name))


def biases(rng: random.Random) -> Request:
    """Biases of tokens that there are not."""
    keys = ["0", "5", "1791", "1792", "-1", "a", "", "9" * 5000, "\u0665", " 5"]
    count = rng.choice([1, 3, 2000])
    biases = {rng.choice(keys) if count < 9 else str(i): rng.choice([1, -100, 101, "a", None, True])
              for i in range(count)}  # fmt: skip
    return sent(CHAT, chat(logit_bias=biases))


def stops(rng: random.Random) -> Request:
    """Stops that are too many, too long, or no texts."""
    found = [rng.choice(["a", "", "x" * 300, 5, None, "\ud800", "\n"])] * rng.choice([1, 64, 65])
    return sent(CHAT, chat(stop=found))


def anthropic_fields(rng: random.Random) -> Request:
    """Junk in a field of Anthropic's API."""
    names = ["system", "max_tokens", "stop_sequences", "temperature", "top_k", "tools", "thinking",
             "tool_choice", "output_config", "metadata", "mcp_servers", "speed", "n"]  # fmt: skip
    path = rng.choice([MESSAGES, f"{MESSAGES}/count_tokens"])
    return sent(path, chat(**{rng.choice(names): rng.choice(JUNK) for _ in range(2)}))


def anthropic_blocks(rng: random.Random) -> Request:
    """Blocks that are damaged, or in no order."""
    kinds = ["text", "image", "document", "tool_use", "tool_result", "thinking", "search_result",
             "redacted_thinking", "server_tool_use", "", None, 5]  # fmt: skip
    keys = ["text", "thinking", "id", "name", "input", "tool_use_id", "content", "is_error"]

    def block() -> Any:
        sound = {"text": "a", "thinking": "a", "id": "t", "name": "f", "input": {},
                 "tool_use_id": "t"}  # fmt: skip
        return {"type": rng.choice(kinds), **sound, rng.choice(keys): rng.choice(JUNK)}

    roles = ["user", "assistant", "system", "tool"]
    given = [
        {"role": rng.choice(roles), "content": [block() for _ in range(rng.randrange(3))]}
        for _ in range(rng.randrange(1, 4))
    ]
    return sent(MESSAGES, {"messages": given, "max_tokens": 2})


def anthropic_tools(rng: random.Random) -> Request:
    """Damaged tools of Anthropic's API, and choices among them."""
    key = rng.choice(["name", "input_schema", "type", "strict", "x"])
    tool = {"name": "f", "input_schema": {"type": "object"}, key: rng.choice(JUNK)}
    kind = rng.choice(["auto", "any", "tool", "none", "x", None])
    choice = rng.choice([{"type": kind, "name": rng.choice(["f", "g", None])}, *JUNK])
    return sent(MESSAGES, chat(tools=[tool] * rng.choice([1, 1, 2]), tool_choice=choice))


def response_fields(rng: random.Random) -> Request:
    """Junk in the fields of a response."""
    names = [*RESPONSE_NAMES, *NAMES]
    body = {"input": "Hi", "max_output_tokens": 2, "store": rng.random() < 0.5}
    return sent(RESPONSE, {**body, **{rng.choice(names): rng.choice(JUNK) for _ in range(2)}})


def response_items(rng: random.Random) -> Request:
    """Items that are damaged, unknown or in a wrong order."""
    kinds = ["message", "function_call", "function_call_output", "reasoning", "item_reference"]
    keys = ["role", "content", "call_id", "name", "arguments", "output", "summary", "id"]
    sound = {"role": "user", "content": "Hi", "call_id": "c1", "name": "f", "arguments": "{}",
             "output": "7", "summary": []}  # fmt: skip
    items: list[Any] = [
        {**sound, "type": rng.choice([*kinds, None, 5]), rng.choice(keys): rng.choice(JUNK)}
        for _ in range(rng.randrange(1, 5))
    ]
    return sent(RESPONSE, {"input": rng.choice([items, items, *JUNK]), "max_output_tokens": 2})


def kept_responses(rng: random.Random) -> Request:
    """Responses that there are not."""
    name = rng.choice(["x", "resp_x", "..%2f..", "%00", "a" * 5000, "%ff", "input_tokens"])
    return rng.choice(["GET", "DELETE", "POST"]), f"{RESPONSE}/{name}", b"", {}


KINDS: tuple[Kind, ...] = (
    field, two_fields, completion_field, unknown_field, messages, message, roles, parts, prompts,
    token_ids, control_texts, tools, schemas, calls, long_prompts, not_json, cut_json, media_types,
    paths, methods, places, token_endpoints, models, biases, stops, anthropic_fields,
    anthropic_blocks, anthropic_tools, response_fields, response_items, kept_responses,
)  # fmt: skip


def fault(status: int, text: str) -> str | None:
    """What is wrong with an answer; None: nothing."""
    if status not in STATED:
        return f"status {status}"
    if status in (200, 204):
        return None
    try:
        told = json.loads(text)
        error = told["error"]
        keys = {"message", "type"} if told.get("type") == "error" else ERROR_KEYS
        known = set(error) == keys and error["message"]
    except (ValueError, KeyError, TypeError):
        return "no error object"
    if not known or "\n" in error["message"] or len(error["message"]) > 1000:
        return "a damaged error object"
    return None


def send_random(ask: Callable[..., Any], kind: Kind, rng: random.Random) -> tuple[Request, Any]:
    """Send one request; returns it and the response."""
    request = kind(rng)
    method, path, data, headers = request
    return request, ask(method, path, content=data, headers=headers)


MOST_GROWTH = 1.05


def open_files() -> int:
    """How many files and sockets this process has open."""
    return len(os.listdir("/dev/fd"))  # noqa: PTH208


def memory_bytes() -> int:
    """The resident memory of this process; 0 where the system does not tell."""
    gc.collect()
    status = Path("/proc/self/statm")
    pages = int(status.read_text().split()[1]) if status.exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def left_behind(before: tuple[int, int], after: tuple[int, int]) -> str | None:
    """What of files and memory `(files, bytes)` was not given back; None: nothing."""
    if after[0] > before[0]:
        return f"{after[0]} files are open, {before[0]} before"
    if before[1] and after[1] > MOST_GROWTH * before[1]:
        return f"memory has grown from {before[1] / 1e6:.0f} to {after[1] / 1e6:.0f} MB"
    return None


def main() -> None:
    """Send them and print the counts."""
    from tests.server.running import serving

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=50)
    given = parser.parse_args()
    counts: dict[str, Counter[int]] = {kind.__name__: Counter() for kind in KINDS}
    faults, started = 0, time.perf_counter()
    before = 0, 0
    with serving() as server:
        for number in range(given.count):
            if number == given.count // 2:
                before = open_files(), memory_bytes()
            rng = random.Random(given.seed * 1_000_003 + number)
            kind = KINDS[number % len(KINDS)]
            request, response = send_random(
                lambda *a, **b: server.run(server.ask(*a, **b)), kind, rng
            )
            counts[kind.__name__][response.status_code] += 1
            if found := fault(response.status_code, response.text):
                faults += 1
                print(f"{found}: number {number}, {str(request)[:300]}", file=sys.stderr)
            if number % given.every == 0:
                server.lives()
        server.lives()
        after = open_files(), memory_bytes()
    for name, found in counts.items():
        print(f"{name:18}", "  ".join(f"{status}: {n}" for status, n in sorted(found.items())))
    took_s = time.perf_counter() - started
    print(f"{given.count} requests of {len(KINDS)} kinds in {took_s:.0f} s, {faults} faults")
    print(f"open files: {before[0]}, then {after[0]}")
    print(f"memory: {before[1] / 1e6:.0f} MB, then {after[1] / 1e6:.0f} MB")
    if words := left_behind(before, after):
        print(words, file=sys.stderr)
    sys.exit(1 if faults or left_behind(before, after) else 0)


if __name__ == "__main__":
    main()
