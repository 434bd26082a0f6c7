"""One distillation, from folders to a folder: check, ask the teacher, train, describe, publish.

The teacher's answers, the last saved state and the best weights lie beside the output until it is
done, so that a run can go on after an interruption or a failure. The answers do not depend on how
the student learns: a run that goes on with other options keeps them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from apertus_mlx.checkpoint.config import CONFIG_FILE, read_config
from apertus_mlx.checkpoint.tensors import INDEX_FILE, open_checkpoint
from apertus_mlx.convert.distill.resources import Resources
from apertus_mlx.convert.distill.student import check_student, make_student, stored_tensors
from apertus_mlx.convert.distill.teacher_cache import TeacherCache, lot_bytes
from apertus_mlx.convert.distill.training import Options, Training, Validation, best, text_note
from apertus_mlx.convert.evaluation.layerwise import open_weights
from apertus_mlx.convert.evaluation.receipt import Receipt, kept_bytes, measure_receipt
from apertus_mlx.convert.evaluation.texts import (
    Sample,
    TextSet,
    Tokens,
    hold_out,
    open_text,
    read_texts,
    sample_windows,
)
from apertus_mlx.convert.sources.reading import FileState, Reader, file_states
from apertus_mlx.convert.vocabulary.matching import kept_ids, match
from apertus_mlx.convert.write.app_facts import app_facts
from apertus_mlx.convert.write.card import CARD, make_distilled_card
from apertus_mlx.convert.write.copied_files import TOKENIZER, copy_files
from apertus_mlx.convert.write.golden import write_golden
from apertus_mlx.convert.write.manifest import MANIFEST, make_manifest, read_manifest, write_json
from apertus_mlx.convert.write.target import build
from apertus_mlx.convert.write.tokenizer_table import write_tokenizer_table
from apertus_mlx.convert.write.workspace import Workspace
from apertus_mlx.errors import UsageError
from apertus_mlx.model.apertus import Model
from apertus_mlx.quant.arrays import blocks
from apertus_mlx.system.model_files import MAX_WEIGHTS_BYTES, copy_file, exists
from apertus_mlx.system.strict_json import read_object

_log = logging.getLogger("apertus_mlx")

# Folders beside the output while it is built.
DISTILLATION, EVALUATION = "distillation", "receipt"
# Of what an interrupted run goes on from; an interrupted run of another version starts again.
STATE_VERSION = 4
# Least and most windows that decide which weights are best, and their share between.
HELD_OUT_WINDOWS = (1, 32)
HELD_OUT_SHARE = 1 / 20
# Keys of the student's manifest that stay true.
KEPT_KEYS = (
    "bits_per_weight", "parameters", "weight_bytes", "dtype", "quantization", "method",
    "calibration", "losses", "notes", "vocabulary",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Job:
    """A distillation that has been checked and not yet begun."""

    teacher: Path
    teacher_name: str
    student: Path
    options: Options
    # What to learn from, and windows that decide which weights are best.
    sample: Sample
    held_out: Tokens
    # What the result is judged by in the end.
    judged: TextSet
    # Files of teacher and student as they were.
    teacher_files: dict[str, FileState]
    student_files: dict[str, FileState]

    @property
    def resources(self) -> Resources:
        """What the training takes."""
        config = read_config(self.student)
        return Resources(config, self.options.trained, self.sample.windows.shape[1])


@dataclass(frozen=True, slots=True)
class Observer:
    """Who is told how far things are."""

    # Tokens answered by the teacher, and of how many.
    teacher: Callable[[int, int], None]
    # Tokens trained on, of how many, the last loss, and the validations so far.
    training: Callable[[int, int, float, Sequence[Validation]], None]
    # Layers of the last measurement, and of how many.
    measuring: Callable[[int, int], None]


SILENT = Observer(lambda *_: None, lambda *_: None, lambda *_: None)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a distillation."""

    record: Mapping[str, Any]
    history: tuple[Validation, ...]
    # The evaluation as the manifest has it.
    quality: Mapping[str, Any]

    def as_json(self, target: Path) -> dict[str, Any]:
        """For `--json`."""
        return {"output": str(target), **self.record, "quality": self.quality}


