"""Templates that are empty or cut off, or leave out the last message: refused, copied by nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apertus_mlx.convert.job import prepare
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.errors import RejectedError
from apertus_mlx.text.template import ChatTemplate
from apertus_mlx.text.tokenizer import Tokenizer
from tests.builders import TEMPLATE, config_4x, write_checkpoint
from tests.chat_tokenizers import load_tokenizer

QUESTION: Any = {"role": "user", "content": "Why is  the sky\nblue?"}
_TOKENIZER: list[Tokenizer] = []


@pytest.fixture(autouse=True, scope="module")
def _tokenizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    _TOKENIZER[:] = [load_tokenizer(Path(tmp_path_factory.mktemp("t")))]


def render(source: str, *messages: Any) -> list[int]:
    return ChatTemplate(source, _TOKENIZER[0], name="chat_template.jinja").render(messages)


@pytest.mark.parametrize("text", ["", " \n", "\ufeff"])
@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, text: str) -> None:
    tokenizer = load_tokenizer(tmp_path)
    if name.endswith("json"):
        text = json.dumps({"chat_template": text.removeprefix("\ufeff")})
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(RejectedError, match=rf"{name}: the chat template is empty") as caught:
        ChatTemplate.load(tmp_path, tokenizer)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}",
        "{# only a remark #}",
        "{{ bos_token }}{% for m in messages %}<|user_start|>{% endfor %}",
        "{{ messages[0].role }}",
        "{{ messages[0].content[:8] }}",
        "{{ messages[0].content.split('the')[-1] }}",
    ],
)
def test_a_prompt_without_the_last_message_is_refused(source: str) -> None:
    with pytest.raises(RejectedError, match="leaves out the text of the last message"):
        render(source, QUESTION)


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("{{ messages[-1].content | trim }}", [{"role": "user", "content": "\n a  b \n"}]),
        ("{{ messages[-1].content | replace('\n', ' ') }}", [QUESTION]),
        ("{{ messages[-1].content | tojson }}", [{"role": "user", "content": 'a "b"\n'}]),
        ("{{ messages[-1].content }}", [{"role": "user", "content": "<s> \ufdd0\ufdd1 <|user"}]),
        ("x", [{"role": "user", "content": " \n"}]),
        ("x", [{"role": "assistant", "content": None, "reasoning": "hm"}]),
        ("{{ messages[0].content }}", [QUESTION, {"role": "assistant", "content": ""}]),
        (
            "{{ messages[-1].content.split('</think>')[-1] }}",
            [{"role": "assistant", "content": "<think>hm</think>So it is."}],
        ),
        (
            "{{ messages[-1].content.blocks[-1].text }}",
            [
                {
                    "role": "assistant",
                    "content": {
                        "blocks": [
                            {"type": "thoughts", "text": "hm"},
                            {"type": "response", "text": "So it is."},
                        ]
                    },
                }
            ],
        ),
        (
            "{% for p in messages[-1].content.parts %}{{ p.text }}{% endfor %}",
            [
                {
                    "role": "user",
                    "content": {"parts": [{"type": "text", "text": "a"}, {"text": "b"}]},
                }
            ],
        ),
    ],
)
def test_what_templates_do_to_a_text_is_allowed(source: str, messages: list[Any]) -> None:
    assert render(source, *messages)


def test_the_missing_text_of_a_structure_is_seen() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "missing"}]
    with pytest.raises(RejectedError, match="leaves out"):
        render(
            "{{ messages[0].content.parts[0].text }}", {"role": "user", "content": {"parts": parts}}
        )


# What convert copies


@pytest.mark.parametrize("end", range(0, TEMPLATE.index("{% endfor %}"), 47))
def test_convert_refuses_a_template_that_is_cut_off(tmp_path: Path, end: int) -> None:
    source = write_checkpoint(tmp_path / "model", config_4x())
    (source / "chat_template.jinja").write_text(TEMPLATE[:end], encoding="utf-8")
    with pytest.raises(RejectedError, match=r"chat_template\.jinja"):
        prepare(source, Request(), "model")


@pytest.mark.parametrize(
    "text",
    [
        "{% include 'x' %}",
        "{{ bos_token | upper }}{{ messages[0].content }}",
        "{{ messages[0].content | wordwrap }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_convert_says_that_a_template_is_for_others_only(tmp_path: Path, text: str) -> None:
    source = write_checkpoint(tmp_path / "model", config_4x())
    (source / "chat_template.jinja").write_text(text, encoding="utf-8")
    notes = prepare(source, Request(), "model").plan.notes
    assert [note for note in notes if "cannot chat" in note and "chat_template.jinja" in note]


def test_convert_takes_a_whole_template_and_none(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", config_4x())
    whole = prepare(source, Request(), "model").plan.notes
    (source / "chat_template.jinja").unlink()
    assert prepare(source, Request(), "model").plan.notes == whole == ()
