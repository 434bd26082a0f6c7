"""A checkpoint's own chat template: messages to the token ids of a prompt.

Control tokens come from the template's text only; what messages contribute stays plain text,
whatever it spells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from apertus_mlx.errors import RejectedError
from apertus_mlx.text.chat_form import write_turns
from apertus_mlx.text.messages import Message, Turn, read_messages, require_answer
from apertus_mlx.text.roles import Role
from apertus_mlx.text.template.marks import MarkedTemplate
from apertus_mlx.text.template.probes import ProbedForm
from apertus_mlx.text.template.template_file import read_source, read_token_texts
from apertus_mlx.text.tokenizer import Tokenizer
from apertus_mlx.text.tool_definitions import read_tools

# What templates of this process write as the present time, if `fix_now` was called.
_fixed: list[datetime] = []


def fix_now() -> None:
    """Let templates of this process write the present date for ever.

    Prompts that begin with a date then begin alike tomorrow, too, so that caches stay of use.
    """
    _fixed[:] = [datetime.now()]


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
        self._form = ProbedForm(self._probe)
        own_texts = dict(texts or {})
        if tokenizer.bos_id is not None:
            own_texts["bos_token"] = tokenizer.id_to_token(tokenizer.bos_id) or ""
        self._template = MarkedTemplate(source, tokenizer, name, own_texts)

    @property
    def thinks_with_tools(self) -> bool:
        """Whether a model of this template may deliberate where it has tools."""
        return not self._form.encloses_results

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
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Return the token ids of the prompt, with exactly one BOS at its front.

        Args:
            messages: The conversation, see `Message`.
            think: Whether the model deliberates before it answers. If not, thoughts of earlier
                turns are left out.
            tools: What it may call, see `read_tools`.
            add_generation_prompt: Whether the prompt ends where the assistant begins.
            continue_final_message: Whether it ends within the last message instead, an answer that
                is to go on.

        Raises:
            RejectedError: the template refuses the messages, leaves the last one out, looks at the
                text of a control token, or breaks its limits.
            UsageError: a message or tool is wrong, see `read_messages` and `read_tools`, or the
                template has no way to do what is asked for.
        """
        if continue_final_message:
            require_answer(messages)
            add_generation_prompt = False
        turns = read_messages(messages)
        pieces = self._render(turns, think, tools, add_generation_prompt)
        if turns and not _holds(pieces, turns[-1]):
            raise RejectedError(
                f"{self.name}: the chat template leaves out the text of the last message; it is "
                "cut off, or not for such messages"
            )
        ids: list[int] = []
        for piece in pieces:
            ids += self._tokenizer.encode(piece) if isinstance(piece, str) else [piece]
        if continue_final_message and ids[-1:] == [Role.ASSISTANT.end]:
            del ids[-1]
        bos_id = self._tokenizer.bos_id
        if bos_id is None:
            return ids
        start = next((i for i, token_id in enumerate(ids) if token_id != bos_id), len(ids))
        return [bos_id, *ids[start:]]

    def _render(
        self,
        turns: Sequence[Turn],
        think: bool,
        tools: Sequence[Mapping[str, object]] | None,
        add_generation_prompt: bool,
    ) -> list[str | int]:
        """Return the prompt's plain texts and control tokens in order."""
        now = _fixed[0] if _fixed else datetime.now()
        written = write_turns(turns, read_tools(tools), think, self._form)
        return self._write(*written, think, add_generation_prompt, now)

    def _probe(self, messages: list[Any], tools: Any, think: bool) -> list[str | None]:
        # Probes are compared, so they have one time.
        pieces = self._write(messages, tools, think, False, datetime.min)
        return [piece if isinstance(piece, str) else None for piece in pieces]

    def _write(
        self, messages: Any, tools: Any, think: bool, add_generation_prompt: bool, now: datetime
    ) -> list[str | int]:
        data = json.dumps([messages, tools or None], ensure_ascii=False)
        variables = {"add_generation_prompt": add_generation_prompt, "enable_thinking": think}
        return self._template.write(data, variables, now)


def _holds(pieces: Sequence[str | int], turn: Turn) -> bool:
    """Return whether a prompt holds the texts of `turn`, as they are or as JSON, blanks aside.

    Of an assistant's text the last word is enough: a template may leave out thoughts.
    """
    texts = turn.texts
    if turn.role == "assistant":
        texts = [word for text in texts for word in text.split()[-1:]]
    prompt = "".join("".join(piece for piece in pieces if isinstance(piece, str)).split())
    forms = ((text, json.dumps(text, ensure_ascii=False)[1:-1]) for text in texts)
    return all(any("".join(form.split()) in prompt for form in both) for both in forms)
