"""How tasks are put to a model: the options of `eval --tasks`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypedDict

from apertus_mlx.errors import UsageError
from apertus_mlx.system.arguments import Option, Range, check_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """How tasks are put to a model.

    Raises:
        TypeError: a value of a wrong type.
        UsageError: a value outside its range, or what only a chat template can say without one.
    """

    chat: Annotated[
        bool, Option("With --tasks: ask through the chat template, examples as turns.")
    ] = False
    think: Annotated[
        bool, Option("With --chat: let the model deliberate; thoughts are not scored.")
    ] = False
    system: Annotated[str | None, Option("With --chat: system message.", flags="-s")] = None
    few_shot: Annotated[
        int | None, Option("Examples before each question; default: the task's.", Range(0, 1000))
    ] = None
    limit: Annotated[int | None, Option("Most questions of each task.", Range(1, 2**31))] = None
    batch_size: Annotated[int, Option("Sequences computed together.", Range(1, 1024))] = 8
    context: Annotated[
        int | None,
        Option(
            "Most tokens of a question and its answer; default: 8192 or the model's.",
            Range(2, 2**31),
        ),
    ] = None
    max_thought_tokens: Annotated[
        int, Option("Most tokens of a deliberation; then it ends.", Range(0, 2**31 - 1))
    ] = 4096

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.think or self.system is not None) and not self.chat:
            raise UsageError("--think and --system: give --chat, too; without it a task is text")


class TaskKeywords(TypedDict, total=False):
    """The fields of `TaskOptions` as keyword arguments, for type checkers."""

    chat: bool
    think: bool
    system: str | None
    few_shot: int | None
    limit: int | None
    batch_size: int
    context: int | None
    max_thought_tokens: int
