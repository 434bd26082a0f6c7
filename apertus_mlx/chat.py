"""A conversation: turns over one growing prefix, whose keys and values are computed once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from apertus_mlx.cache import FULL_PRECISION, Cache, CacheConfig, rewind
from apertus_mlx.decode import DEFAULT_PREFILL_STEP
from apertus_mlx.errors import RejectedError
from apertus_mlx.generate import DEFAULT_MAX_TOKENS, Generation, Piece, Result, Speaker
from apertus_mlx.sampling import SamplingParams
from apertus_mlx.template import Message


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
        self._think = think
        self._form = form
        self._cache: list[Cache] = speaker.model.make_cache(form)
        self._cached_ids: list[int] = []
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append(Message(role="system", content=system))
        self.last_result: Result | None = None

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
        question = Message(role="user", content=text)
        prompt = self._template.render([*self.messages, question], think=self._think)
        generation = Generation(
            self._speaker,
            prompt,
            params,
            max_tokens,
            stop_strings,
            prefill_step,
            self._cache,
            self._keep_shared_prefix(prompt),
            on_prefill,
        )
        try:
            yield from generation
        finally:
            self.last_result = result = generation.result
            self._cached_ids = [*prompt, *result.token_ids][: self._cache[0].offset]
            self.messages += [question, Message(role="assistant", content=result.text)]

    @property
    def last_question(self) -> str | None:
        """The user's last message."""
        questions = [m["content"] for m in self.messages if m["role"] == "user"]
        return str(questions[-1]) if questions else None

    def undo(self) -> bool:
        """Forget the last question and its answer; returns whether there was one."""
        if len(self.messages) < 2:
            return False
        del self.messages[-2:]
        return True

    def _keep_shared_prefix(self, prompt: Sequence[int]) -> int:
        """Cut the cache back to what it shares with `prompt`; returns how many tokens that is."""
        # The last token is always computed: its logits start the answer.
        longest = min(len(self._cached_ids), len(prompt) - 1)
        shared = next(
            (i for i in range(longest) if self._cached_ids[i] != prompt[i]),
            longest,
        )
        excess = len(self._cached_ids) - shared
        if not rewind(self._cache, excess):
            self._cache = self._speaker.model.make_cache(self._form)
            shared = 0
        del self._cached_ids[shared:]
        return shared
