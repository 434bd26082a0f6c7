"""Convert, plan, verify, evaluate and distill from Python; the commands of these names call this.

Every function takes the options of its command as keywords, with underscores. A model is a folder
(`Path` or text), a Hub id (text) or, where the command allows it, None for the embedded one.
Nothing is printed: `progress` is called with `Progress` values, sometimes from another thread, and
what a user may want to know is logged to `apertus_mlx` at level INFO.

All functions raise TypeError for an argument of a wrong type, and otherwise `ApertusError`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apertus_mlx.errors import UsageError
from apertus_mlx.system.arguments import (
    expect,
    expect_list,
    expect_paths,
    expect_range,
)
from apertus_mlx.system.foreign_errors import own_errors
from apertus_mlx.system.progress import OnProgress, Progress

if TYPE_CHECKING:
    from apertus_mlx.checkpoint.inventory import Inventory
    from apertus_mlx.convert.check.verify import Verification
    from apertus_mlx.convert.distill.run import Observer, Outcome
    from apertus_mlx.convert.distill.training import Validation
    from apertus_mlx.convert.evaluation.evaluate import Evaluation
    from apertus_mlx.convert.job import Job
    from apertus_mlx.convert.plan.plan import Plan
    from apertus_mlx.convert.plan.policy import Request
    from apertus_mlx.memory import Device
    from apertus_mlx.memory.report import MemoryPlan

EMBEDDED_NAME = "apertus-demo"
_Name = str | Path
_log = logging.getLogger("apertus_mlx")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert_model` wrote or, asked for the plan alone, would write.

    Attributes:
        output: the folder.
        source: what the source was called.
        commit: of a source from the Hub, where it is known.
        plan: every tensor of the output, and what becomes of it.
        written: whether the folder is there.
    """

    output: Path
    source: str
    commit: str | None
    plan: Plan
    written: bool

    def as_json(self) -> dict[str, Any]:
        """What `convert --json` prints, with `--plan` before the conversion."""
        from apertus_mlx.convert.report import plan_as_json, summary

        if self.written:
            return summary(self.plan, self.source, self.commit, self.output)
        return plan_as_json(self.plan, self.source, self.commit)


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far models are from a reference: an evaluation for each, by a short name."""

    models: Mapping[str, Evaluation]

    def as_json(self) -> dict[str, Any]:
        """What `eval --json` prints: of one model its figures, of several those of each."""
        found = {
            label: {"weight_bytes": evaluation.weight_bytes, **evaluation.as_json()}
            for label, evaluation in self.models.items()
        }
        return next(iter(found.values())) if len(found) == 1 else {"models": found}


@dataclass(frozen=True, slots=True)
class Distillation:
    """What `distill` wrote: the folder, and what came of the training."""

    output: Path
    outcome: Outcome

    @property
    def history(self) -> tuple[Validation, ...]:
        """Losses at intervals; the first before any training."""
        return self.outcome.history

    def as_json(self) -> dict[str, Any]:
        """What `distill --json` prints."""
        return self.outcome.as_json(self.output)


@own_errors()
def convert_model(
    source: str | Path | None = None,
    out: str | Path | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
    embed_bits: int | None = None,
    head_bits: int | None = None,
    target_bpw: float | str | None = None,
    target_size: int | str | None = None,
    set: Sequence[str] | None = None,
    recipe: str | Path | None = None,
    method: str = "rtn",
    smooth: bool = False,
    rotate: bool = False,
    calibration: str | Path | Sequence[str | Path] | None = None,
    dequantize: bool = False,
    requantize: bool = False,
    dtype: str | None = None,
    plan: bool = False,
    device: str | None = None,
    resume: bool = False,
    revision: str | None = None,
    offline: bool = False,
    allow_untied_head: bool = False,
    allow_nonfinite: bool = False,
    progress: OnProgress | None = None,
) -> Conversion:
    """Convert `source` to MLX weights in the folder `out`, quantized where `bits` is given.

    Args:
        source: the model.
        out: the output folder; by default a name from the source, in the current folder.
        bits: per weight: 2, 3, 4, 5, 6 or 8.
        group_size: weights that share a scale: 32, 64 or 128.
        mode: affine, mxfp4, mxfp8 or nvfp4.
        embed_bits: bits of the embedding.
        head_bits: bits of the output head, where it is not the embedding.
        target_bpw: bits per weight over the whole model, spent where they matter most.
        target_size: the same as the size of all weights: bytes, or a text such as `300MB`.
        set: formats of the modules that match, each `PATTERN=BITS[:GROUP]`.
        recipe: a TOML or JSON file with formats per module.
        method: `rtn` rounds, `search` finds the best scales, `gptq` calibrates on text.
        smooth: scale columns before rounding, where calibration shows a smaller error.
        rotate: rotate residual stream and values, which spreads outliers.
        calibration: text files or folders for gptq, `smooth` and targets; by default built in.
        dequantize: turn quantized weights into plain ones.
        requantize: quantize quantized weights again, with a loss.
        dtype: `bfloat16`, `float16` or `float32`: the type of everything that is not codes.
        plan: only plan; a source on the Hub is planned from its headers.
        device: refuse an output that this device cannot hold: `iphone-15-pro`, `6GB`.
        resume: continue an interrupted conversion.
        revision: branch, tag or commit of a Hub id.
        offline: use only what is on this machine.
        allow_untied_head: keep a head that differs from a tied embedding.
        allow_nonfinite: copy NaN and infinity, where nothing is quantized.
        progress: told of the stages `downloading`, `measuring`, `calibrating` and `converting`.

    Raises:
        UsageError: options that exclude each other, or an output that is taken.
        RejectedError: the source is damaged or not supported.
        NotFoundError: there is no such source, or it cannot be reached.
        ResourceError: too little disk, or the device cannot hold the output.
    """
    from apertus_mlx.convert.plan.options import read_request

    expect(_Name | None, source=source, out=out, recipe=recipe)
    expect(int | None, bits=bits, group_size=group_size, embed_bits=embed_bits, head_bits=head_bits)
    expect(float | int | str | None, target_bpw=target_bpw)
    expect(int | str | None, target_size=target_size)
    expect(str | None, mode=mode, dtype=dtype, device=device, revision=revision)
    expect(str, method=method)
    expect(
        bool, smooth=smooth, rotate=rotate, dequantize=dequantize, requantize=requantize, plan=plan,
        resume=resume, offline=offline, allow_untied_head=allow_untied_head,
        allow_nonfinite=allow_nonfinite,
    )  # fmt: skip
    if isinstance(set, str):
        raise TypeError("set: expected a list of texts, not str")
    rules = [str(rule) for rule in expect_list(str, set=set)]
    texts = expect_paths(calibration=calibration)
    request = read_request(
        bits=bits, group_size=group_size, mode=mode, embed_bits=embed_bits, head_bits=head_bits,
        rules=rules, recipe=Path(recipe) if recipe is not None else None, target_bpw=target_bpw,
        target_size=target_size, method=method, smooth=smooth, rotate=rotate,
        dequantize=dequantize, requantize=requantize, dtype=dtype,
        allow_untied_head=allow_untied_head, allow_nonfinite=allow_nonfinite,
    )  # fmt: skip
    if texts and method != "gptq" and not smooth and request.target is None:
        raise UsageError("--calibration: only --method gptq, --smooth and targets use it")
    target_device = _read_device(device)
    output = Path(out) if out is not None else None
    if plan and source is not None and not offline and _is_on_hub(source):
        planned = _plan_remote(str(source), revision, request, output)
        _require_fit(planned.plan, target_device)
        return planned
    job, target = _prepare(
        source, revision, offline, request, texts, output, plan, resume, progress
    )  # fmt: skip
    _require_fit(job.plan, target_device)
    if not plan:
        _write(job, target, resume, progress)
    return Conversion(target, job.source_name, job.commit, job.plan, not plan)


@own_errors()
def plan(
    model: str | Path | None = None,
    *,
    device: str | None = None,
    context: int | None = None,
    kv_bits: int | None = None,
    kv_bits_v: int | None = None,
    max_kv: int | None = None,
    kv_sink: int | None = None,
    kv_rotate: bool | None = None,
    prefill_step: int | None = None,
    revision: str | None = None,
    offline: bool = False,
    progress: OnProgress | None = None,
) -> MemoryPlan:
    """Plan what `model` takes in memory, and whether and how it fits a device.

    A Hub id is planned from its headers; no weights are downloaded.

    Args:
        model: the model.
        device: `iphone-15-pro`, `m4-pro-24gb`, a size such as `6GB`; by default this machine.
        context: tokens of prompt and answer; by default 4096.
        kv_bits: bits of cached keys and values: 2, 3, 4, 6, 8 or 16.
        kv_bits_v: bits of cached values, where they differ from those of keys.
        max_kv: most positions that the cache keeps.
        kv_sink: first positions that it always keeps.
        kv_rotate: rotate keys before they are quantized.
        prefill_step: prompt tokens per step.
        revision: branch, tag or commit of a Hub id.
        offline: use only what is on this machine.
        progress: told of the stage `downloading`, where `offline` is not given and the Hub is not
            asked for headers alone.

    Raises:
        UsageError: an unknown device, or a context beyond the model's.
        NotFoundError: there is no such model, or it cannot be reached.
        RejectedError: the checkpoint is damaged or has to be converted first.
    """
    from apertus_mlx.backend.choose import uses_cpu
    from apertus_mlx.backend.hardware import available_bytes, has_gpu
    from apertus_mlx.cache.config import read_cache_form
    from apertus_mlx.memory import Device
    from apertus_mlx.memory.report import plan_for_device

    expect(_Name | None, model=model)
    expect(str | None, device=device, revision=revision)
    expect(
        int | None, context=context, kv_bits=kv_bits, kv_bits_v=kv_bits_v, max_kv=max_kv,
        kv_sink=kv_sink, prefill_step=prefill_step,
    )  # fmt: skip
    expect(bool | None, kv_rotate=kv_rotate)
    expect(bool, offline=offline)
    expect_range(1, 2**31, context=context)
    expect_range(1, 2**20, prefill_step=prefill_step)
    form = read_cache_form(kv_bits, kv_bits_v, max_kv, kv_sink, kv_rotate)
    target = _read_device(device)
    inventory = _inventory(model, revision, offline, progress)
    if target is not None:  # every device by name is Apple's; only this machine may lack a GPU
        return plan_for_device(inventory, target, context, form, prefill_step, True, None)
    precision = "auto" if uses_cpu("auto", None) else None
    here = Device("this machine", available_bytes())
    return plan_for_device(inventory, here, context, form, prefill_step, has_gpu(), precision)


@own_errors()
def verify(directory: str | Path) -> Verification:
    """Check a folder that `convert_model` wrote: hashes, names, shapes, config, what Swift needs.

    What is wrong stands in the result (`errors`, `findings`); it is not raised.

    Raises:
        NotFoundError: there is no such folder.
    """
    from apertus_mlx.convert.check.verify import verify as run

    expect(_Name, directory=directory)
    return run(Path(directory))


@own_errors()
def evaluate(
    models: str | Path | Sequence[str | Path],
    *,
    reference: str | Path,
    text: str | Path | Sequence[str | Path] | None = None,
    tokens: int = 2048,
    revision: str | None = None,
    reference_revision: str | None = None,
    offline: bool = False,
    progress: OnProgress | None = None,
) -> Comparison:
    """Measure how far the predictions of `models` are from those of `reference`.

    Args:
        models: one or several models, in any form that `convert_model` reads.
        reference: the model that they were made from.
        text: text files or folders; by default built in.
        tokens: most tokens per language.
        revision: branch, tag or commit of the models from the Hub.
        reference_revision: the same of the reference.
        offline: use only what is on this machine.
        progress: told of the stages `downloading` and `measuring`.

    Raises:
        UsageError: different vocabularies or too little text.
        NotFoundError: there is no such model, or it cannot be reached.
        RejectedError: a checkpoint is damaged or not supported.
    """
    from apertus_mlx.convert.evaluation.evaluate import measure_all
    from apertus_mlx.convert.evaluation.texts import hold_out, read_texts

    given = expect_list(_Name, models=models)
    expect(_Name, reference=reference)
    expect(int, tokens=tokens)
    expect(str | None, revision=revision, reference_revision=reference_revision)
    expect(bool, offline=offline)
    expect_range(2, 2**24, tokens=tokens)
    files = expect_paths(text=text)
    if not given:
        raise UsageError("models: give at least one")
    names = [name for name in given if isinstance(name, str | Path)]
    labels = _labels(names)
    # Of the built-in texts those that no conversion calibrates on.
    texts = read_texts(files) if files else hold_out(read_texts())[1]
    # `revision` is that of models from the Hub; it is refused where there is none.
    on_hub = [_is_on_hub(name) for name in names]
    folders = [
        _locate(name, revision if remote or not any(on_hub) else None, offline, progress)
        for name, remote in zip(names, on_hub, strict=True)
    ]
    origin = _locate(reference, reference_revision, offline, progress)
    found = measure_all(folders, origin, texts, tokens, _stage(progress, "measuring"))
    return Comparison(dict(zip(labels, found, strict=True)))


@own_errors()
def distill(
    teacher: str | Path,
    student: str | Path,
    out: str | Path | None = None,
    *,
    text: str | Path | Sequence[str | Path] | None = None,
    tokens: int = 2**20,
    epochs: int = 1,
    window: int = 256,
    train: str = "weights",
    learning_rate: float = 1e-3,
    text_share: float = 0.1,
    top_k: int = 64,
    seed: int = 0,
    resume: bool = False,
    offline: bool = False,
    progress: OnProgress | None = None,
) -> Distillation:
    """Train a quantized model to predict what the model that it was made from predicts.

    Args:
        teacher: the model to learn from.
        student: a quantized folder that `convert_model` wrote; it is not changed.
        out: the output folder, of the student's format and size; by default the student's name
            and `-distilled`, in the current folder.
        text: text files or folders; by default built in, little.
        tokens: most tokens to learn from.
        epochs: how often each text is seen.
        window: tokens that are read in one piece.
        train: `weights`, or `scales` (and norms) with codes as they are.
        learning_rate: the highest rate, relative to a typical scale.
        text_share: share of the text itself in the loss, from 0 (the teacher alone) to 1.
        top_k: tokens that the teacher names at each position.
        seed: the same seed gives the same result.
        resume: continue an interrupted distillation.
        offline: use only what is on this machine.
        progress: told of the stages `downloading`, `asking the teacher`, `learning` and
            `measuring`.

    Raises:
        UsageError: the two do not fit each other, too little text, an output that is taken.
        NotFoundError: there is no such model, or it cannot be reached.
        RejectedError: a folder is damaged or not supported.
        ResourceError: too little memory or disk.
    """
    from apertus_mlx.convert.distill.run import distill as run
    from apertus_mlx.convert.distill.run import prepare
    from apertus_mlx.convert.distill.student import TRAINED
    from apertus_mlx.convert.distill.training import Options, best

    expect(_Name, teacher=teacher, student=student)
    expect(_Name | None, out=out)
    expect(int, tokens=tokens, epochs=epochs, window=window, top_k=top_k, seed=seed)
    expect(int | float, learning_rate=learning_rate, text_share=text_share)
    expect(str, train=train)
    expect(bool, resume=resume, offline=offline)
    expect_range(2, 2**31, tokens=tokens)
    expect_range(1, 10_000, epochs=epochs)
    expect_range(2, 2**16, window=window)
    expect_range(1, 4096, top_k=top_k)
    expect_range(0, 2**63, seed=seed)
    if not 0 < learning_rate <= 1:
        raise UsageError(f"--learning-rate {learning_rate}: expected above 0 and at most 1")
    if not 0 <= text_share <= 1:
        raise UsageError(f"--text-share {text_share}: expected a share from 0 to 1")
    files = expect_paths(text=text)
    trained = next((trained for trained in TRAINED if train == trained), None)
    if trained is None:
        raise UsageError(f"--train {train[:40]!r}: expected {' or '.join(TRAINED)}")
    options = Options(trained, epochs, learning_rate, text_share, top_k, seed)
    folder = _locate(teacher, None, offline, progress)
    name = str(teacher) if _is_on_hub(teacher) else folder.resolve().name
    job = prepare(folder, Path(student), name, options, files, tokens, window)
    if not files:
        _log.info("learning from the small text in the package; --text takes one for your use")
    windows, length = job.sample.windows.shape
    _log.info(
        f"{windows * length:,} tokens in windows of {length}, {epochs} times; "
        f"{len(job.held_out)} windows held out; the teacher names {top_k} tokens each"
    )
    target = Path(out) if out is not None else Path(f"{Path(student).resolve().name}-distilled")
    outcome = run(job, target, resume, _observer(progress))
    first, kept = outcome.history[0], best(outcome.history)
    _log.info(
        f"divergence from the teacher on held-out text: {first.held_out_divergence:.4f} -> "
        f"{kept.held_out_divergence:.4f} nats"
    )
    return Distillation(target, outcome)


# --- models


def _is_on_hub(model: str | Path) -> bool:
    """Whether `model` is a Hub id: text of that form, and nothing here has that name."""
    from apertus_mlx.hub import is_repo_id

    return isinstance(model, str) and is_repo_id(model) and not Path(model).expanduser().exists()


def _locate(
    model: str | Path | None, revision: str | None, offline: bool, progress: OnProgress | None
) -> Path:
    """The folder of `model`, fetched from the Hub if it is an id; the embedded one by default."""
    from apertus_mlx.errors import NotFoundError
    from apertus_mlx.hub import locate

    if model is None:
        from apertus_mlx.demo import model_dir

        _log.info("using the small demonstration model in the package")
        return model_dir()
    if isinstance(model, Path) and not model.expanduser().exists():
        raise NotFoundError(f"{model}: no such folder")
    return locate(str(model), revision=revision, offline=offline, progress=progress)


def _inventory(
    model: str | Path | None, revision: str | None, offline: bool, progress: OnProgress | None
) -> Inventory:
    from apertus_mlx.checkpoint.inventory import take_inventory
    from apertus_mlx.hub import fetch_headers

    if isinstance(model, str) and not offline and _is_on_hub(model):
        _log.info(f"{model}: reading config and headers")
        return fetch_headers(model, revision or "main").inventory()
    folder = _locate(model, revision, offline, progress)
    return take_inventory(folder, None if model is None else str(model))


def _labels(models: Sequence[str | Path]) -> list[str]:
    """A short name for each model: the folder's, or all that was given where two share one."""
    folders = [Path(model).expanduser() for model in models]
    names = [
        folder.resolve().name if folder.is_dir() else str(model)
        for model, folder in zip(models, folders, strict=True)
    ]
    labels = [
        name if names.count(name) == 1 else str(model)
        for name, model in zip(names, models, strict=True)
    ]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"{label}: is given twice")
    return labels


