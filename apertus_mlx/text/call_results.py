"""Results of tool calls, put into the order of the calls; the chat format has no ids for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from apertus_mlx.text.given import Given

# After thoughts this call hands over the final answer; no result follows it.
FINAL_CALL = "display_answers"


def needs_results(functions: Sequence[Mapping[str, str]]) -> bool:
    """Whether results follow these calls of one message, each of which has a `name`."""
    return any(each["name"] != FINAL_CALL for each in functions)


class CallResults:
    """The results of one message's calls, which may come in any order."""

    def __init__(
        self, message: Given, functions: Sequence[Mapping[str, str]], calls: Sequence[Given]
    ) -> None:
        self._where = message.place
        self._functions = functions
        self._ids: list[Given] = [call["id"] for call in calls]
        self._named = any(each.value is not None for each in self._ids)
        self._found: dict[int, tuple[str, str]] = {}  # of a call: its result and the place
        self._index: dict[str, int] = {}
        for index, each in enumerate(self._ids if self._named else ()):
            if each.value is None:
                each.refuse("is missing; either all calls of a message have one or none has")
            if each.text() in self._index:
                each.refuse(f"{each.value[:64]!r} is also the id of an earlier call")
            self._index[each.value] = index

    def add(self, message: Given, text: str) -> None:
        """Take the result `text` that `message` has."""
        given = message["tool_call_id"]
        if self._named:
            index = self._find(given)
        elif given.value is not None:
            given.refuse(f"the calls of {self._where} have no ids")
        else:
            index = len(self._found)
            if index == len(self._functions):
                message["role"].refuse(f"there are only {index} calls in {self._where}")
        self._found[index] = text, message.place

    def _find(self, given: Given) -> int:
        if given.value is None:
            given.refuse(f"is missing; it says which call of {self._where} this answers")
        wanted = given.text()
        found = self._index.get(wanted)
        if found is None:
            given.refuse(f"{wanted[:64]!r} is the id of no call of {self._where}")
        if found in self._found:
            given.refuse(f"{wanted[:64]!r} has its result already, {self._found[found][1]}")
        return found

    def texts(self, at_end: bool = False) -> list[str]:
        """Return the results in the order of their calls.

        Calls with which a conversation ends need none yet.
        """
        if self._found or (needs_results(self._functions) and not at_end):
            for index in range(len(self._functions)):
                if index not in self._found:
                    self._miss(index)
        return [self._found[index][0] for index in sorted(self._found)]

    def _miss(self, index: int) -> None:
        if self._named:
            each = self._ids[index]
            each.refuse(f"{each.value[:64]!r} has no result; it needs a message of role 'tool'")
        place = f"{self._where}.tool_calls[{index}]"
        Given(None, place).refuse("has no result; it needs a message of role 'tool'")
