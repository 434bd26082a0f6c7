"""A checkpoint's own chat template: messages to the token ids of a prompt.

Control tokens come from the template's text only; what messages contribute stays plain text,
whatever it spells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jinja2

from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.text.template.marks import MarkedTemplate
from apertus_mlx.text.template.template_file import read_source, read_token_texts
from apertus_mlx.text.tokenizer import Tokenizer


class UnsupportedTemplateError(RejectedError):
    """A sound template that asks for what the sandbox does not have, or refuses the messages."""


class Message(TypedDict):
    """One turn of a conversation; the template decides which roles and contents it takes.

    Attributes:
        role: Such as `system`, `user`, `assistant`, `tool`, `developer`.
        content: A text, or the structure that the template documents.
        tool_calls: Calls that an assistant's message makes.
    """

    role: str
    content: object
    tool_calls: NotRequired[Sequence[Mapping[str, object]]]


class ChatTemplate:
    """A compiled chat template and the tokenizer it writes for.

    Attributes:
        name: Where the template came from, for messages.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        *,
        name: str,
        texts: Mapping[str, str] | None = None,
    ):
        """Compile `source`.

        Args:
            source: The Jinja text.
            tokenizer: Of the same checkpoint.
            name: What error messages call the template.
            texts: Further variables of the template, such as `eos_token`.

        Raises:
            RejectedError: it is empty or no template, or asks for what the sandbox does not have.
        """
        if not source.strip():
            raise RejectedError(f"{name}: the chat template is empty; fetch it again or remove it")
        self.name = name
        self._tokenizer = tokenizer
        # v1.1 switches deliberation by a developer message, v1 by a variable.
        self._thinks_by_message = "has_thinking" in source
        own_texts = dict(texts or {})
        if tokenizer.bos_id is not None:
            own_texts["bos_token"] = tokenizer.id_to_token(tokenizer.bos_id) or ""
        try:
            self._template = MarkedTemplate(source, tokenizer, own_texts)
        except Exception as error:
            raise self._rejected(error) from None

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """Find and compile the template of the checkpoint in `directory`.

        Returns:
            The template; None for a checkpoint without one, as base models are.

        Raises:
            RejectedError: a file is damaged, or the template unusable.
        """
        source, path = read_source(directory)
        if source is None:
            return None
        return cls(source, tokenizer, name=str(path), texts=read_token_texts(directory))

    def render(
        self,
        messages: Sequence[Message],
        *,
        think: bool = False,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the token ids of the prompt, with exactly one BOS at its front.

        Args:
            messages: The conversation.
            think: Whether the model deliberates before it answers.
            tools: What it may call, each `{name, description, parameters}`.
            add_generation_prompt: Whether the prompt ends where the assistant begins.

        Raises:
            RejectedError: the template refuses the messages, leaves the last one out, looks at the
                text of a control token, or breaks its limits.
            UsageError: the template has no way to do what is asked for.
        """
        pieces = self._render(messages, think, tools, add_generation_prompt)
        if messages and not _holds(pieces, messages[-1]):
            raise RejectedError(
                f"{self.name}: the chat template leaves out the text of the last message; it is "
                "cut off, or not for such messages"
            )
        ids: list[int] = []
        for piece in pieces:
            ids += self._tokenizer.encode(piece) if isinstance(piece, str) else [piece]
        bos_id = self._tokenizer.bos_id
        if bos_id is None:
            return ids
        start = next((i for i, token_id in enumerate(ids) if token_id != bos_id), len(ids))
        return [bos_id, *ids[start:]]

    def _render(
        self,
        messages: Sequence[Message],
        think: bool,
        tools: Sequence[Mapping[str, object]],
        add_generation_prompt: bool,
    ) -> list[str | int]:
        """Return the prompt's plain texts and control tokens in order."""
        plain: list[Any] = [dict(message) for message in messages]
        if self._thinks_by_message:
            if tools:
                raise UsageError(
                    f"{self.name}: takes tools as `formatted_tools` of a developer message only"
                )
            if think and not any(message.get("role") == "developer" for message in plain):
                developer = {"role": "developer", "content": {"has_thinking": True}}
                after_system = 1 if plain and plain[0].get("role") == "system" else 0
                plain.insert(after_system, developer)
        data = json.dumps([plain, tools or None], ensure_ascii=False, default=_plain)
        variables = {"add_generation_prompt": add_generation_prompt, "enable_thinking": think}
        try:
            return self._template.write(data, variables)
        except Exception as error:
            raise self._rejected(error) from None

    def _rejected(self, error: Exception) -> RejectedError:
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        if isinstance(error, RecursionError):
            reason = "it nests calls or data without end"
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        # A filter or test that is missing here is a TemplateAssertionError, a kind of this one.
        damaged = type(error) is jinja2.TemplateSyntaxError
        kind = RejectedError if damaged else UnsupportedTemplateError
        refused = type(error) is jinja2.TemplateError  # of `raise_exception`
        does = "refuses these messages" if refused else "failed"
        return kind(f"{self.name}{line}: the chat template {does}: {reason}")


def _plain(value: object) -> object:
    """Return what is like a dictionary or a list as one; for `json`, which knows only these."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return list(value)
    raise TypeError(f"a message holds a {type(value).__name__}")


def _holds(pieces: Sequence[str | int], message: Message) -> bool:
    """Return whether a prompt holds the text of `message`, as it is or as JSON, blanks aside.

    Of an assistant's text the last word is enough: a template may leave out thoughts.
    """
    texts = list(_texts(message.get("content")))
    if message.get("role") == "assistant":
        texts = texts[-1:] and texts[-1].split()[-1:]
    prompt = "".join("".join(piece for piece in pieces if isinstance(piece, str)).split())
    return all(
        any("".join(form.split()) in prompt for form in (text, _in_json(text))) for text in texts
    )


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _texts(content: object) -> Iterator[str]:
    """Yield a message's texts: its content, or what is called `text` in a structure."""
    if isinstance(content, Mapping):
        items = content.items()
        content = [each for key, each in items if key == "text" or not isinstance(each, str)]
    if isinstance(content, str):
        yield content
    elif isinstance(content, Sequence):
        for part in content:
            yield from _texts(part)