def _read_device(name: str | None) -> Device | None:
    from apertus_mlx.memory import parse_device

    return None if name is None else parse_device(name)


# --- progress


def _stage(progress: OnProgress | None, stage: str) -> Callable[[float, float | None], None]:
    """What is told layers done, and how many there are."""
    if progress is None:
        return lambda done, total: None
    return lambda done, total: progress(Progress(stage, done, total, "layers"))


def _observer(progress: OnProgress | None) -> Observer:
    from apertus_mlx.convert.distill.run import Observer

    tell = progress or (lambda _: None)
    seen = 0

    def learning(done: int, total: int, loss: float, history: Sequence[Validation]) -> None:
        nonlocal seen
        tell(Progress("learning", done, total, "tokens", f"loss {loss:.4f}"))
        if len(history) != seen:
            seen = len(history)
            _log.info(
                f"after {done:,} tokens: loss {loss:.4f}, held out {history[-1].held_out_loss:.4f}"
            )

    return Observer(
        lambda done, total: tell(Progress("asking the teacher", done, total, "tokens")),
        learning,
        _stage(progress, "measuring"),
    )


# --- conversion


def _prepare(
    source: str | Path | None,
    revision: str | None,
    offline: bool,
    request: Request,
    calibration: Sequence[Path],
    out: Path | None,
    plan: bool,
    resume: bool,
    progress: OnProgress | None,
) -> tuple[Job, Path]:
    """The job and its output folder; where a size is the target, it is measured for there."""
    from apertus_mlx.convert.job import prepare
    from apertus_mlx.convert.report import default_name
    from apertus_mlx.convert.write.target import check_target
    from apertus_mlx.convert.write.workspace import partial_path

    if not plan and out is not None and not (resume and partial_path(out).is_dir()):
        check_target(out, None)
    commit = None
    if source is not None and _is_on_hub(source):
        from apertus_mlx.hub import resolve

        name = str(source)
        snapshot = resolve(name, revision=revision, offline=offline, progress=progress)
        folder, commit = snapshot.directory, snapshot.commit
    else:
        folder = _locate(source, revision, offline, progress)
        name = EMBEDDED_NAME if source is None else folder.resolve().name
    target = out or Path(default_name(name, request))
    partial = partial_path(target)
    earlier = not resume and partial.is_dir()
    job = prepare(
        folder, request, name, commit, calibration_texts=calibration,
        progress=_stage(progress, "measuring"), target=target, resume=resume,
    )  # fmt: skip
    if job.is_begun and earlier:
        _log.info(f"{partial}: what was measured there for the same request is used")
    if job.is_begun and plan:
        _log.info(f"{partial}: holds what was measured, for the conversion to use")
    return job, target


