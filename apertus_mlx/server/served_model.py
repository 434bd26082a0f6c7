"""The one model that is served: its names, and the prompts that it is given."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from apertus_mlx.errors import ApertusError
from apertus_mlx.generation.grammar import find_engine, has_engine
from apertus_mlx.generation.model_folder import ModelFolder
from apertus_mlx.generation.tool_grammar import ToolGrammar
from apertus_mlx.server.errors import ApiError, in_request, wrong
from apertus_mlx.server.fields import kind_of, require_messages, shown
from apertus_mlx.text.messages import read_messages
from apertus_mlx.text.roles import Role


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model behind all endpoints.

    Attributes:
        folder: what it is, but for its weights.
        names: what it is called; the first is what answers say.
        most_tokens: of an answer, where a request does not say.
        think: whether it deliberates, where a request does not say.
        max_thought_tokens: of a deliberation.
        filtered: whether answers go through an output filter.
        since: seconds of Unix time.
    """

    folder: ModelFolder
    names: Sequence[str]
    most_tokens: int = 4096
    think: bool = False
    max_thought_tokens: int | None = None
    filtered: bool = False
    since: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        """What answers call it."""
        return self.names[0]

    def require_name(self, name: Any) -> None:
        """Refuse another model.

        Raises:
            ApiError: 404 another one, 400 no name.
        """
        if name is None or name == "default" or name in self.names:
            return
        if not isinstance(name, str):
            raise wrong("model", f"expected a text, not {kind_of(name)}")
        known = ", ".join([*self.names, "default"])
        raise ApiError(
            404, f"model {shown(name)}: not served here; there is {known}", param="model",
            code="model_not_found",
        )  # fmt: skip

    def chat_prompt(
        self,
        messages: Any,
        think: bool,
        tools: Sequence[Any],
        continues: bool = False,
        generates: bool = True,
    ) -> list[int]:
        """The token ids of a conversation.

        `continues`: the answer goes on with the last message. `generates`: it ends where the
        assistant begins.

        Raises:
            ApiError: 400, a message is wrong, or the template refuses it.
        """
        require_messages(messages)
        try:
            for turn in read_messages(messages):
                for text in turn.texts:
                    self.folder.require_short(text)
            return self.folder.require_template().render(
                messages,
                think=think,
                tools=tools,
                continue_final_message=continues,
                add_generation_prompt=generates,
            )
        except ApertusError as error:
            raise in_request(error, "messages") from None

    def text_prompt(self, name: str, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, none of which it spells itself; BOS first, by default.

        Raises:
            ApiError: 400, it does not fit the context.
        """
        try:
            self.folder.require_short(text)
            ids = self.folder.tokenizer.encode(text)
        except ApertusError as error:
            raise in_request(error, name) from None
        bos = self.folder.tokenizer.bos_id
        return [bos, *ids] if add_special_tokens and bos is not None else ids

    def calls_are_certain(self, tools: ToolGrammar | None) -> bool:
        """Whether a call that has begun is sure to become one: a client may read its parts."""
        return tools is not None and tools.grammar is not None and not self.filtered

    def warm_grammars(self) -> None:
        """Bring the vocabulary into the form that grammars need, which takes seconds once."""
        if has_engine():
            stops = self.folder.stop_ids - {Role.TOOLS.end}
            find_engine(self.folder.tokenizer, self.folder.config.output_vocab_size, stops)

    def entry(self) -> dict[str, Any]:
        """What `/v1/models` says of it; clients look for the context under several names."""
        config, context = self.folder.config, self.folder.context_length
        return {
            "id": self.name,
            "object": "model",
            "created": self.since,
            "owned_by": "apertus-mlx",
            "aliases": list(self.names[1:]),
            "context_length": context,
            "max_model_len": context,
            "meta": {
                "n_ctx_train": context,
                "n_vocab": config.vocab_size,
                "size": self.folder.inventory.checkpoint.size_bytes,
            },
        }
