"""What ranks agree on, so that all of them compute one and the same answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version

import mlx.core as mx

from apertus_mlx import __version__
from apertus_mlx.backend.ranks import Ranks
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.system.model_files import MAX_TOKENIZER_BYTES, exists, read_file

# Files that decide what is computed, beside the weights.
_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "chat_template.json", "apertus_mlx_manifest.json",
)  # fmt: skip


class Agreement:
    """What all ranks do alike during one answer: its tokens, and whether to stop.

    Each token is drawn by rank 0. With it goes a word of every rank that wants to stop, so that all
    of them do behind the same token.

    Args:
        ranks: all of them.
        vocabulary: how many token ids there are.
        wants_stop: whether this rank wants to.
    """

    def __init__(
        self, ranks: Ranks, vocabulary: int, wants_stop: Callable[[], bool] | None = None
    ) -> None:
        self._ranks, self._wants_stop = ranks, wants_stop or (lambda: False)
        self._most = vocabulary - 1
        self._words: list[mx.array] = []
        self._drawn = self._stopped = False

    def token(self, drawn: mx.array) -> mx.array:
        """Rank 0's token, of what this rank has drawn (shape `[]`)."""
        # On every rank it hangs on what was drawn, so that all exchange everything in one order.
        own = drawn.astype(mx.uint32) * int(self._ranks.rank == 0)
        stop = mx.array(int(self._wants_stop()), mx.uint32)
        both = self._ranks.sum(mx.stack([own, stop]))
        self._words.append(both[1])
        self._drawn = True
        # Where a connection is lost, MLX computes on with whatever memory held, and would crash
        # where an id of that kind is looked up.
        return mx.minimum(both[0], self._most)

    def stopped(self) -> bool:
        """Whether some rank wants to stop; to be asked where all ranks ask.

        While a prompt is read this is an exchange of its own. Later it is what came with the tokens
        but the latest, which may still be on its way.
        """
        if not self._drawn:
            self._stopped = self._stopped or self._ranks.any(self._wants_stop())
            return self._stopped
        come, self._words = self._words[:-1], self._words[-1:]
        self._stopped = self._stopped or any(word.item() for word in come)
        return self._stopped


def require_same_model(ranks: Ranks, inventory: Inventory) -> None:
    """Refuse to compute with other programs or another model on one of the ranks.

    Raises:
        UsageError: it names the rank and what it has another one of.
    """
    versions = {"apertus-mlx": __version__, "mlx": version("mlx")}
    ranks.require_alike({f"version of {name}": each.encode() for name, each in versions.items()})
    ranks.require_alike(dict(_facts(inventory)))


def _facts(inventory: Inventory) -> Iterator[tuple[str, bytes]]:
    folder = inventory.checkpoint.directory
    for name in _FILES:
        path = folder / name
        yield name, read_file(path, MAX_TOKENIZER_BYTES) if exists(path) else b""
    tensors = sorted(inventory.checkpoint.tensors.items())
    yield "list of tensors", repr(tensors).encode()
