"""Every Python example in README and docs runs, one after the other as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apertus_mlx.hub.demo import model_dir
from tests.hub_server import point_client_at, serving

ROOT = Path(__file__).parents[2]
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("page", "answered"), [("README.md", 1), ("docs/python.md", 4)])
def test_examples(
    page: str,
    answered: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("mlx_lm")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    # A Hub that knows the released model by name, and gives the demonstration model for it.
    with serving() as hub:
        hub.repository("swiss-ai/Apertus-v1.1-0.5B-Instruct").commit_folder(model_dir())
        point_client_at(hub.endpoint, tmp_path, monkeypatch)
        names: dict[str, object] = {}
        for found in EXAMPLE.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            code = compile("\n" * line + found[1], page, "exec")
            exec(code, names)  # noqa: S102
    shown, said = capsys.readouterr()
    assert shown.count("The capital of France is Paris.") >= answered
    assert said == ""
