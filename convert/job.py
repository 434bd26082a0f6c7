"""One conversion from a folder to a folder: recognise, plan, execute, describe, publish."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import CONFIG_FILE, read_config
from apertus_mlx.checkpoint.slopes import check_slopes
from apertus_mlx.checkpoint.tensors import INDEX_FILE, open_checkpoint
from apertus_mlx.convert.calibration import calibrated
from apertus_mlx.convert.calibration.allocation import Allocation
from apertus_mlx.convert.calibration.before_plan import (
    allocate_once,
    measuring,
    space_for_plan,
    space_for_target,
)
from apertus_mlx.convert.calibration.calibrated import Calibration, make_codes, prepare_calibration
from apertus_mlx.convert.calibration.duration import minutes
from apertus_mlx.convert.calibration.held_out_comparison import HeldOutComparison
from apertus_mlx.convert.calibration.memory import require_memory
from apertus_mlx.convert.calibration.tuning import Tuning, tune, tuning_note, with_own_text
from apertus_mlx.convert.evaluation import receipt
from apertus_mlx.convert.evaluation.layerwise import SourceWeights
from apertus_mlx.convert.evaluation.little_text import choose
from apertus_mlx.convert.plan.grids import find_grids
from apertus_mlx.convert.plan.plan import Plan
from apertus_mlx.convert.plan.planning import make_plan
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.plan.shards import MAX_SHARD_BYTES
from apertus_mlx.convert.sources.reading import FileState, Reader, file_states
from apertus_mlx.convert.sources.recognise import recognise
from apertus_mlx.convert.transforms import names as transforms
from apertus_mlx.convert.vocabulary.choice import Cut, choose_tokens, open_cut
from apertus_mlx.convert.vocabulary.kept_rows import keep_rows
from apertus_mlx.convert.write.app_facts import app_facts
from apertus_mlx.convert.write.card import CARD, license_of, make_card
from apertus_mlx.convert.write.copied_files import (
    TOKENIZER,
    check_copied_files,
    copied_files,
    copy_files,
)
from apertus_mlx.convert.write.execute import execute
from apertus_mlx.convert.write.golden import check_template, write_golden
from apertus_mlx.convert.write.manifest import MANIFEST, make_manifest, sha256, write_json
from apertus_mlx.convert.write.output_config import output_config, quantization_block
from apertus_mlx.convert.write.target import build
from apertus_mlx.convert.write.tokenizer_table import write_tokenizer_table
from apertus_mlx.convert.write.workspace import Workspace, partial_path
from apertus_mlx.errors import ApertusError, RejectedError
from apertus_mlx.system.progress import OnLayers
from apertus_mlx.system.strict_json import read_object

# Of the files from which an interrupted run resumes; a run of another version starts again.
STATE_VERSION = 8
# Folders beside the output while it is built.
ALLOCATION, CHOICE, CALIBRATION, EVALUATION = "allocation", "choice", "calibration", "receipt"


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion that has been planned and not yet begun."""

    directory: Path
    # What the user called the source, and its commit if it came from the Hub.
    source_name: str
    commit: str | None
    original_config: Mapping[str, Any]
    plan: Plan
    # Source files as they were when the plan was made.
    files: Mapping[str, FileState]
    asks_for_code: tuple[str, ...]
    # Of everything that the output depends on.
    fingerprint: str
    # What to calibrate on, where the method needs it.
    calibration: Calibration | None = None
    # How the formats were chosen, where only a size was asked for.
    allocation: Allocation | None = None
    # Whether something had to be measured for the plan, where the output will lie.
    is_begun: bool = False
    # Where only some tokens are kept.
    cut: Cut | None = None

    @property
    def copied_bytes(self) -> int:
        """Size of the files that are copied, and of a tokenizer that is made anew."""
        files = copied_files(self.directory, self.cut is not None)
        made = 0 if self.cut is None else len(self.cut.tokenizer)
        return made + sum(path.stat().st_size for path in files)

    @property
    def output_bytes(self) -> int:
        """What the output folder will take on disk, nearly: weights, tokenizer, small files."""
        weights = sum(file.size_bytes for file in self.plan.files)
        return weights + self.copied_bytes + 2**20

    @property
    def kept_bytes(self) -> int:
        """Most that lies beside the output until it is done: codes, and what a run goes on from."""
        if self.calibration is None:
            return 0
        measured = receipt.kept_bytes(self.plan.source.config, self.calibration.judged)
        if not self.plan.calibrates:
            return measured
        windows = self.calibration.sample.windows
        tokens = windows.size
        if self.plan.request.tune:
            tuning = Tuning.on(self.plan.source.config, windows)
            tokens += tuning.own_tokens
            measured += tuning.disk_bytes
        return measured + calibrated.kept_bytes(self.plan, tokens)

    @property
    def needed_bytes(self) -> tuple[int, int]:
        """Disk for the output, and for what lies beside it until it is done."""
        return self.output_bytes, self.kept_bytes

    def minutes(self, target: Path) -> float | None:
        """About how long calibration and tuning for `target` take; see `duration.minutes`."""
        if self.calibration is None or not self.plan.calibrates:
            return None
        codes = partial_path(target) / CALIBRATION
        return minutes(self.plan, self.calibration.sample.windows, codes)


