"""The date that a template writes stays that of the server's start."""

from __future__ import annotations

from pathlib import Path

import pytest

from apertus_mlx.text.template import ChatTemplate, chat_template
from tests.chat_tokenizers import load_tokenizer, written_by


def test_the_date_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_fixed", [])
    source = "{{ strftime_now('%f %S') }}"
    template = ChatTemplate(source, load_tokenizer(tmp_path), name="chat_template.jinja")

    def told() -> set[str]:
        return {written_by(template, []) for _ in range(20)}

    assert len(told()) > 1
    chat_template.fix_now()
    assert len(told()) == 1
