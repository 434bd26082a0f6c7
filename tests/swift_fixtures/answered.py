"""A folder as `convert` writes it, and what Python answers with it.

`answered/model` is the embedded model in 4 bits, with golden answers. `expected.json` beside it
holds the likeliest tokens after prompts, computed by MLX in float32: `questions` (each with `text`
and `token_ids`), `raw` and `second_turn` (after the first question); and `keys`, those that
`generate --json`, `bench --json` and `verify --json` print, nested ones as `memory.cache`.
`help` there are the lines of chat's `/help` about commands, `bench.json` is what `bench --json`
prints.
`chat.json` is what `chat` writes when somebody types `lines`, FOLDER standing for a new folder.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from apertus_mlx.api import load
from apertus_mlx.cli.app import app
from apertus_mlx.cli.chat_commands import HELP
from apertus_mlx.generation.run import Answer
from apertus_mlx.tools import convert_model, verify

QUESTIONS = ("Hi", "What is the capital of Switzerland?", "Grüezi! Wie heisst der Fluss? 🏔️")
RAW = "The capital of France is"
TOKENS = 24
LINES = [
    "/undo", "/retry", "/save FOLDER/a.json", "/think maybe", "/think", "/system", "Hi",
    "/system Be kind.", "/system", "/retry", "/save FOLDER/a b.json", "/save", "/undo please",
    "/what", "/usr/bin is what?", "//undo", "one\\", "two", "/undo", "/save FOLDER", "/reset",
    "/save", "/load FOLDER/absent.json", "/load FOLDER/a b.json", "/system off", "/load",
    "/save! FOLDER/b.json", "/load FOLDER/open.json", "/retry", "/load FOLDER/calls.json",
    "sunny", "/load FOLDER/bad.json", "/think on", "/think off", "/exit", "never",
]  # fmt: skip
# Behind 90 tokens a block of keys and values becomes codes.
BENCH = ("--rounds", "1", "--prompt-tokens", "", "--depths", "90", "--new-tokens", "20",
         "--kv-bits", "4")  # fmt: skip
_CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
FILES = {
    "open.json": [{"role": "user", "content": "Hi"}],
    "calls.json": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    ],
    "bad.json": [{"role": "user", "content": 5}],
}


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
    bench = _report("bench", folder, *BENCH, "--compute", "mlx", "--dtype", "float32")
    expected["keys"] = {
        "generate": _printed("generate", "-m", folder, "-n", "2", "Hi"),
        "bench": list(_keys(bench, "")),
        "verify": _printed("verify", folder),
    }
    expected["help"] = HELP.split("\n")
    _write(out / "answered" / "chat.json", _chat(folder))
    _write(out / "answered" / "bench.json", bench)
    _write(out / "answered" / "expected.json", expected)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def _answered(prompt: str, answer: Answer) -> dict[str, Any]:
    return {"prompt": prompt, "text": answer.text, "token_ids": answer.token_ids}


def _chat(model: Path) -> dict[str, Any]:
    options = ("-t", "0", "-n", "6", "--compute", "mlx", "--dtype", "float32")
    with tempfile.TemporaryDirectory() as folder:
        for name, messages in FILES.items():
            _write(Path(folder) / name, messages)
        typed = "\n".join(LINES).replace("FOLDER", folder) + "\n"
        done = CliRunner().invoke(app, ["chat", "-m", str(model), *options], input=typed)
        assert done.exit_code == 0, done.stderr
        out, err = (text.replace(folder, "FOLDER") for text in (done.stdout, done.stderr))
        saved = json.loads((Path(folder) / "b.json").read_text(encoding="utf-8"))
    return {"lines": LINES, "files": FILES, "out": out, "err": err, "saved": saved}


def _printed(*arguments: str | Path) -> list[str]:
    return list(_keys(_report(*arguments), ""))


def _report(*arguments: str | Path) -> dict[str, Any]:
    out = io.StringIO()
    with redirect_stdout(out):
        app([*map(str, arguments), "--json"], standalone_mode=False)
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def _keys(value: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, inner in value.items():
        yield prefix + key
        first = inner[0] if isinstance(inner, list) and inner else inner
        if isinstance(first, dict):
            yield from _keys(first, f"{prefix}{key}.")
