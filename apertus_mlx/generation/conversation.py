"""A conversation: turns over one growing prefix, whose keys and values are computed once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from apertus_mlx.cache import FULL_PRECISION, CacheConfig
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.generation.cached_prefix import CachedPrefix, shared_length
from apertus_mlx.generation.decode import DEFAULT_PREFILL_STEP
from apertus_mlx.generation.run import DEFAULT_MAX_TOKENS, Generation, Piece, Result, Speaker
from apertus_mlx.generation.sampling import SamplingParams
from apertus_mlx.text.template import Message


class Conversation:
    """Messages so far, and a cache that holds as much of their prompt as is still valid.

    Every turn renders the whole conversation with the checkpoint's own template; the tokens that
    the new prompt shares with the cache are not computed again.

    Raises:
        RejectedError: the model has no chat template.
    """

    def __init__(
        self,
        speaker: Speaker,
        system: str | None = None,
        think: bool = False,
        form: CacheConfig = FULL_PRECISION,
    ) -> None:
        if speaker.template is None:
            raise RejectedError(
                f"{speaker.directory}: has no chat template (a base model?); "
                "use `generate --raw` to continue text"
            )
        self._speaker = speaker
        self._template = speaker.template
        self.think = think
        self._prefix = CachedPrefix(speaker.model, form)
        # By the number of messages before a turn: tokens of the prefix that are older than it.
        self._older: dict[int, int] = {}
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append(Message(role="system", content=system))
        self._run: Generation | None = None

    def ask(
        self,
        text: str,
        params: SamplingParams,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop_strings: Sequence[str] = (),
        prefill_step: int = DEFAULT_PREFILL_STEP,
        on_prefill: Callable[[int], None] | None = None,
    ) -> Generator[Piece, None, None]:
        """Add a user's turn and yield the answer; an interrupted answer is kept as far as it went.

        Raises:
            UsageError: the conversation no longer fits the model's context; it stays as it was.
        """
        turn = len(self.messages)
        yield from self._answer(
            turn, text, params, max_tokens, stop_strings, prefill_step, on_prefill
        )

    def retry(
        self,
        params: SamplingParams,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop_strings: Sequence[str] = (),
        prefill_step: int = DEFAULT_PREFILL_STEP,
        on_prefill: Callable[[int], None] | None = None,
    ) -> Generator[Piece, None, None]:
        """Answer the last question again, as `ask` does, without reading it again.

        Raises:
            UsageError: there is none.
        """
        text = self.last_question
        if text is None:
            raise UsageError("there is nothing to retry")
        turn = len(self.messages) - 2
        yield from self._answer(
            turn, text, params, max_tokens, stop_strings, prefill_step, on_prefill
        )

    def _answer(
        self,
        turn: int,
        text: str,
        params: SamplingParams,
        max_tokens: int,
        stop_strings: Sequence[str],
        prefill_step: int,
        on_prefill: Callable[[int], None] | None,
    ) -> Generator[Piece, None, None]:
        """Answer `text` in the place of all messages from number `turn` on."""
        question = Message(role="user", content=text)
        prompt = self._template.render([*self.messages[:turn], question], think=self.think)
        run = Generation(
            self._speaker,
            prompt,
            params,
            max_tokens,
            stop_strings,
            prefill_step,
            self._prefix,
            on_prefill,
        )
        older = shared_length(self._prefix.tokens, prompt[:-1])
        if turn < len(self.messages):
            # A turn that is answered again finds its own question in the cache.
            older = min(older, self._older.get(turn, 0))
        answer = Message(role="assistant", content="")
        self._run = run
        # An interrupt between these lines leaves no turn, or one that `undo` forgets together with
        # all that is older: never one whose tokens stay.
        self._older.pop(turn, None)
        self.messages[turn:] = [question, answer]
        self._older[turn] = older
        for piece in run:
            if not piece.is_thought:
                answer["content"] = f"{answer['content']}{piece.text}"
            yield piece

    @property
    def last_result(self) -> Result | None:
        """What the latest answer took, as far as it went."""
        return None if self._run is None else self._run.result

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
