"""A slot keeps what was computed for its key, through other traffic and on disk."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.errors import UsageError
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.server import slots
from apertus_mlx.server.engine import EngineLimits
from apertus_mlx.server.options import ServeOptions
from apertus_mlx.system.whole_file import UNFINISHED
from tests.daily import every
from tests.server.running import QUESTION, Server, serving

TEXT = "/v1/completions"
LONG = "The capital of France is Paris. " * 6
FEW = EngineLimits(running=2, idle_prefixes=2)
FORMS = {
    "full": RunOptions(),
    "computed by MLX": RunOptions(compute="mlx"),
    "codes": RunOptions(kv_bits=8),
    "bounded, in codes": RunOptions(kv_bits=4, max_kv=200),
    "bounded": RunOptions(max_kv=64),
}


def said(server: Server, prompt: str = LONG, **fields: Any) -> tuple[str, int]:
    """An answer, and how many tokens of its prompt had been computed before."""
    body = {"model": "default", "prompt": prompt, "temperature": 0, "max_tokens": 4, **fields}
    response = server.post(TEXT, body)
    assert response.status_code == 200, response.text
    found = response.json()
    return found["choices"][0]["text"], found["usage"]["prompt_tokens_details"]["cached_tokens"]


def others(server: Server) -> None:
    for word in ("one", "two", "three"):
        said(server, f"{word} other question")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_other_traffic_pushes_out_what_has_no_key() -> None:
    with serving(limits=FEW) as server:
        said(server)
        others(server)
        expected, cached = said(server)
        # BOS, which all prompts begin with.
        assert cached <= 1
        said(server, cache_key="mine")
        others(server)
        assert said(server, cache_key="mine") == (expected, cached := said(server)[1])
        assert cached > 30
        assert server.get("/v1/status").json()["engine"]["slots"] == 1


@pytest.mark.parametrize("form", every(3, FORMS))
def test_a_slot_survives_the_server(form: str, tmp_path: Path) -> None:
    settings, folder = FORMS[form], tmp_path / "slots"
    with serving(limits=FEW, settings=settings) as server:
        expected = said(server)[0]
        further = said(server, LONG + expected + " And of Italy")[0]
    for _ in range(2):
        with serving(limits=FEW, settings=settings, slots=folder) as server:
            first = said(server, cache_key="mine")
            others(server)
        assert first[0] == expected
        assert [name[40:] for name in files(folder)] == [slots.SUFFIX]
    assert first[1] > 30
    with serving(limits=FEW, settings=settings, slots=folder) as server:
        assert said(server)[1] == 0, "read only for who names it"
        text, cached = said(server, LONG + expected + " And of Italy", prompt_cache_key="mine")
    assert text == further and cached > 30
    [path] = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


BODIES = {
    TEXT: {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": QUESTION},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": QUESTION},
}
KEYS = ["../../etc/passwd", "/", "a" * 512, "\0\x1b[31m", "\ud800", "\u202eanimal"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place") / "slots"


@pytest.fixture(scope="module")
def server(folder: Path) -> Any:
    with serving(slots=folder) as found:
        yield found
        found.lives()


@pytest.mark.parametrize("path", BODIES)
def test_no_key_chooses_a_path(server: Server, folder: Path, path: str) -> None:
    name = "max_output_tokens" if path.endswith("responses") else "max_tokens"
    body = {"model": "default", name: 1, "temperature": 0, **BODIES[path]}
    for key in KEYS:
        response = server.post(path, {**body, "cache_key": key})
        assert response.status_code == 200, response.text
    for key in (1, ["a"], {}, "", "a" * 513):
        response = server.post(path, {**body, "cache_key": key})
        error = response.json()["error"]
        assert response.status_code == 400 and "cache_key" in json.dumps(error), error
    server.lives()
    assert len(files(folder)) <= len(KEYS)
    assert all(name[40:] == slots.SUFFIX and int(name[:40], 16) for name in files(folder))
    assert files(folder.parent) == ["slots"]


def ruined(folder: Path) -> dict[str, bytes]:
    """What may stand in a slot's place, of a file that is sound."""
    [path] = folder.iterdir()
    sound = path.read_bytes()
    header = int.from_bytes(sound[:8], "little")
    return {
        "cut": sound[:-100],
        "no numbers": sound[: 8 + header] + b"\xff" * (len(sound) - 8 - header),
        "another model's": sound.replace(b'"weights":"', b'"weights":"0', 1),
        "a pickle": b"\x80\x04cposix\nsystem\n",
    }


def test_a_file_that_cannot_be_used_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "slots"
    with serving(slots=folder) as server:
        expected = said(server, cache_key="mine")[0]
    [path] = folder.iterdir()
    sound = path.read_bytes()
    for content in ruined(folder).values():
        path.write_bytes(content)
        caplog.clear()
        with serving(slots=folder) as server:
            assert said(server, cache_key="mine") == (expected, 0)
        [line] = [r.getMessage() for r in caplog.records if r.name == slots.__name__]
        assert line.startswith(f"a slot is not read: {path}") and "\n" not in line
        assert path.read_bytes() == sound
    # Of another form of cache.
    with serving(slots=folder, settings=RunOptions(kv_bits=4)) as server:
        assert said(server, cache_key="mine")[1] == 0
    assert "another form" in caplog.records[-1].getMessage()


def test_what_cannot_be_written_costs_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "slots"
    with serving(slots=folder) as server:
        expected = said(server, cache_key="mine")[0]
    [path] = folder.iterdir()
    before = path.read_bytes()

    def full(file: Any, arrays: Any, metadata: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx.core.save_safetensors", full)
    with serving(slots=folder) as server:
        longer = said(server, LONG + " Not?", cache_key="mine")
        assert longer[1] > 30 and said(server)[0] == expected
    assert "No space left" in caplog.text
    assert path.read_bytes() == before
    assert not [name for name in files(folder) if UNFINISHED in name]


def test_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "MOST_FILES", 3)
    with serving(slots=tmp_path / "slots") as server:
        for number in range(5):
            said(server, f"{number} questions of mine", cache_key=str(number))
    assert len(files(tmp_path / "slots")) == 3
    with serving(slots=tmp_path / "slots") as server:
        assert said(server, "0 questions of mine", cache_key="0")[1] <= 1
        assert said(server, "4 questions of mine", cache_key="4")[1] > 2


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="--slots"), serving(slots=place):
            pass
    with pytest.raises(UsageError, match="--keep-prefixes 0"):
        ServeOptions(slots=tmp_path, keep_prefixes=0)
