"""A conversation: turns over one growing prefix, whose keys and values are computed once."""

from __future__ import annotations

from collections.abc import Callable, Generator

from apertus_mlx.cache import FULL_PRECISION, CacheConfig
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.cached_prefix import CachedPrefix, shared_length
from apertus_mlx.generation.decode import DEFAULT_PREFILL_STEP
from apertus_mlx.generation.model_folder import LoadedModel
from apertus_mlx.generation.options import DEFAULT_SAMPLING, SamplingOptions
from apertus_mlx.generation.run import Answer, Generation, Piece
from apertus_mlx.text.template import Message


class Conversation:
    """Messages so far, and a cache that holds as much of their prompt as is still valid.

    Every turn renders the whole conversation with the checkpoint's own template; the tokens that
    the new prompt shares with the cache are not computed again.

    Attributes:
        think: whether the model deliberates before it answers.
        messages: all so far.
        run: the latest answer's.

    Raises:
        RejectedError: the model has no chat template.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        system: str | None = None,
        think: bool = False,
        form: CacheConfig = FULL_PRECISION,
    ) -> None:
        loaded.folder.require_template()
        self._loaded = loaded
        self.think = think
        self._prefix = CachedPrefix(loaded.model, form)
        # By the number of messages before a turn: tokens of the prefix that are older than it.
        self._older: dict[int, int] = {}
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append(Message(role="system", content=system))
        self.run: Generation | None = None

    def ask(
        self,
        text: str,
        options: SamplingOptions = DEFAULT_SAMPLING,
        prefill_step: int = DEFAULT_PREFILL_STEP,
        cancelled: Callable[[], bool] | None = None,
        turn: int | None = None,
    ) -> Generator[Piece, None, None]:
        """Add a user's turn and yield the answer; an interrupted answer is kept as far as it went.

        It takes the place of all messages from number `turn` on, if there are any.

        Raises:
            UsageError: the conversation no longer fits the model's context; it stays as it was.
        """
        turn = len(self.messages) if turn is None else turn
        question = Message(role="user", content=text)
        prompt = self._loaded.folder.render([*self.messages[:turn], question], self.think)
        run = Generation(
            self._loaded,
            prompt,
            options,
            prefill_step,
            self._prefix,
            cancelled=cancelled,
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
        self.messages[turn:] = [question, answer]
        self._older[turn] = older
        for piece in run:
            if not piece.is_thought:
                answer["content"] = f"{answer['content']}{piece.text}"
            yield piece

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
        text = self.last_question
        if text is None:
            raise UsageError("there is nothing to retry")
        yield from self.ask(text, options, prefill_step, cancelled, len(self.messages) - 2)

    @property
    def last_answer(self) -> Answer | None:
        """The latest answer, as far as it went."""
        return None if self.run is None else self.run.answer

    @property
    def last_question(self) -> str | None:
        """The user's last message."""
        questions = [m["content"] for m in self.messages if m["role"] == "user"]
        return str(questions[-1]) if questions else None

    def undo(self) -> bool:
        """Forget the last question and its answer, in the cache, too; returns if there was one."""
        if self.last_question is None:
            return False
        self._prefix.cut(self._older.pop(len(self.messages) - 2, 0))
        del self.messages[-2:]
        return True