def prepare(
    directory: Path,
    request: Request,
    source_name: str,
    commit: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    calibration_texts: Sequence[Path] = (),
    progress: OnLayers | None = None,
    *,
    target: Path | None = None,
    resume: bool = False,
    inflation_texts: Sequence[Path] = (),
) -> Job:
    """Recognise the checkpoint in `directory` and plan its conversion.

    Where formats have to be found for a size, or there is little text to calibrate on, something is
    written: what is measured for the plan stays where `target` will be built, for `convert`.

    Args:
        directory: the checkpoint.
        request: what is asked for.
        source_name: what the user calls the source.
        commit: of a source from the Hub.
        max_shard_bytes: most bytes of a file of weights.
        calibration_texts: files and folders for the method gptq, for `smooth` and for a size;
            without any they take the project's own.
        progress: told of what has to be measured: `measuring`, `comparing sizes` and `comparing
            methods`.
        target: the output folder; may be left out where nothing has to be measured.
        resume: whether to go on with what an interrupted run to `target` has measured.
        inflation_texts: files and folders that show what a cut vocabulary costs; without any, the
            project's own.

    Raises:
        ApertusError: the checkpoint is damaged or not supported, or the request does not fit it.
    """
    config = read_config(directory)
    checkpoint = open_checkpoint(directory)
    source = recognise(config, checkpoint.tensors, checkpoint.name)
    check_slopes(checkpoint)
    check_copied_files(directory, config)
    template_note = check_template(directory, config)
    files = file_states(directory, [*checkpoint.files, CONFIG_FILE, TOKENIZER])
    if not all(checkpoint.same_bytes(head, embedding) for head, embedding in source.tied):
        if request.allow_untied_head:
            source = recognise(config, checkpoint.tensors, checkpoint.name, untied_head=True)
        if source.tied:
            raise RejectedError(
                f"{directory}: {layout.HEAD} differs from the embedding, but tie_word_embeddings "
                "is true; --allow-untied-head converts unquantized weights as a model with its own "
                "head"
            )
    with Reader(directory) as reader:
        source = source.settled(reader)
        size = files[TOKENIZER].size_bytes
        report = progress or (lambda stage, done, total: None)
        calibration = chosen = None
        identity = [repr(request), str(max_shard_bytes), repr(sorted(files.items()))]
        cut = None
        if request.cuts_vocabulary:
            cut = choose_tokens(directory, config, request, inflation_texts)
            identity.append(cut.sha256)
            source = keep_rows(source, cut.kept)
        text = None if cut is None else open_cut(directory, cut)
        if request.target is not None:
            require_memory(source, request)
            calibration = prepare_calibration(directory, calibration_texts, text)
            identity.append(calibration.digest())
            needed = space_for_target(source, request, calibration)
            with measuring(directory, target, _digest(identity), resume, ALLOCATION, needed) as to:
                chosen = allocate_once(source, request, directory, calibration, to, report)
            request = chosen.request
        plan = make_plan(source, request, max_shard_bytes, tokenizer_bytes=size)
        grids = find_grids(plan, reader)
        if grids:
            plan = make_plan(source, request, max_shard_bytes, grids, size)
        if plan.calibrates and calibration is None:
            require_memory(source, request)
            calibration = prepare_calibration(directory, calibration_texts, text)
        if chosen is None:
            identity += [plan.fingerprint(), calibration.digest() if calibration else ""]
        notes = [] if chosen is None else [chosen.note]
        if cut is not None:
            notes.append(cut.note)
        if template_note is not None:
            notes.append(template_note)
        is_begun = chosen is not None
        if plan.calibrates and calibration is not None:
            texts, planned = calibration, plan

            def make(other: Request) -> Plan:
                return make_plan(source, other, max_shard_bytes, grids, size)

            def judge(plans: Sequence[Plan]) -> list[float]:
                nonlocal is_begun
                begun, is_begun = resume or is_begun, True
                needed = space_for_plan(planned, texts)
                with measuring(directory, target, _digest(identity), begun, CHOICE, needed) as to:
                    weights = SourceWeights(source, reader)
                    tell = partial(report, "comparing methods")
                    return HeldOutComparison(weights, directory, texts, tell, to).divergences(plans)

            plan, note = choose(plan, make, calibration, judge)
            notes += [note] if note else []
        plan = replace(plan, notes=(*plan.notes, *notes))
    return Job(
        directory,
        source_name,
        commit,
        read_object(directory / CONFIG_FILE),
        plan,
        files,
        config.asks_for_code,
        _digest(identity),
        calibration,
        chosen,
        is_begun,
        cut,
    )


