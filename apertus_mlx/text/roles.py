"""The ids of the control tokens, by what they enclose; nothing else knows these numbers.

They are those of Apertus v1, v1.1 and 1.5. The names of the tokens differ, the ids do not: id 61
is `<|system_start|>` in v1 and `<SPECIAL_61>` in v1.1.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apertus_mlx.errors import RejectedError


class Role(enum.Enum):
    """A part of a conversation that two control tokens enclose; the value is the first id."""

    SYSTEM = 61
    DEVELOPER = 63
    USER = 65
    ASSISTANT = 67
    INNER = 69
    TOOLS = 71

    @property
    def start(self) -> int:
        """The id that opens it."""
        return self.value

    @property
    def end(self) -> int:
        """The id that closes it."""
        return self.value + 1


CONTROL_IDS = range(Role.SYSTEM.start, Role.TOOLS.end + 1)

_OTHERS_IDS = range(Role.SYSTEM.start, Role.ASSISTANT.start)
# v1.5 writes thoughts and results between ids that v1 has no use for.
_SECOND_INNER = (32, 33)
_INNER_NAMES = (("<think>", "</think>"), ("<|inner_prefix|>", "<|inner_suffix|>"))
_RESULTS = (73, 74)
_RESULT_NAMES = ("<|tool_output_start|>", "<|tool_output_end|>")
# Where a vocabulary has these names, they have to stand at these ids.
_NAMES = {
    f"<|{role.name.lower()}_{side}|>": token_id
    for role in Role
    for side, token_id in zip(
        ("prefix", "suffix") if role in (Role.INNER, Role.TOOLS) else ("start", "end"),
        (role.start, role.end),
        strict=True,
    )
}


@dataclass(frozen=True, slots=True)
class Roles:
    """What the control tokens of one vocabulary mean in an answer.

    Attributes:
        thought_starts: ids that open a deliberation.
        thought_ends: ids that close it.
        results: the ids around the result of a tool, in v1.5; None where there are none.
    """

    thought_starts: frozenset[int] = frozenset({Role.INNER.start})
    thought_ends: frozenset[int] = frozenset({Role.INNER.end})
    results: tuple[int, int] | None = None

    def leaves_thought_open(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends within a deliberation, with which the answer goes on.

        The end and the start of the assistant that a template writes after the results of calls do
        not close one: with the answer, the template writes the id that does before its text.
        """
        for token_id in reversed(prompt):
            if token_id in self.thought_starts:
                return True
            if token_id in self.thought_ends or token_id in _OTHERS_IDS:
                return False
        return False


def find_roles(special: Mapping[int, str], path: str) -> Roles:
    """Return what the special tokens of a vocabulary mean; `special` has their names by id.

    Raises:
        RejectedError: the control tokens are not where those of Apertus v1, v1.1 and 1.5 are.
    """
    for token_id in CONTROL_IDS:
        if token_id not in special:
            raise RejectedError(
                f"{path}: id {token_id} is not a special token; ids 61 to 72 are the control "
                "tokens of Apertus v1, v1.1 and 1.5 (Apertus 2 moves them and is not supported)"
            )
    second = tuple(special.get(token_id) for token_id in _SECOND_INNER)
    has_second = second in _INNER_NAMES
    for token_id, name in special.items():
        wanted = _NAMES.get(name, token_id)
        if token_id != wanted and not (has_second and token_id in _SECOND_INNER):
            raise RejectedError(
                f"{path}: {name} has id {token_id}; in Apertus v1, v1.1 and 1.5 it has {wanted} "
                "(Apertus 2 moves the control tokens and is not supported)"
            )
    inner = [(Role.INNER.start, Role.INNER.end), *([_SECOND_INNER] if has_second else [])]
    results = tuple(special.get(token_id) for token_id in _RESULTS) == _RESULT_NAMES
    return Roles(
        thought_starts=frozenset(start for start, _ in inner),
        thought_ends=frozenset(end for _, end in inner),
        results=_RESULTS if results else None,
    )
