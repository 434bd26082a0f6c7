"""What a model's answer is made of, as it comes: text, thoughts and tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from apertus_mlx.errors import RejectedError
from apertus_mlx.text.json_ends import require_object

PieceKind = Literal["text", "thought", "call"]


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A part of one tool call.

    The first piece of a call has its `id` and `name` and no arguments; those that follow have the
    next part of the arguments alone.

    Attributes:
        index: which call of the answer, counted from 0; calls come one after another.
        id: what a result refers to, unique for ever; only in the first piece.
        name: of the tool, as the model wrote it; only in the first piece.
        arguments: JSON text, exactly as the model wrote it.
        withdrawn: what came of this call is no call, and is no part of the answer: the model went
            on with something malformed. All of it follows as text. Its arguments never parse.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    withdrawn: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that has become certain, of the answer or of the deliberation, or a part of a tool call.

    Attributes:
        text: of the answer or the deliberation; empty for a part of a call.
        is_thought: whether the text belongs to the deliberation.
        call: the part of a call, or None.
    """

    text: str
    is_thought: bool = False
    call: CallPiece | None = None

    @property
    def kind(self) -> PieceKind:
        """Which of the three this is."""
        if self.call is not None:
            return "call"
        return "thought" if self.is_thought else "text"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the model asks for.

    Attributes:
        id: what a result refers to.
        name: of the tool, as the model wrote it.
        arguments: a JSON object as the model wrote it; cut where the answer was cut.
    """

    id: str
    name: str
    arguments: str

    def as_message(self) -> dict[str, object]:
        """The call as an assistant's message of OpenAI's API has it.

        Arguments that an output filter has broken are left out: no prompt can be made of them.
        """
        arguments = self.arguments
        try:
            require_object(arguments)
        except (RejectedError, ValueError):
            arguments = "{}"
        function = {"name": self.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}