def convert(
    job: Job,
    target: Path,
    resume: bool = False,
    progress: Callable[[int], None] | None = None,
    layer_progress: OnLayers | None = None,
) -> Path:
    """Do what `job` plans; `target` appears complete or not at all.

    `progress` is told source bytes dealt with; `layer_progress` of the stages `writing` (of text),
    `calibrating` and `tuning` before that, and of `evaluating` after it.

    Raises:
        ApertusError: see `build`; also the source is damaged.
    """
    on_layers = layer_progress or (lambda stage, done, total: None)

    def make(workspace: Workspace) -> None:
        codes = tuned = None
        if job.calibration is not None and job.plan.calibrates:
            codes = workspace.kept_folder(CALIBRATION)
            texts, tunes = job.calibration, job.plan.request.tune
            if tunes:
                tell = partial(on_layers, "writing")
                texts = with_own_text(job.plan, job.directory, texts, codes, tell)
            make_codes(job.plan, job.directory, texts, codes, partial(on_layers, "calibrating"))
            if tunes:
                tell = partial(on_layers, "tuning")
                tuned = tune(job.plan, job.directory, job.calibration, codes, tell)
        execute(job.plan, job.directory, workspace, progress or (lambda _: None), codes)
        _write_other_files(job, target.name, workspace, tuned, partial(on_layers, "evaluating"))

    build(
        target, (job.fingerprint, job.plan.fingerprint()), {job.directory: job.files},
        job.needed_bytes, resume or job.is_begun, make,
    )  # fmt: skip
    return target


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([STATE_VERSION, *parts]).encode()).hexdigest()


def _write_other_files(
    job: Job,
    name: str,
    workspace: Workspace,
    tuned: Mapping[str, Any] | None,
    progress: Callable[[int, int], None],
) -> None:
    plan, path = job.plan, workspace.path
    if tuned is not None:
        plan = replace(plan, notes=(*plan.notes, tuning_note(tuned)))
    write_json(path / CONFIG_FILE, output_config(plan, job.original_config))
    write_json(path / INDEX_FILE, _index(plan))
    copy_files(job.directory, path, job.cut is not None)
    if job.cut is not None:
        (path / TOKENIZER).write_bytes(job.cut.tokenizer)
    for original in copied_files(job.directory, job.cut is not None):
        if sha256(original) != sha256(path / original.name):
            raise ApertusError(f"{original.name}: the copy differs from the original; start again")
    write_tokenizer_table(path)
    write_golden(path, plan.source.config)
    license_id = license_of(job.directory)
    quality = None
    if job.calibration is not None:
        quality = receipt.measure_receipt(
            path, job.directory, job.calibration.judged, progress,
            lambda name: workspace.kept_folder(f"{EVALUATION}-{name}"),
        )  # fmt: skip
    card = make_card(plan, name, job.source_name, job.commit, license_id, quality)
    (path / CARD).write_text(card, encoding="utf-8")
    origin = {
        "name": job.source_name,
        "commit": job.commit,
        "format": plan.source.format,
        "files": {file: state.size_bytes for file, state in sorted(job.files.items())},
    }
    figures = {
        "bits_per_weight": round(plan.bits_per_weight, 6),
        "parameters": plan.parameters,
        "weight_bytes": plan.weight_bytes,
        "dtype": plan.dtype,
        "quantization": quantization_block(plan),
        "method": plan.request.method if plan.request.quantizes else None,
        "transforms": transforms.record(plan.request, plan.source.config),
        "vocabulary": job.cut.as_json() if job.cut else None,
        "allocation": job.allocation.record if job.allocation else None,
        "calibration": job.calibration.sample.record() if job.calibration else None,
        "tuning": tuned,
        "losses": {step.path: step.loss for step in plan.steps if step.loss},
        "notes": list(plan.notes),
        **app_facts(path),
    }
    write_json(
        path / MANIFEST,
        make_manifest(path, origin, figures, quality.as_json() if quality else None),
    )


def _index(plan: Plan) -> dict[str, Any]:
    weight_map = {tensor.name: tensor.file for step in plan.steps for tensor in step.outputs}
    return {
        "metadata": {"total_size": plan.weight_bytes, "total_parameters": plan.parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
