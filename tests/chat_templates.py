"""Chat templates of each family of Apertus, and plain Jinja with the settings of transformers."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from apertus_mlx.text.template import ChatTemplate
from apertus_mlx.text.tokenizer import Tokenizer
from tests.chat_tokenizers import load_tokenizer

_HERE = Path(__file__).parent
V1 = (_HERE.parent / "apertus_mlx/hub/demo/model/chat_template.jinja").read_text(encoding="utf-8")
V1_1 = (_HERE / "templates/v1_1.jinja").read_text(encoding="utf-8")
# The first template of v1 never ends an assistant's last turn.
_END = (
    "{{- '<|assistant_end|>' if now.answering and not now.calling"
    " and not continue_assistant_message }}\n"
)
V1_FIRST = V1.replace(_END, "")
V1_5 = (
    V1.replace("<|inner_prefix|>", "<think>")
    .replace("<|inner_suffix|>", "</think>")
    .replace("else '[')", "else '<|tool_output_start|>')")
    .replace("']' if now.outputs", "'<|tool_output_end|>' if now.outputs")
    .replace("{{- '[' ~ block.outputs", "{{- '<|tool_output_start|>' ~ block.outputs")
    .replace("join(', ') ~ ']'", "join(', ') ~ '<|tool_output_end|>'")
)
# Of each family: its template, and the names that its tokenizer gives control tokens.
FAMILIES = {
    "v1": (V1, "v1"),
    "v1 first": (V1_FIRST, "v1"),
    "v1.1": (V1_1, "v1.1"),
    "v1.5": (V1_5, "v1.5"),
}


def load_template(family: str, directory: Path) -> tuple[ChatTemplate, Tokenizer]:
    """The template of a family and a small tokenizer, whose file is written to `directory`."""
    source, version = FAMILIES[family]
    tokenizer = load_tokenizer(directory, version)
    return ChatTemplate(source, tokenizer, name="chat_template.jinja"), tokenizer


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.cache
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def render_with_jinja(source: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """What plain Jinja makes of a template, with the settings and functions of transformers."""
    variables = {"bos_token": "<s>", "tools": None, **variables}
    return _compiled(source).render(messages=messages, **variables)
