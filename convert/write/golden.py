"""`apertus_mlx_golden_prompts.json`: prompts and their token ids, for an app to test itself with.

Another tokenizer or template renderer, such as an app's in Swift, has to come to the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.convert.write.manifest import write_json
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.system.model_files import exists
from apertus_mlx.system.strict_json import read_object
from apertus_mlx.text.template import ChatTemplate, Message, UnsupportedTemplateError
from apertus_mlx.text.tokenizer import Tokenizer

GOLDEN = "apertus_mlx_golden_prompts.json"
FORMAT_VERSION = 1
TEXTS = (
    "The capital of France is",
    "Grüezi! Wie viel kostet das? – 3,50 €",
    "二加二等于几?  Привет, мир\n\tहिन्दी العربية 🏔️",
    "for (int i = 0; i < 10; i++) { x += i; }",
)
_QUESTION = Message(role="user", content="What is the capital of Switzerland?")
_SYSTEM = Message(role="system", content="You answer in one sentence.")
_ANSWER = Message(role="assistant", content="The capital of Switzerland is Bern.")
CONVERSATIONS: Mapping[str, tuple[tuple[Message, ...], bool]] = {
    "question": ((_QUESTION,), False),
    "question, thinking": ((_QUESTION,), True),
    "system and question": ((_SYSTEM, _QUESTION), False),
    "second turn": (
        (_QUESTION, _ANSWER, Message(role="user", content="  Und wie heisst der Fluss dort? 🏞️\n")),
        False,
    ),
}


def golden_prompts(directory: Path, config: ModelConfig) -> dict[str, Any]:
    """What tokenizer and chat template of the folder `directory` make of some texts.

    Conversations that the template does not take, or all where there is none, are left out; so is
    everything where this package cannot read the tokenizer.
    """
    texts: list[dict[str, Any]] = []
    conversations: list[dict[str, Any]] = []
    try:
        tokenizer = Tokenizer.load(
            directory, vocab_size=config.vocab_size, bos_token_id=config.bos_token_id
        )
        texts += [{"text": text, "token_ids": tokenizer.encode(text)} for text in TEXTS]
        template = ChatTemplate.load(directory, tokenizer)
    except RejectedError:
        template = None
    for name, (messages, think) in CONVERSATIONS.items() if template else ():
        try:
            ids = template.render(messages, think=think) if template else []
        except (RejectedError, UsageError):
            continue
        conversations.append(
            {"name": name, "messages": messages, "enable_thinking": think, "token_ids": ids}
        )
    return {"format_version": FORMAT_VERSION, "texts": texts, "conversations": conversations}


def check_template(directory: Path, config: ModelConfig) -> str | None:
    """Refuse a chat template that is damaged; return what to say of one that only others can run.

    A folder without a template is in order, and so is a tokenizer that this package cannot read.

    Raises:
        RejectedError: the template is empty, cut off, or leaves out what the user says.
    """
    try:
        tokenizer = Tokenizer.load(
            directory, vocab_size=config.vocab_size, bos_token_id=config.bos_token_id
        )
    except RejectedError:
        return None
    try:
        template = ChatTemplate.load(directory, tokenizer)
        if template is not None:
            template.render(CONVERSATIONS["question"][0])
    except UnsupportedTemplateError as error:
        return f"apertus-mlx cannot chat with the output: {error}"
    return None


def write_golden(directory: Path, config: ModelConfig) -> None:
    """Write the file into the folder whose tokenizer and template it is about."""
    write_json(directory / GOLDEN, golden_prompts(directory, config))


def differing(directory: Path, config: ModelConfig) -> list[str]:
    """Which prompts of the folder's own file come out otherwise today; none if it has no file.

    Raises:
        RejectedError: the file is damaged.
    """
    path = directory / GOLDEN
    if not exists(path):
        return []
    # As the prompts of today are after a way through JSON.
    stored, now = read_object(path), json.loads(json.dumps(golden_prompts(directory, config)))
    if stored.get("format_version") != FORMAT_VERSION:
        return ["format_version"]
    return [
        str(entry.get("name", entry.get("text")))[:60] if isinstance(entry, dict) else str(kind)
        for kind in ("texts", "conversations")
        for entry in _entries(stored, kind)
        if entry not in now[kind]
    ]


def _entries(stored: Mapping[str, Any], kind: str) -> list[Any]:
    entries = stored.get(kind)
    return entries if isinstance(entries, list) else [kind]
