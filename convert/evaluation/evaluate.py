"""The evaluation of a quantization: how far a model's predictions are from its reference's.

Both are computed in float32 from the weights as stored, layer by layer, on the same tokens. The
noise floor is what the reference shows against itself when every product with a weight and the
residual stream are rounded to bfloat16: differences below it mean nothing.

Several models are compared one after the other with the final hidden states of the reference, which
are computed once. Memory holds one layer at a time, two heads and two sets of states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.convert.evaluation.layerwise import (
    SourceWeights,
    Weights,
    head_path,
    hidden_states,
    logit_blocks,
    open_weights,
    to_bfloat16,
)
from apertus_mlx.convert.evaluation.texts import (
    TextSet,
    Tokens,
    language_windows,
    open_text,
    same_tokens,
)
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.sources.source import Source
from apertus_mlx.convert.vocabulary.matching import Matching, Reading, kept_ids, match
from apertus_mlx.convert.write.keep import Keep
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.quant.arrays import Float32, blocks
from apertus_mlx.quant.metrics import Divergence, TokenErrors, compare, join, summarise

WINDOW_TOKENS = 512
TOKENS_PER_LANGUAGE = 2048
# More than any text has.
ALL_TOKENS = 2**24
# Logits that are compared at once: of more the memory is asked of the system again each time, which
# took three times as long as the work. Rows of 131,072 take a fifth less one by one than by four.
COMPARED_LOGITS = 1 << 17
FLOOR = "the reference with products and residual stream rounded to bfloat16"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Divergence over all texts and for each language, with its noise floor."""

    overall: Divergence
    overall_floor: Divergence
    languages: Mapping[str, tuple[Divergence, Divergence]]
    text_name: str
    text_sha256: str
    # What the tensors of the model take that its predictions depend on.
    weight_bytes: int

    def as_json(self) -> dict[str, Any]:
        """For manifests and `--json`; divergences in nats."""
        return {
            "text": {"name": self.text_name, "sha256": self.text_sha256},
            "overall": asdict(self.overall),
            "noise_floor": {"what": FLOOR, **asdict(self.overall_floor)},
            "languages": {
                language: {**asdict(divergence), "noise_floor_kl_mean": floor.kl_mean}
                for language, (divergence, floor) in self.languages.items()
            },
        }


def measure(
    directory: Path,
    reference: Path,
    texts: TextSet,
    tokens_per_language: int = TOKENS_PER_LANGUAGE,
    progress: Callable[[int, int], None] | None = None,
    folder: Path | None = None,
) -> Evaluation:
    """Compare the model in `directory` with the one in `reference`; see `measure_all`."""
    return measure_all([directory], reference, texts, tokens_per_language, progress, folder)[0]


def measure_all(
    directories: Sequence[Path],
    reference: Path,
    texts: TextSet,
    tokens_per_language: int = TOKENS_PER_LANGUAGE,
    progress: Callable[[int, int], None] | None = None,
    folder: Path | None = None,
) -> list[Evaluation]:
    """Compare the models in `directories` with the one in `reference` on `texts`.

    Args:
        directories: models in any form that `convert` reads.
        reference: likewise; its tokenizer and chat template are used, unless the models have a
            part of its vocabulary, all the same: then theirs. The reference reads its own tokens,
            and they are compared where both have a border (`Matching`).
        texts: what to predict.
        tokens_per_language: most tokens of each language.
        progress: told runs through layers that are done, and how many there are.
        folder: where an interrupted measurement of the same models and texts goes on from; None
            keeps nothing.

    Raises:
        UsageError: the models have different vocabularies or tokenizers; the texts are too short.
        RejectedError: a checkpoint is damaged or not supported.
    """
    tokenizer, template = open_text(reference)
    matching = None
    if directories:
        part, own_template = open_text(directories[0])
        if not same_tokens(tokenizer, part) and kept_ids(tokenizer, part) is not None:
            matching = match(reference, directories[0])
            tokenizer, template = part, own_template
    for directory in directories:
        if not same_tokens(tokenizer, open_text(directory)[0]):
            raise UsageError(
                f"{directory}: its tokenizer is not that of {reference}; only models of one "
                "vocabulary are measured at a time"
            )
    by_language = language_windows(texts, tokenizer, template, WINDOW_TOKENS, tokens_per_language)
    labels, windows, readings = [], [], []
    for label, groups in by_language.items():
        for group in groups:
            reading = None if matching is None else matching.read(group)
            if reading is None or len(reading.borders[0]):
                labels.append(label)
                windows.append(group)
                readings.append(reading)
    if not labels:
        raise UsageError(f"{texts.name}: too little text to judge with")
    own_windows = [w if r is None else r.whole for w, r in zip(windows, readings, strict=True)]
    with ExitStack() as stack:

        def opened(directory: Path) -> SourceWeights:
            return open_weights(directory, stack.enter_context(Reader(directory)))

        expected = opened(reference)
        # Open all before measuring the first: a wrong name must not cost an hour.
        models = [opened(directory) for directory in directories]
        for directory, found in zip(directories, models, strict=True):
            if found.config.vocab_size != tokenizer.vocab_size:
                raise UsageError(
                    f"{directory}: {found.config.vocab_size} tokens in the vocabulary, {reference} "
                    f"has {tokenizer.vocab_size}"
                )
        layers = [weights.config.num_hidden_layers for weights in (expected, expected, *models)]
        report = progress or (lambda done, total: None)

        def done(number: int) -> Callable[[int], None]:
            """What the measurement with that number tells its layers."""
            before = sum(layers[:number])
            return lambda done: report(before + done, sum(layers))

        def kept(name: str) -> Keep:
            return Keep(folder / f"{name}.npz" if folder is not None else None)

        hidden = hidden_states(expected, own_windows, None, done(0), kept("expected"))

        def divergences(found: Weights, states: list[Float32]) -> dict[str | None, Divergence]:
            """Of each language, and of all languages under None."""
            if matching is None:
                errors = token_errors(expected, hidden, found, states, windows)
            else:
                errors = _matched_errors(matching, readings, expected, hidden, found, states)
            by_label: dict[str | None, Divergence] = {
                label: summarise(
                    join([e for e, own in zip(errors, labels, strict=True) if own == label])
                )
                for label in dict.fromkeys(labels)
            }
            return {**by_label, None: summarise(join(errors))}

        rounded = hidden_states(expected, own_windows, to_bfloat16, done(1), kept("rounded"))
        floors = divergences(expected, rounded)
        del rounded
        evaluations = []
        for number, found in enumerate(models):
            keep = kept(f"model-{number}")
            states = hidden_states(found, windows, None, done(number + 2), keep)
            own = divergences(found, states)
            del states
            languages = {label: (own[label], floors[label]) for label in dict.fromkeys(labels)}
            evaluations.append(
                Evaluation(
                    own[None], floors[None], languages, texts.name, texts.sha256,
                    _weight_bytes(found.source),
                )
            )  # fmt: skip
    return evaluations


