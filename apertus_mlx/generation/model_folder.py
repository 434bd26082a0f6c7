"""A model in two steps: its folder, whose small files are read and checked, then its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from apertus_mlx.backend.choose import load_for, uses_cpu
from apertus_mlx.backend.mlx import DTYPES, compute_dtype
from apertus_mlx.backend.ranks import Ranks, joined
from apertus_mlx.cache import CacheConfig
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.generation_config import GenerationConfig, read_generation_config
from apertus_mlx.checkpoint.inventory import Inventory, take_inventory
from apertus_mlx.errors import RejectedError, TooLongError, UsageError
from apertus_mlx.generation.drafts import Drafting
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.generation.prompt_cache import PromptCache
from apertus_mlx.model.language_model import LanguageModel
from apertus_mlx.text.messages import read_messages, require_results
from apertus_mlx.text.output_filter import OutputFilter
from apertus_mlx.text.roles import Role
from apertus_mlx.text.template import ChatTemplate, Message
from apertus_mlx.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What a model's folder holds but the weights: enough to render prompts and plan memory."""

    directory: Path
    inventory: Inventory
    generation_config: GenerationConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.inventory.config

    @property
    def context_length(self) -> int:
        """Most tokens that prompt and answer may have together."""
        return self.config.max_position_embeddings

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer; the end of the assistant's turn and of its calls always do."""
        stated = self.generation_config.eos_token_ids or self.config.eos_token_ids
        return frozenset({*stated, Role.ASSISTANT.end, Role.TOOLS.end})

    @property
    def notes(self) -> list[str]:
        """What in the folder is not used, and why; a line each."""
        notes = [f"{name}: not used, {reason}" for name, reason in self.inventory.dropped.items()]
        if self.config.asks_for_code:
            keys = ", ".join(self.config.asks_for_code)
            notes.append(f"config.json asks for code of its own ({keys}); never run")
        if ignored := self.generation_config.ignored_keys:
            notes.append(f"generation_config.json: not implemented, ignored: {', '.join(ignored)}")
        if self.template is None:
            notes.append("the model has no chat template (a base model?); it continues text")
        return notes

    def render(
        self,
        messages: Sequence[Message],
        think: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> list[int]:
        """The prompt of a conversation, by the model's own chat template; see its `render`.

        Raises:
            RejectedError: there is no template, or it refuses the messages.
            UsageError: a message or tool is wrong, or cannot fit the context.
        """
        template = self.require_template()
        for turn in read_messages(messages):
            for text in turn.texts:
                self.require_short(text)
        return template.render(messages, think=think, tools=tools)

    def require_place(self, think: bool, tools: Sequence[Mapping[str, object]]) -> None:
        """Refuse tools that the chat template cannot write, or not together with a deliberation.

        Raises:
            RejectedError, UsageError: see `render`.
        """
        if tools:
            self.render([Message(role="user", content="?")], think, tools)

    def require_template(self) -> ChatTemplate:
        """The model's chat template.

        Raises:
            RejectedError: it has none.
        """
        if self.template is None:
            raise RejectedError(
                f"{self.directory}: has no chat template (a base model?); "
                "use `generate --raw` to continue text"
            )
        return self.template

    def encode_raw(self, text: str) -> list[int]:
        """The prompt that `text` is without a chat template: BOS, if the model has one, and text.

        Raises:
            UsageError: it cannot fit the context.
        """
        self.require_short(text)
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return bos + self.tokenizer.encode(text)

    def prompt_ids(
        self,
        prompt: str | Sequence[Message],
        *,
        system: str | None = None,
        think: bool = False,
        raw: bool = False,
        tools: Sequence[Mapping[str, object]] = (),
        name: str = "messages",
    ) -> list[int]:
        """The prompt of a question, or of messages, of which the last is to be answered.

        A text is continued as it is if `raw`, or without a template. `name` is what error messages
        call the messages.

        Raises:
            RejectedError: the template refuses the messages.
            UsageError: nothing to say, more than the context can hold, calls without results, or
                what only a template can say with `raw` or without one.
        """
        require_prompt(prompt, system, think, raw, bool(tools), name)
        if isinstance(prompt, str):
            if raw:
                return self.encode_raw(prompt)
            if self.template is None:
                if system is not None or think or tools:
                    raise UsageError(
                        "this model has no chat template, so none of --system, --think and --tools"
                    )
                return self.encode_raw(prompt)
            prompt = [Message(role="user", content=prompt)]
        first = [] if system is None else [Message(role="system", content=system)]
        return self.render([*first, *prompt], think, tools)

    def require_short(self, text: str) -> None:
        """Refuse a text that cannot fit the context; encoding it would take 190 times its size.

        Raises:
            UsageError: even in its vocabulary's longest tokens it does not fit.
        """
        if len(text.encode("utf-8", "surrogatepass")) <= self.context_length:
            return  # no token is shorter than a byte, and knowing the longest takes a second
        least = self.tokenizer.least_tokens(text)
        if least > self.context_length:
            raise TooLongError(
                f"the prompt has {least} tokens or more, but the model's context is "
                f"{self.context_length}, answer included; shorten it"
            )

    def require_room(self, prompt_tokens: int) -> int:
        """How many tokens an answer may have after a prompt.

        Raises:
            UsageError: none.
        """
        room = self.context_length - prompt_tokens
        if room < 1:
            raise TooLongError(
                f"the prompt has {prompt_tokens} tokens, but the model's context is "
                f"{self.context_length}, answer included; shorten it by {1 - room} or more"
            )
        return room

    def number(self, options: RunOptions) -> mx.Dtype:
        """In which keys and values are computed, and kept where they are not quantized."""
        dtype = "float32" if uses_cpu(options.compute, options.dtype) else options.dtype
        return DTYPES[dtype] if dtype else compute_dtype(self.inventory)

    def prompt_cache(self, path: Path, form: CacheConfig, options: RunOptions) -> PromptCache:
        """The prompt cache at `path`, checked; of several machines all but rank 0 add a number.

        Raises:
            RejectedError: it is damaged, or made under other conditions.
            UsageError: other machines have none, or one of other tokens.
        """
        part = self.inventory.part
        if part is not None and part.rank:
            path = path.with_name(f"{path.name}.{part.rank}")
        found = PromptCache(path, self.inventory, form, self.number(options))
        if (ranks := joined()) is not None:
            ranks.require_alike({"prompt cache": repr(found.tokens).encode()})
        return found

    def load(
        self,
        options: RunOptions | None = None,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> LoadedModel:
        """Load the weights; `on_bytes` is told the bytes read so far and in all.

        Raises:
            RejectedError, UsageError: see `load_for`.
        """
        options = options or RunOptions()
        model = load_for(
            self.inventory, options.compute, options.dtype, options.precision, on_bytes,
            options.embedding,
        )  # fmt: skip
        return LoadedModel(self, model, ranks=joined())


def open_folder(directory: Path) -> ModelFolder:
    """Read and check all files of `directory` but the weights.

    Raises:
        NotFoundError, RejectedError: see `take_inventory`, `Tokenizer.load` and
            `ChatTemplate.load`.
    """
    inventory = take_inventory(directory)
    config = inventory.config
    generation_config = read_generation_config(directory, config.vocab_size)
    tokenizer = Tokenizer.load(
        directory, vocab_size=config.vocab_size, bos_token_id=config.bos_token_id
    )
    template = ChatTemplate.load(directory, tokenizer)
    return ModelFolder(directory, inventory, generation_config, tokenizer, template)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model's folder and its weights, ready to run.

    Attributes:
        output_filter: what all its answers go through.
        drafting: what guesses the tokens of its answers, if anything does.
        ranks: those that compute it together; None where this process does alone.
    """

    folder: ModelFolder
    model: LanguageModel
    output_filter: OutputFilter | None = None
    drafting: Drafting | None = None
    ranks: Ranks | None = None


def require_prompt(
    prompt: str | Sequence[Message],
    system: str | None,
    think: bool,
    raw: bool,
    tools: bool,
    name: str = "messages",
) -> None:
    """Check what can be checked without a model; see `ModelFolder.prompt_ids`.

    Raises:
        UsageError: an empty prompt, calls without results, or `raw` together with what only a
            template can say.
    """
    if not prompt:
        raise UsageError("the prompt is empty")
    if raw and not isinstance(prompt, str):
        raise UsageError("--raw continues a text, and these are messages")
    if raw and (system is not None or think or tools):
        raise UsageError("--raw takes no chat template, so none of --system, --think and --tools")
    if not isinstance(prompt, str):
        require_results(prompt, name)
