"""A folder as `convert` writes it, and what Python answers with it.

`answered/model` is the embedded model in 4 bits, with golden answers. `expected.json` beside it
holds the likeliest tokens after prompts, computed by MLX in float32: `questions` (each with `text`
and `token_ids`), `raw` and `second_turn` (after the first question); and `keys`, those that
`generate --json` and `verify --json` print, nested ones as `memory.cache`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from apertus_mlx.api import load
from apertus_mlx.cli.app import app
from apertus_mlx.generation.run import Answer
from apertus_mlx.tools import convert_model, verify

QUESTIONS = ("Hi", "What is the capital of Switzerland?", "Grüezi! Wie heisst der Fluss? 🏔️")
RAW = "The capital of France is"
TOKENS = 24


def write_answered_fixtures(out: Path) -> None:
    """Write the folder and the file described above."""
    folder = out / "answered" / "model"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        convert_model(None, folder, bits=4, group_size=64)
        verify(folder, golden=True)
    asked = {"temperature": 0.0, "max_tokens": TOKENS}
    with load(folder, compute="mlx", dtype="float32") as apertus:
        chat = apertus.chat()
        expected: dict[str, Any] = {
            "tokens": TOKENS,
            "questions": [_answered(text, apertus.generate(text, **asked)) for text in QUESTIONS],
            "raw": _answered(RAW, apertus.generate(RAW, raw=True, **asked)),
        }
        chat.ask(QUESTIONS[0], **asked)
        expected["second_turn"] = _answered(QUESTIONS[1], chat.ask(QUESTIONS[1], **asked))
    expected["keys"] = {
        "generate": _printed("generate", "-m", folder, "-n", "2", "--json", "Hi"),
        "verify": _printed("verify", folder, "--json"),
    }
    path = out / "answered" / "expected.json"
    path.write_text(json.dumps(expected, ensure_ascii=False), encoding="utf-8")


def _answered(prompt: str, answer: Answer) -> dict[str, Any]:
    return {"prompt": prompt, "text": answer.text, "token_ids": answer.token_ids}


def _printed(*arguments: str | Path) -> list[str]:
    out = io.StringIO()
    with redirect_stdout(out):
        app([str(each) for each in arguments], standalone_mode=False)
    return list(_keys(json.loads(out.getvalue()), ""))


def _keys(value: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, inner in value.items():
        yield prefix + key
        if isinstance(inner, dict):
            yield from _keys(inner, f"{prefix}{key}.")
