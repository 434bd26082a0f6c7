"""The form of prompts is told by what a template writes, of families and of what is like them."""

from __future__ import annotations

from pathlib import Path

import pytest

from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.convert.write.template_version import (
    CASES,
    VERSIONS,
    describe_template,
    template_version,
)
from tests.builders import config_4x
from tests.chat_templates import FAMILIES, V1, V1_1, V1_FIRST, load_template, render_with_jinja

CONFIG = parse_config(config_4x())


def folder_with(source: str, version: str, directory: Path) -> Path:
    load_template("v1.1" if version == "v1.1" else "v1", directory)
    if version == "v1.5":
        load_template("v1.5", directory)
    (directory / "chat_template.jinja").write_text(source, encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    ("family", "version"),
    [("v1", "v1"), ("v1 first", "v1-first"), ("v1.1", "v1.1"), ("v1.5", "unknown")],
)
def test_families(family: str, version: str, tmp_path: Path) -> None:
    source, tokenizer = FAMILIES[family]
    assert template_version(folder_with(source, tokenizer, tmp_path), CONFIG) == version


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Deliberation: ", "Thinking: "),
        ("'<|assistant_start|>' if add_generation_prompt", "'' if add_generation_prompt"),
        ("'<|inner_suffix|>'", "'<|inner_suffix|>\\n'"),
        ("'// ' + tool.description", "'//' + tool.description"),
        ("'\": ' + call.arguments", "'\":' + call.arguments"),
        ("']' if now.outputs", "']\\n' if now.outputs"),
    ],
)
def test_a_template_that_writes_otherwise_is_unknown(old: str, new: str, tmp_path: Path) -> None:
    assert old in V1
    assert template_version(folder_with(V1.replace(old, new), "v1", tmp_path), CONFIG) == "unknown"


def test_what_stands_in_place_of_a_system_message(tmp_path: Path) -> None:
    assert describe_template(folder_with(V1, "v1", tmp_path), CONFIG) == ("v1", "")
    macro = "{%- macro default_system() -%}{%- endmacro -%}"
    text = "Helpful.\\nToday: {{ strftime_now('%Y-%m-%d') }}".replace("\\n", "\n")
    dated = V1.replace(macro, macro.replace("-%}{%-", f"-%}}{text}{{%-"))
    assert dated != V1
    found = describe_template(folder_with(dated, "v1", tmp_path), CONFIG)
    assert found == ("v1", "Helpful.\nToday: {date}")


def test_no_template_and_damaged_ones(tmp_path: Path) -> None:
    load_template("v1", tmp_path)
    assert template_version(tmp_path, CONFIG) is None
    (tmp_path / "chat_template.jinja").write_text("{% for x %}")
    assert template_version(tmp_path, CONFIG) == "unknown"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert template_version(tmp_path, CONFIG) == "unknown"


@pytest.mark.parametrize(
    ("version", "source"), [("v1", V1), ("v1.1", V1_1), ("v1-first", V1_FIRST)]
)
def test_prompts_are_those_of_plain_jinja(version: str, source: str) -> None:
    """Where the messages need no rewriting, the prompts that are expected are what Jinja writes."""
    plain = [case for case in CASES if not case.tools and not case.think]
    assert len(plain) == 2
    for case in plain:
        text = render_with_jinja(source, case.messages, add_generation_prompt=True)
        for control in range(61, 73):
            text = text.replace(_name(control, version), f"<{control}>")
        assert text == "<s>" + case.prompt.replace("{after}", VERSIONS[version][0])


def _name(control: int, version: str) -> str:
    from apertus_mlx.text.roles import Role

    role = next(role for role in Role if control in (role.start, role.end))
    if version == "v1.1":
        return f"<SPECIAL_{control}>"
    sides = ("prefix", "suffix") if role in (Role.INNER, Role.TOOLS) else ("start", "end")
    return f"<|{role.name.lower()}_{sides[control - role.start]}|>"
