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

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig, read_config
from apertus_mlx.convert.evaluation.layerwise import (
    SourceWeights,
    Weights,
    head_path,
    hidden_states,
    logit_blocks,
    open_weights,
    to_bfloat16,
)
from apertus_mlx.convert.evaluation.products import quickest
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

# Told tokens that are done, and how many there are.
OnTokens = Callable[[int, int], None]


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
        reference: likewise.
        texts: what to predict.
        tokens_per_language: most tokens of each language.
        progress: told runs through layers that are done, and how many there are; see
            `comparing_runs`.
        folder: where an interrupted measurement of the same models and texts goes on from; None
            keeps nothing.

    Raises:
        UsageError: see `Measurement.of`.
        RejectedError: a checkpoint is damaged or not supported.
    """
    measurement = Measurement.of(directories, reference, texts, tokens_per_language)
    return measurement.run(progress, folder)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Models that can be compared with a reference, and the windows to do it on.

    Attributes:
        directories: of the models.
        reference: of the model that they are compared with.
        texts: where the windows come from.
        labels: the language of each set of windows.
        windows: sets of token ids `[windows, length]`.
        matching: where the models have a part of the reference's vocabulary; else None.
        readings: then the windows in both vocabularies, else None for each.
        configs: of the reference and of the models.
    """

    directories: Sequence[Path]
    reference: Path
    texts: TextSet
    labels: Sequence[str]
    windows: list[Tokens]
    matching: Matching | None
    readings: Sequence[Reading | None]
    configs: Sequence[ModelConfig]

    @classmethod
    def of(
        cls,
        directories: Sequence[Path],
        reference: Path,
        texts: TextSet,
        tokens_per_language: int = TOKENS_PER_LANGUAGE,
    ) -> Measurement:
        """Cut the windows, and refuse what cannot be compared. No weight is read.

        The reference's tokenizer and chat template are used, unless the models have a part of its
        vocabulary, all the same: then theirs. The reference reads its own tokens, and they are
        compared where both have a border (`Matching`).

        Raises:
            UsageError: the models have different vocabularies, tokenizers or heads; the texts are
                too short.
            RejectedError: a config, a tokenizer or a template is damaged or not supported.
        """
        tokenizer, template = open_text(reference)
        expected = read_config(reference)
        matching, outputs = None, expected.output_vocab_size
        if directories:
            part, own_template = open_text(directories[0])
            kept = None if same_tokens(tokenizer, part) else kept_ids(tokenizer, part)
            if kept is not None:
                matching = match(reference, directories[0])
                tokenizer, template = part, own_template
                outputs = int((kept < outputs).sum())
        configs = [expected]
        for directory in directories:
            if not same_tokens(tokenizer, open_text(directory)[0]):
                raise UsageError(
                    f"{directory}: its tokenizer is not that of {reference}; only models of one "
                    "vocabulary are measured at a time"
                )
            config = read_config(directory)
            if config.vocab_size != tokenizer.vocab_size:
                raise UsageError(
                    f"{directory}: {config.vocab_size} tokens in the vocabulary, {reference} has "
                    f"{tokenizer.vocab_size}"
                )
            if config.output_vocab_size != outputs:
                raise UsageError(
                    f"{directory}: its head gives {config.output_vocab_size} logits, that of "
                    f"{reference} {outputs} for the same tokens; they cannot be compared"
                )
            configs.append(config)
        found = language_windows(texts, tokenizer, template, WINDOW_TOKENS, tokens_per_language)
        labels, windows, readings = [], [], []
        for label, groups in found.items():
            for group in groups:
                reading = None if matching is None else matching.read(group)
                if reading is None or len(reading.borders[0]):
                    labels.append(label)
                    windows.append(group)
                    readings.append(reading)
        if not labels:
            raise UsageError(f"{texts.name}: too little text to judge with")
        return cls(directories, reference, texts, labels, windows, matching, readings, configs)

    @property
    def runs(self) -> list[int]:
        """What progress counts, in order: a model's layers, then its comparison.

        The reference comes first, without rounding and with it, then the models.
        """
        expected, *models = self.configs
        runs = [expected.num_hidden_layers] * 2 + [comparing_runs(expected, expected)]
        for found in models:
            runs += [found.num_hidden_layers, comparing_runs(expected, found)]
        return runs

    def run(
        self, progress: Callable[[int, int], None] | None = None, folder: Path | None = None
    ) -> list[Evaluation]:
        """An evaluation for each model; see `measure_all`.

        Raises:
            RejectedError: a checkpoint is damaged or not supported.
        """
        windows, readings, matching = self.windows, self.readings, self.matching
        own_windows = [w if r is None else r.whole for w, r in zip(windows, readings, strict=True)]
        runs, report = self.runs, progress or (lambda done, total: None)

        def done(number: int) -> Callable[[int], None]:
            """What a part of `runs` tells when so much of it is done."""
            before = sum(runs[:number])
            return lambda done: report(before + done, sum(runs))

        def kept(name: str) -> Keep:
            return Keep(folder / f"{name}.npz" if folder is not None else None)

        with ExitStack() as stack:

            def opened(directory: Path) -> SourceWeights:
                return open_weights(directory, stack.enter_context(Reader(directory)))

            expected = opened(self.reference)
            # Open all before measuring the first: a wrong name must not cost an hour.
            models = [opened(directory) for directory in self.directories]
            hidden = hidden_states(expected, own_windows, None, done(0), kept("expected"))

            def divergences(
                found: Weights, states: list[Float32], number: int
            ) -> dict[str | None, Divergence]:
                """Of each language, and of all languages under None."""
                tell = done(number)

                def compared(tokens: int, total: int) -> None:
                    tell(runs[number] * tokens // total)

                if matching is None:
                    errors = token_errors(expected, hidden, found, states, windows, compared)
                else:
                    errors = _matched_errors(
                        matching, readings, expected, hidden, found, states, compared
                    )
                by_label: dict[str | None, Divergence] = {
                    label: summarise(
                        join(
                            [e for e, own in zip(errors, self.labels, strict=True) if own == label]
                        )
                    )
                    for label in dict.fromkeys(self.labels)
                }
                return {**by_label, None: summarise(join(errors))}

            rounded = hidden_states(expected, own_windows, to_bfloat16, done(1), kept("rounded"))
            floors = divergences(expected, rounded, 2)
            del rounded
            evaluations = []
            for number, found in enumerate(models):
                first, keep = 3 + 2 * number, kept(f"model-{number}")
                states = hidden_states(found, windows, None, done(first), keep)
                own = divergences(found, states, first + 1)
                del states
                both = {label: (own[label], floors[label]) for label in dict.fromkeys(self.labels)}
                evaluations.append(
                    Evaluation(
                        own[None], floors[None], both, self.texts.name, self.texts.sha256,
                        _weight_bytes(found.source),
                    )
                )  # fmt: skip
        return evaluations


def comparing_runs(expected: ModelConfig, found: ModelConfig) -> int:
    """How many runs through a layer it counts as to compute and compare two models' logits.

    As many as there are layers with the weights of both heads, at least one.
    """
    first, count = layout.layer(0), 0
    for matrix in layout.matrices(found):
        if matrix.path.startswith(f"{first}."):
            count += matrix.rows * matrix.columns
    heads = sum(config.output_vocab_size * config.hidden_size for config in (expected, found))
    return max(1, round(heads / count))


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
    progress: OnTokens | None = None,
) -> list[TokenErrors]:
    """Compare the logits of two models' hidden states for each set of windows, block by block.

    `progress` is told tokens that are compared, and how many there are.

    Raises:
        RejectedError: a logit is not finite.
    """
    rows = [[each.reshape(-1, each.shape[-1]) for each in hidden] for hidden in
            (expected_hidden, found_hidden)]  # fmt: skip
    following = [_following(ids).reshape(-1) for ids in windows]
    return _errors((expected, found), rows, following, progress)