def _plan_remote(
    source: str, revision: str | None, request: Request, out: Path | None
) -> Conversion:
    """The plan from the headers on the Hub, before anything is downloaded."""
    from apertus_mlx.convert.remote import plan_remote
    from apertus_mlx.convert.report import default_name
    from apertus_mlx.hub import fetch_headers

    checkpoint = fetch_headers(source, revision or "main")
    target = out or Path(default_name(source, request))
    return Conversion(target, source, checkpoint.commit, plan_remote(checkpoint, request), False)


def _write(job: Job, target: Path, resume: bool, progress: OnProgress | None) -> None:
    from apertus_mlx.convert.job import convert
    from apertus_mlx.system.sizes import format_bytes

    for line in job.plan.notes:
        _log.info(line)
    if job.asks_for_code:
        asked = ", ".join(job.asks_for_code)
        _log.info(f"config.json asks for code ({asked}); never run, not copied")
    tell, total = progress or (lambda _: None), job.plan.source_bytes
    convert(
        job,
        target,
        resume,
        lambda done: tell(Progress("converting", done, total, "bytes")),
        _stage(progress, "calibrating"),
    )
    _log.info(
        f"{format_bytes(total)} -> {format_bytes(job.plan.weight_bytes)}, "
        f"{job.plan.bits_per_weight:.3f} bits per weight"
    )


def _require_fit(plan: Plan, device: Device | None) -> None:
    if device is not None:
        from apertus_mlx.convert.plan.budget import require_fit

        require_fit(plan, device)