def prepare(
    teacher: Path,
    student: Path,
    teacher_name: str,
    options: Options,
    texts: Sequence[Path] = (),
    tokens: int = 1 << 20,
    window_tokens: int = 256,
) -> Job:
    """Check that `student` can learn from `teacher`, and cut the texts into windows.

    Args:
        teacher: any form that `convert` reads.
        student: a folder that `convert` made, quantized.
        teacher_name: what the user calls the teacher.
        options: how to distill.
        texts: files and folders; without any, the project's own.
        tokens: most tokens to learn from.
        window_tokens: length of a window.

    Raises:
        ApertusError: a folder is damaged or not supported, the two do not fit each other, or there
            is too little text.
    """
    config = read_config(student)
    read_manifest(student)
    (tokenizer, template), (other, _) = open_text(student), open_text(teacher)
    kept, head = kept_ids(other, tokenizer), read_config(teacher).output_vocab_size
    if kept is None or config.output_vocab_size != int((kept < head).sum()):
        raise UsageError(
            f"{teacher}: has other tokens than {student}; a student needs its teacher's tokens, or "
            "a part of them"
        )
    seen, judged = hold_out(read_texts(texts))
    most = tokens // window_tokens + HELD_OUT_WINDOWS[1]
    sample = sample_windows(seen, tokenizer, template, window_tokens, most, options.seed)
    if len(sample.windows) < 2:
        raise UsageError(
            f"{seen.name}: too little text to learn from; at least two windows of {window_tokens} "
            "tokens are needed (--window)"
        )
    least, highest = HELD_OUT_WINDOWS
    count = min(max(round(len(sample.windows) * HELD_OUT_SHARE), least), highest)
    chosen = np.linspace(0, len(sample.windows) - 1, count).round().astype(int)
    rest = np.delete(sample.windows, chosen, axis=0)
    deciding = {window.tobytes() for window in sample.windows[chosen]}
    fresh = [window.tobytes() not in deciding for window in rest]
    rest = rest[fresh][: max(1, tokens // window_tokens)]
    if not len(rest):
        raise UsageError(f"{seen.name}: repeats itself; nothing is left to learn from")
    return make_job(
        teacher, student, teacher_name, options,
        replace(sample, windows=rest), sample.windows[chosen], judged,
    )  # fmt: skip


def make_job(
    teacher: Path,
    student: Path,
    teacher_name: str,
    options: Options,
    sample: Sample,
    held_out: Tokens,
    judged: TextSet,
) -> Job:
    """A job on windows that are there already; see `prepare`.

    Raises:
        ApertusError: the student cannot learn.
        ResourceError: there is not the memory for it.
    """
    with Reader(student) as reader:
        check_student(open_weights(student, reader).source)
    files = {
        directory: file_states(
            directory, [*open_checkpoint(directory).files, CONFIG_FILE, TOKENIZER]
        )
        for directory in (teacher, student)
    }
    job = Job(
        teacher, teacher_name, student, options, sample, held_out, judged,
        files[teacher], files[student],
    )  # fmt: skip
    job.resources.require()
    return job


def distill(job: Job, target: Path, resume: bool = False, observer: Observer = SILENT) -> Outcome:
    """Do what `job` says; `target` appears complete or not at all.

    Raises:
        ApertusError: see `build`; also a folder is damaged, or a loss is not finite.
    """

    def make(workspace: Workspace) -> None:
        path = workspace.path
        student, history = _train(job, workspace.kept_folder(DISTILLATION), observer)
        if (note := text_note(job.options, history)) is not None:
            _log.info(note)
        _write_model(job.student, path, dict(stored_tensors(student)))
        # Streams of a student that learned with other options are not this one's.
        quality = measure_receipt(
            path, job.teacher, job.judged, observer.measuring,
            lambda name: workspace.kept_folder(f"{EVALUATION}-{name}-{_training_name(job)}"),
        )  # fmt: skip
        _describe(job.student, path, target.name, _record(job, history), quality)

    build(
        target, (_fingerprint(job), _training_name(job)),
        {job.teacher: job.teacher_files, job.student: job.student_files}, _needed_bytes(job),
        resume, make,
    )  # fmt: skip
    return _outcome(target)


def _outcome(folder: Path) -> Outcome:
    """What the manifest of a finished folder says."""
    manifest = read_object(folder / MANIFEST)
    record = manifest["distillation"]
    history = tuple(Validation(**validation) for validation in record["history"])
    return Outcome(record, history, manifest["quality"])


def _train(job: Job, folder: Path, observer: Observer) -> tuple[Model, list[Validation]]:
    """Ask the teacher and train; the student with its best weights, and how it got there."""
    resources = job.resources
    size = resources.batch_windows
    batches, held_out = (
        TeacherCache(folder / name, [windows[part] for part in blocks(len(windows), size)])
        for name, windows in (("lessons", job.sample.windows), ("held-out", job.held_out))
    )
    total = batches.tokens + held_out.tokens
    with Reader(job.teacher) as reader:
        teacher = open_weights(job.teacher, reader)
        matching = match(job.teacher, job.student)
        k = min(job.options.top_k, read_config(job.student).output_vocab_size - 1)
        held_out.fill(teacher, k, lambda done: observer.teacher(done, total), matching)
        batches.fill(
            teacher, k, lambda done: observer.teacher(held_out.tokens + done, total), matching
        )
    with Reader(job.student) as reader:
        student = make_student(open_weights(job.student, reader), job.options.trained)
    own = folder / _training_name(job)
    own.mkdir(exist_ok=True)
    training = Training(student, batches, held_out, job.options, own, resources.by_layers)
    history = training.run(
        lambda done, loss, judged: observer.training(done, training.tokens, loss, judged)
    )
    return student, history


def _write_model(source: Path, output: Path, tensors: dict[str, mx.array]) -> None:
    """Copy the model in `source` with the bytes of some tensors exchanged."""
    checkpoint = open_checkpoint(source)
    others = [file for file in (CONFIG_FILE, INDEX_FILE) if exists(source / file)]
    for file in (*checkpoint.files, *others):
        copy_file(source / file, output / file, MAX_WEIGHTS_BYTES)
    copy_files(source, output)
    write_tokenizer_table(output)
    for name, array in tensors.items():
        tensor = checkpoint.tensors[name]
        data = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).tobytes()
        if len(data) != tensor.size_bytes:
            raise AssertionError(f"{name}: {len(data)} bytes where {tensor.size_bytes} were")
        with (output / tensor.file).open("r+b") as weights:
            weights.seek(tensor.offset)
            weights.write(data)


def _describe(
    student: Path, path: Path, name: str, record: dict[str, Any], quality: Receipt
) -> None:
    """Write the card and the manifest."""
    old = read_object(student / MANIFEST)
    write_golden(path, read_config(path))
    (path / CARD).write_text(
        make_distilled_card(student, name, old, record, quality), encoding="utf-8"
    )
    figures = {key: old[key] for key in KEPT_KEYS if key in old}
    figures |= {**app_facts(path), "distillation": record}
    write_json(path / MANIFEST, make_manifest(path, old["source"], figures, quality.as_json()))


def _record(job: Job, history: Sequence[Validation]) -> dict[str, Any]:
    """What a manifest says about a distillation; losses in nats."""
    return {
        "teacher": job.teacher_name,
        "teacher_files": {name: s.size_bytes for name, s in sorted(job.teacher_files.items())},
        "student": job.student.resolve().name,
        "texts": job.sample.record(),
        "held_out_windows": len(job.held_out),
        **asdict(job.options),
        "tokens_seen": history[-1].tokens,
        "best_step": best(history, job.options).step,
        "history": [asdict(validation) for validation in history],
    }


def _needed_bytes(job: Job) -> tuple[int, int]:
    """Disk for the output, and for what lies beside it until it is done."""
    weights = sum(state.size_bytes for state in job.student_files.values())
    tokens = job.sample.windows.size + job.held_out.size
    config = read_config(job.teacher)
    kept = job.resources.disk_bytes(tokens, job.options.top_k)
    kept += max(lot_bytes(config, tokens), kept_bytes(config, job.judged))
    return weights, kept


def _fingerprint(job: Job) -> str:
    """Of the teacher's answers and the student as it was; see `_training_name` for the rest."""
    text = json.dumps([STATE_VERSION, job.options.top_k, job.resources.batch_windows])
    for states in (job.teacher_files, job.student_files):
        text += repr(sorted((n, s.size_bytes, s.modified_ns) for n, s in states.items()))
    digest = hashlib.sha256(text.encode())
    for windows in (job.sample.windows, job.held_out):
        digest.update(repr(windows.shape).encode() + np.ascontiguousarray(windows).tobytes())
    return f"distill {digest.hexdigest()} {job.judged.sha256}"


def _training_name(job: Job) -> str:
    """The folder of a training with these options."""
    text = json.dumps(asdict(job.options), sort_keys=True)
    return f"training-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