def _matched_errors(
    matching: Matching,
    readings: Sequence[Reading | None],
    expected: Weights,
    expected_hidden: list[Float32],
    found: Weights,
    found_hidden: list[Float32],
    progress: OnTokens,
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
    return _errors((expected, found), rows, following, progress, bring)


def _following(ids: Tokens) -> Tokens:
    """The token after each, -1 after the last of a window."""
    return np.concatenate([ids[:, 1:], np.full((len(ids), 1), -1, np.int64)], 1)


def _errors(
    models: tuple[Weights, Weights],
    rows: Sequence[Sequence[Float32]],
    following: Sequence[Tokens],
    progress: OnTokens | None,
    bring: Sequence[Callable[[Float32], Float32] | None] = (None, None),
) -> list[TokenErrors]:
    """Compare the logits of rows `[tokens, hidden]` of both, each brought to the same tokens."""
    heads = [quickest(weights.matrix(head_path(weights.config))) for weights in models]
    most, done, total = max(map(len, heads)), 0, sum(map(len, following))
    result = []
    for wanted, got, after in zip(*rows, following, strict=True):
        parts = []
        for part in logit_blocks(len(after), most):
            logits = [
                np.asarray(quickest(row[part]) @ head.T)
                for row, head in zip((wanted, got), heads, strict=True)
            ]
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
            done += len(after[part])
            if progress is not None:
                progress(done, total)
        result.append(join(parts))
    return result
