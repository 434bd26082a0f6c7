"""Models with the whole vocabulary of a reference and with parts of it, beside that reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from apertus_mlx.convert.evaluation.evaluate import Evaluation, Measurement
from apertus_mlx.convert.evaluation.layerwise import open_weights
from apertus_mlx.convert.evaluation.texts import TextSet, open_tokenizer, same_tokens
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.vocabulary.matching import kept_ids
from apertus_mlx.errors import UsageError
from apertus_mlx.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Sharing:
    """Models that share a vocabulary, by their numbers."""

    tokenizer: Tokenizer
    numbers: list[int] = field(default_factory=list)


def by_vocabulary(directories: Sequence[Path], reference: Path) -> list[Sharing]:
    """The models of each vocabulary.

    Raises:
        UsageError: a vocabulary is neither that of the reference nor a part of it.
    """
    whole = open_tokenizer(reference)
    found: list[Sharing] = []
    for number, directory in enumerate(directories):
        own = open_tokenizer(directory)
        shared = next((each for each in found if same_tokens(each.tokenizer, own)), None)
        if shared is None:
            if not same_tokens(whole, own) and kept_ids(whole, own) is None:
                reason = (
                    f"has more tokens than {reference}; give the whole model as reference"
                    if kept_ids(own, whole) is not None
                    else f"its tokenizer is neither that of {reference} nor a part of it, so that "
                    "their predictions cannot be compared"
                )
                raise UsageError(f"{directory}: {reason}")
            shared = Sharing(own)
            found.append(shared)
        shared.numbers.append(number)
    return found


def measure_side_by_side(
    directories: Sequence[Path],
    reference: Path,
    texts: TextSet,
    tokens_per_language: int,
    progress: Callable[[int, int], None],
) -> list[Evaluation]:
    """`measure_all`, once for the models of each vocabulary; the figures are in their own tokens.

    All that is refused is refused before the first is measured.

    Raises:
        UsageError: see `by_vocabulary` and `Measurement.of`.
        RejectedError: a checkpoint is damaged or not supported.
    """
    groups = by_vocabulary(directories, reference)
    # What cannot be measured must not cost the time of those before it.
    measurements = [
        Measurement.of(
            [directories[number] for number in group.numbers], reference, texts,
            tokens_per_language,
        )
        for group in groups
    ]  # fmt: skip
    for directory in directories:
        with ExitStack() as stack:
            open_weights(directory, stack.enter_context(Reader(directory)))
    total = sum(sum(measurement.runs) for measurement in measurements)
    found: dict[int, Evaluation] = {}
    before = 0
    for group, measurement in zip(groups, measurements, strict=True):

        def told(done: int, _: int, before: int = before) -> None:
            progress(before + done, total)

        found |= dict(zip(group.numbers, measurement.run(told), strict=True))
        before += sum(measurement.runs)
    return [found[number] for number in range(len(directories))]
