"""Grammars for answers: llguidance compiles them, and says which tokens may come next.

Both the tokenizer's form and a compiled grammar are kept, so that a second use costs nothing.
"""

from __future__ import annotations

import functools
import json
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from apertus_mlx.errors import UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from apertus_mlx.text.tokenizer import Tokenizer

Mask = NDArray[np.bool_]

# Between the parts of an answer: nothing, one blank, or a new line with up to 40 blanks. Without a
# bound a model can write blanks for ever.
WHITESPACE = r"[ ]|\n[ \t]{0,40}"
# What the engine is told beside a schema. Without \uXXXX a text has one spelling, so that no key
# can be written in a way that the schema does not see.
_SCHEMA_OPTIONS = {
    "whitespace_pattern": f"({WHITESPACE})?",
    "json_allowed_escapes": '"\\bfnrt',
    "lenient": False,
    "coerce_one_of": False,
}
_MAX_GRAMMAR_SIZE, _MAX_ITEMS_PER_STEP = 100_000, 20_000
_KEPT_GRAMMARS = 32


def has_engine() -> bool:
    """Whether the library that enforces grammars is installed."""
    try:
        import llguidance  # noqa: F401
    except ImportError:
        return False
    return True


def require_engine(what: str) -> None:
    """Require the library that enforces grammars.

    Raises:
        UsageError: it is not installed.
    """
    if not has_engine():
        raise UsageError(f"{what} needs llguidance; install it with: pip install llguidance")


def schema_grammar(schema: str) -> str:
    """The engine's grammar of one JSON value that follows a checked schema."""
    return f"start: {embedded_schema(schema)}"


def embedded_schema(schema: str) -> str:
    """A checked schema as a part of another grammar."""
    value = json.loads(schema)
    return "%json " + json.dumps({**value, "x-guidance": _SCHEMA_OPTIONS})


@functools.lru_cache(maxsize=_KEPT_GRAMMARS)
def check_grammar(grammar: str, option: str) -> None:
    """Compile a grammar for bytes alone, which needs no model.

    Raises:
        UsageError: the engine refuses it, or nothing follows it.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    backend = _vocabulary([*tokens, b"<end>"], [256], [256], list)
    _Grammar(backend, grammar, option).matcher(257).mask()


class Matcher:
    """How far one answer has come in a grammar.

    Raises (each method):
        UsageError: the grammar became too complex at this point.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, option: str) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._option = option

    @property
    def complete(self) -> bool:
        """Whether what has been accepted follows the grammar as a whole."""
        return self._matcher.is_accepting()

    def copy(self) -> Matcher:
        """Another one at the same point."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size, self._option)

    def mask(self) -> Mask:
        """Which tokens may come next, `[vocabulary]`; at least one."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require()
        found = np.unpackbits(bits, bitorder="little", count=self._vocab_size).view(np.bool_)
        if not found.any():
            raise UsageError(f"{self._option}: no value follows it")
        return found

    def accept(self, token: int) -> None:
        """Go on with a token that the mask allows."""
        self._matcher.consume_token(token)
        self._require()

    def _require(self) -> None:
        if self._matcher.is_error():
            raise _refusal(self._matcher.get_error(), self._option)


class Engine:
    """Grammars for one vocabulary.

    Attributes:
        text: which ids are text, `[vocabulary]`: no control token, and no row that pads it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Iterable[int]) -> None:
        """Use `find_engine`, which keeps them."""
        known = range(min(vocab_size, tokenizer.vocab_size))
        tokens = [tokenizer.token_bytes(token_id) for token_id in known]
        tokens += [b""] * (vocab_size - len(tokens))
        stops = sorted(stop for stop in stop_ids if stop < vocab_size)
        special = {i for i, token in enumerate(tokens) if not token or i in tokenizer.special_ids}
        special |= set(stops)
        self.text: Mask = np.array([i not in special for i in range(vocab_size)])
        self._vocab_size = vocab_size
        self._backend = _vocabulary(
            [token or b"<empty>" for token in tokens],
            sorted(special),
            stops,
            functools.partial(_encode, weakref.ref(tokenizer)),
        )
        self._grammars: OrderedDict[str, _Grammar] = OrderedDict()

    def matcher(self, grammar: str, option: str = "--schema") -> Matcher:
        """Begin an answer in `grammar`, which was checked under the name `option`.

        Raises:
            UsageError: see `check_grammar`.
        """
        found = self._grammars.pop(grammar, None) or _Grammar(self._backend, grammar, option)
        self._grammars[grammar] = found
        while len(self._grammars) > _KEPT_GRAMMARS:
            self._grammars.popitem(last=False)
        return found.matcher(self._vocab_size)


class _Grammar:
    """A compiled grammar."""

    def __init__(self, backend: LLTokenizer, grammar: str, option: str) -> None:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_grammar_size=_MAX_GRAMMAR_SIZE,
            step_max_items=_MAX_ITEMS_PER_STEP,
            verbose_errors=False,
        )
        self._option = option
        try:
            lark = LLMatcher.grammar_from_lark(grammar)
            self._start = LLMatcher(backend, lark, log_level=0, limits=limits)
        except ValueError as error:
            raise _refusal(str(error), option) from None
        if self._start.is_error():
            raise _refusal(self._start.get_error(), option)

    def matcher(self, vocab_size: int) -> Matcher:
        return Matcher(self._start.deep_copy(), vocab_size, self._option)


_engines: weakref.WeakKeyDictionary[Tokenizer, dict[object, Engine]] = weakref.WeakKeyDictionary()


def find_engine(tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> Engine:
    """The engine for a tokenizer, made when it is first asked for.

    Args:
        tokenizer: whose ids answers are made of.
        vocab_size: how many logits the model has.
        stop_ids: what may follow a complete answer.
    """
    engines = _engines.setdefault(tokenizer, {})
    key = vocab_size, stop_ids
    if key not in engines:
        engines[key] = Engine(tokenizer, vocab_size, stop_ids)
    return engines[key]


def _encode(tokenizer: weakref.ref[Tokenizer], text: bytes) -> list[int]:
    # Held weakly: engines live as long as their tokenizer.
    found = tokenizer()
    assert found is not None
    return found.encode(text.decode("utf-8", "surrogateescape"))


def _vocabulary(
    tokens: list[bytes],
    special: Iterable[int],
    stops: list[int],
    encode: Callable[[bytes], list[int]],
) -> LLTokenizer:
    """A vocabulary as the engine takes it: `special` ids are no text, `stops` end an answer."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Vocabulary:
        def __init__(self) -> None:
            self.tokens = tokens
            self.special_token_ids = list(special)
            self.bos_token_id = None
            self.eos_token_id = stops[0]

        def __call__(self, text: bytes) -> list[int]:
            """How the model is used to read text that the grammar forces."""
            return encode(text)

    return LLTokenizer(TokenizerWrapper(cast(Any, Vocabulary())), eos_token=cast(Any, stops))


def _refusal(reason: str, option: str) -> UsageError:
    first = (reason.strip() or "unknown reason").splitlines()[0][:300]
    return UsageError(f"{option}: cannot be enforced ({first})")
