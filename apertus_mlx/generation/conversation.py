"""A conversation: turns over one growing prefix, whose keys and values are computed once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import takewhile

from apertus_mlx.cache import FULL_PRECISION, CacheConfig
from apertus_mlx.errors import TooLongError, UsageError
from apertus_mlx.generation.cached_prefix import CachedPrefix, shared_length
from apertus_mlx.generation.decode import DEFAULT_PREFILL_STEP
from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.generation.options import DEFAULT_SAMPLING, SamplingOptions
from apertus_mlx.generation.run import Answer, Generation, Piece, ToolCall
from apertus_mlx.generation.tool_set import ToolSet
from apertus_mlx.text.answer_parser import new_call_id
from apertus_mlx.text.call_results import needs_results
from apertus_mlx.text.messages import read_messages
from apertus_mlx.text.template import Message

# Roles of what a conversation may begin with before its first question.
INSTRUCTING = ("system", "developer")


class Conversation:
    """Messages so far, and a cache that holds as much of their prompt as is still valid.

    Every turn renders the whole conversation with the checkpoint's own template; the tokens that
    the new prompt shares with the cache are not computed again. So the messages, the system message
    and `think` may change between turns.

    Attributes:
        tools: what the model may call.
        messages: all so far.
        run: the latest answer's.

    Raises:
        RejectedError: the model has no chat template.
        UsageError: it has no place for the tools, or not with `think`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        system: str | None = None,
        think: bool = False,
        form: CacheConfig = FULL_PRECISION,
        tools: ToolSet | None = None,
    ) -> None:
        loaded.folder.require_template()
        self._loaded = loaded
        self.tools = tools or ToolSet()
        self.think = think
        self._prefix = CachedPrefix(loaded.model, form)
        # By the number of messages before a turn: tokens of the prefix that are older than it.
        self._older: dict[int, int] = {}
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append(Message(role="system", content=system))
        self.run: Generation | None = None

    @property
    def think(self) -> bool:
        """Whether the model deliberates before it answers.

        Raises:
            UsageError: when it is set: the model does not deliberate where it has tools.
        """
        return self._think

    @think.setter
    def think(self, on: bool) -> None:
        self._loaded.folder.require_place(on, self.tools.definitions)
        self._think = on

    @property
    def system(self) -> str | None:
        """The text of the instructions that the conversation begins with.

        When it is set, one system message takes the place of all leading ones of `system` and
        `developer`, but for a developer's that has the structure of the template.
        """
        turns = read_messages(self.messages[: self._instructions])
        return str(turns[0].content) if turns and turns[0].role == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        count = self._instructions
        kept = [each for each in self.messages[:count] if _is_structured(each)]
        first = [] if text is None else [Message(role="system", content=text)]
        self._replace([*first, *kept, *self.messages[count:]])

    @property
    def _instructions(self) -> int:
        """How many messages come before the first that is neither of `system` nor `developer`."""
        return sum(1 for _ in takewhile(lambda each: each["role"] in INSTRUCTING, self.messages))

    def reset(self) -> None:
        """Forget all but the leading system and developer messages, in the cache, too."""
        self._replace(self.messages[: self._instructions])
        self._prefix.forget()
        self.run = None

    def load(self, messages: Sequence[Message]) -> None:
        """Go on from `messages` instead of those so far.

        Raises:
            RejectedError: the template refuses them; the conversation stays as it was.
            UsageError: they do not fit the model's context; likewise.
        """
        folder = self._loaded.folder
        folder.require_room(len(folder.render(messages, self.think, self.tools.definitions)))
        copied = [message.copy() for message in messages]
        if copied and (calls := copied[-1].get("tool_calls")):
            copied[-1]["tool_calls"] = [
                {**call, "id": call.get("id") or new_call_id()} for call in calls
            ]
        self._replace(copied)
        self.run = None

    def ask(
        self,
        text: str,
        options: SamplingOptions = DEFAULT_SAMPLING,
        prefill_step: int = DEFAULT_PREFILL_STEP,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generator[Piece, None, None]:
        """Add a user's turn and yield the answer; an interrupted answer is kept as far as it went.

        Raises:
            RejectedError: the template refuses the messages; the conversation stays as it was.
            UsageError: the conversation no longer fits the model's context, or calls of tools have
                no results yet; likewise.
        """
        if self.open_calls:
            raise UsageError("the last answer calls tools; give their results, or undo, first")
        question = Message(role="user", content=text)
        turn = len(self.messages)
        yield from self._answer([question], turn, options, prefill_step, cancelled)

    @property
    def open_calls(self) -> list[ToolCall]:
        """The calls that the last answer makes and that wait for their results."""
        calls = self._last_calls()
        return calls if needs_results([{"name": call.name} for call in calls]) else []

    def _last_calls(self) -> list[ToolCall]:
        last = self.messages[-1:]
        given = last[0].get("tool_calls") if last else None
        if not given:
            return []
        functions = read_messages(last)[0].blocks[-1]["calls"]
        return [
            ToolCall(str(call["id"]), **function)
            for call, function in zip(given, functions, strict=True)
        ]

    def give(
        self,
        results: Mapping[str, str],
        options: SamplingOptions = DEFAULT_SAMPLING,
        prefill_step: int = DEFAULT_PREFILL_STEP,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generator[Piece, None, None]:
        """Add the results of all calls of the last answer, by their ids, and yield the next.

        Raises:
            UsageError: they are of other calls, or no longer fit the model's context.
        """
        calls = [call.id for call in self._last_calls()]
        if not calls or set(calls) != set(results):
            wanted = ", ".join(calls) or "no call"
            raise UsageError(f"results: expected those of {wanted}, by their ids")
        added = [Message(role="tool", tool_call_id=each, content=results[each]) for each in calls]
        turn = len(self.messages)
        yield from self._answer(added, turn, options, prefill_step, cancelled)

    def retry(
        self,
        options: SamplingOptions = DEFAULT_SAMPLING,
        prefill_step: int = DEFAULT_PREFILL_STEP,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generator[Piece, None, None]:
        """Answer the last question again, as `ask` does, without reading it again.

        Raises:
            UsageError: there is none.
        """
        turn = self._last_turn()
        if turn is None:
            raise UsageError("there is nothing to retry")
        yield from self._answer([self.messages[turn]], turn, options, prefill_step, cancelled)

    def _answer(
        self,
        added: list[Message],
        turn: int,
        options: SamplingOptions,
        prefill_step: int,
        cancelled: Callable[[], bool] | None,
    ) -> Generator[Piece, None, None]:
        """Answer messages, which take the place of all from number `turn` on."""
        tools = self.tools.after_results if added[0]["role"] == "tool" else self.tools
        messages = [*self.messages[:turn], *added]
        prompt = self._loaded.folder.render(messages, self.think, tools.definitions)
        run = Generation(
            self._loaded,
            prompt,
            options,
            prefill_step,
            self._prefix,
            cancelled=cancelled,
            tool_names=tools.names,
            tools=tools.grammar,
            think=self.think,
        )
        older = shared_length(self._prefix.tokens, prompt[:-1])
        if turn < len(self.messages):
            # A turn that is answered again finds its own question in the cache.
            older = min(older, self._older.get(turn, 0))
        answer = Message(role="assistant", content="")
        self.run = run
        # An interrupt between these lines leaves no turn, or one that `undo` forgets together with
        # all that is older: never one whose tokens stay.
        self._older.pop(turn, None)
        self.messages[turn:] = [*added, answer]
        self._older[turn] = older
        for piece in run:
            if not piece.is_thought:
                answer["content"] = f"{answer['content']}{piece.text}"
            yield piece
        answer.update(run.answer.as_message())

    @property
    def last_answer(self) -> Answer | None:
        """The latest answer, as far as it went."""
        return None if self.run is None else self.run.answer

    @property
    def last_question(self) -> str | None:
        """The user's last message."""
        turn = self._last_turn()
        return None if turn is None else str(self.messages[turn]["content"])

    @property
    def context_length(self) -> int:
        """The most tokens that prompt and answer may have together."""
        return self._loaded.folder.context_length

    @property
    def questions(self) -> int:
        """How many messages are the user's."""
        return sum(message["role"] == "user" for message in self.messages)

    def undo(self) -> bool:
        """Forget the last question and its answer, in the cache, too; returns if there was one."""
        turn = self._last_turn()
        if turn is None:
            return False
        self._prefix.cut(self._older.pop(turn, 0))
        del self.messages[turn:]
        return True

    def fits_alone(self, text: str) -> bool:
        """Whether a question would have room if all that was said before it were forgotten."""
        messages = [*self.messages[: self._instructions], Message(role="user", content=text)]
        folder = self._loaded.folder
        try:
            folder.require_room(len(folder.render(messages, self.think, self.tools.definitions)))
        except TooLongError:
            return False
        return True

    def _last_turn(self) -> int | None:
        """Where the user's last message stands."""
        turns = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        return turns[-1] if turns else None

    def _replace(self, messages: list[Message]) -> None:
        # What is known of the cache is by the number of a message, and the numbers change.
        self._older.clear()
        self.messages = messages


def _is_structured(message: Message) -> bool:
    """Whether it is a developer's in the template's own structure, which is no text."""
    return message["role"] == "developer" and isinstance(message.get("content"), Mapping)