def kept_bytes(config: ModelConfig, texts: TextSet) -> int:
    """Most that `measure` keeps: three sets of streams, and the one that replaces another."""
    languages = len({document.language for document in texts.documents})
    return 4 * 4 * languages * TOKENS_PER_LANGUAGE * config.hidden_size


def _weight_bytes(source: Source) -> int:
    tensors = [tensor for matrix in source.matrices.values() for tensor in matrix.tensors]
    tensors += [tensor for tensor in source.vectors.values() if tensor is not None]
    return sum({tensor.name: tensor.size_bytes for tensor in tensors}.values())


def token_errors(
    expected: Weights,
    expected_hidden: list[Float32],
    found: Weights,
    found_hidden: list[Float32],
    windows: list[Tokens],
) -> list[TokenErrors]:
    """Compare the logits of two models' hidden states for each set of windows, block by block.

    Raises:
        RejectedError: a logit is not finite.
    """
    rows = [[each.reshape(-1, each.shape[-1]) for each in hidden] for hidden in
            (expected_hidden, found_hidden)]  # fmt: skip
    return _errors((expected, found), rows, [_following(ids).reshape(-1) for ids in windows])


def _matched_errors(
    matching: Matching,
    readings: Sequence[Reading | None],
    expected: Weights,
    expected_hidden: list[Float32],
    found: Weights,
    found_hidden: list[Float32],
) -> list[TokenErrors]:
    """The same where both vocabularies have a border; `found` may have either of them."""
    rows: list[list[Float32]] = [[], []]
    following = []
    is_part = found is not expected
    for reading, wanted, got in zip(readings, expected_hidden, found_hidden, strict=True):
        assert reading is not None
        windows, tokens = reading.borders
        places = reading.places[windows, tokens]
        rows[0].append(wanted[windows, places])
        rows[1].append(got[windows, tokens if is_part else places])
        following.append(_following(reading.part)[windows, tokens])
    bring = (matching.logits, None if is_part else matching.logits)
    return _errors((expected, found), rows, following, bring)


def _following(ids: Tokens) -> Tokens:
    """The token after each, -1 after the last of a window."""
    return np.concatenate([ids[:, 1:], np.full((len(ids), 1), -1, np.int64)], 1)


def _errors(
    models: tuple[Weights, Weights],
    rows: Sequence[Sequence[Float32]],
    following: Sequence[Tokens],
    bring: Sequence[Callable[[Float32], Float32] | None] = (None, None),
) -> list[TokenErrors]:
    """Compare the logits of rows `[tokens, hidden]` of both, each brought to the same tokens."""
    heads = [weights.matrix(head_path(weights.config)) for weights in models]
    most = max(map(len, heads))
    result = []
    for wanted, got, after in zip(*rows, following, strict=True):
        parts = []
        for part in logit_blocks(len(after), most):
            logits = [row[part] @ head.T for row, head in zip((wanted, got), heads, strict=True)]
            for weights, values in zip(models, logits, strict=True):
                if not np.isfinite(values).all():
                    name = f"{weights.source.name}: " if isinstance(weights, SourceWeights) else ""
                    raise RejectedError(
                        f"{name}computes logits that are not finite; its weights are damaged or "
                        "overflow"
                    )
            found = [v if to is None else to(v) for v, to in zip(logits, bring, strict=True)]
            for few in blocks(len(found[0]), COMPARED_LOGITS // found[0].shape[1]):
                parts.append(compare(found[0][few], found[1][few], after[part][few]))
        result.append(join(parts))
    return result
