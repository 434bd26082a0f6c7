"""Convert, plan, verify, evaluate and distill from Python; the commands of these names call this.

Every function takes the options of its command as keywords, with underscores: the words beside an
argument are those of the command's help. A model is a folder (`Path` or text), a Hub id (text) or,
where the command allows it, None for the embedded one.
Nothing is printed: `progress` is called with `Progress` values, sometimes from another thread, and
what a user may want to know is logged to `apertus_mlx` at level INFO.

All functions raise TypeError for an argument of a wrong type, and otherwise `ApertusError`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from apertus_mlx.errors import UsageError
from apertus_mlx.generation.options import (
    CacheKeywords,
    CacheOptions,
    DType,
    Offline,
    Revision,
)
from apertus_mlx.hub import is_repo_id, locate
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.measure.tasks.options import TaskKeywords, TaskOptions
from apertus_mlx.system.arguments import Option, Range, as_list, checked, expect_one_of, known
from apertus_mlx.system.progress import OnLayers, OnProgress, Progress
from apertus_mlx.system.sizes import counted

if TYPE_CHECKING:
    from apertus_mlx.checkpoint.inventory import Inventory
    from apertus_mlx.convert.check.verify import Verification
    from apertus_mlx.convert.distill.run import Observer, Outcome
    from apertus_mlx.convert.distill.training import Validation
    from apertus_mlx.convert.evaluation.evaluate import Evaluation
    from apertus_mlx.convert.job import Job
    from apertus_mlx.convert.plan.plan import Plan
    from apertus_mlx.convert.plan.policy import Request
    from apertus_mlx.convert.vocabulary.choice import Cut
    from apertus_mlx.measure.tasks.run import ModelScores
    from apertus_mlx.memory import Device
    from apertus_mlx.memory.overview import Overview
    from apertus_mlx.memory.pipeline_report import PipelinePlan
    from apertus_mlx.memory.report import MemoryPlan

EMBEDDED_NAME = "apertus-demo"
# Of two types the command line gives the first: names of models may be Hub ids, which are text.
_Name = str | Path
_File = Path | str
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
        cut: which tokens are kept, where not all are, and what texts take with them.
        disk_bytes: of a plan, the most that lies on disk until the output is done; None where the
            source is not here.
        minutes: of a plan, about how long calibration and tuning take; None where there are none,
            or where nothing says it: on a GPU before a first layer is fitted.
    """

    output: Path
    source: str
    commit: str | None
    plan: Plan
    written: bool
    cut: Cut | None = None
    disk_bytes: int | None = None
    minutes: float | None = None

    def as_json(self) -> dict[str, Any]:
        """What `convert --json` prints, with `--plan` before the conversion."""
        from apertus_mlx.convert.report import plan_as_json, summary

        more: dict[str, Any] = {}
        if self.cut is not None:
            more["vocabulary"] = self.cut.as_json()
        if self.written:
            return summary(self.plan, self.source, self.commit, self.output) | more
        more |= {"disk_bytes": self.disk_bytes, "minutes": self.minutes}
        return plan_as_json(self.plan, self.source, self.commit) | more


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far models are from a reference: an evaluation for each, by a short name.

    Attributes:
        models: by name.
        tokens_per_character: by language; empty but where `languages` was asked for.
        text_tokens: likewise the tokens of each whole text, with the one that starts it.
    """

    models: Mapping[str, Evaluation]
    tokens_per_character: Mapping[str, float] = field(default_factory=dict)
    text_tokens: Mapping[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What `eval --json` prints: of one model its figures, of several those of each."""
        found: dict[str, dict[str, Any]] = {
            label: {"weight_bytes": evaluation.weight_bytes, **evaluation.as_json()}
            for label, evaluation in self.models.items()
        }
        for values in found.values():
            for tag, found_losses in values["languages"].items():
                if tag in self.text_tokens:
                    found_losses["tokens_per_character"] = self.tokens_per_character[tag]
                    found_losses["text_tokens"] = self.text_tokens[tag]
        return next(iter(found.values())) if len(found) == 1 else {"models": found}


@dataclass(frozen=True, slots=True)
class TaskComparison:
    """What models reached in tasks of lm-eval: the scores of each, by a short name."""

    models: Mapping[str, ModelScores]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """What `eval --tasks --json` prints."""
        models = {label: found.as_json() for label, found in self.models.items()}
        return {"notes": list(self.notes), "models": models}


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


@checked
def convert_model(
    source: Annotated[
        _Name | None, Option("Model folder or Hub id; default: the embedded model.")
    ] = None,
    out: Annotated[
        _File | None, Option("Output folder; default: a name from the source, here.")
    ] = None,
    *,
    bits: Annotated[int | None, Option("Bits per weight: 2, 3, 4, 5, 6 or 8.", flags="-b")] = None,
    group_size: Annotated[
        int | None, Option("Weights per scale: 32, 64 or 128.", flags="-g")
    ] = None,
    mode: Annotated[str | None, Option("affine (default), mxfp4, mxfp8 or nvfp4.")] = None,
    embed_bits: Annotated[int | None, Option("Bits of the embedding.")] = None,
    head_bits: Annotated[
        int | None, Option("Bits of the output head, where it is not the embedding.")
    ] = None,
    target_bpw: Annotated[
        str | float | None,
        Option("Bits per weight over the whole model, spent where they matter most."),
    ] = None,
    target_size: Annotated[
        str | int | None, Option("The same as the size of all weights: 300MB, 1.2GB.")
    ] = None,
    set: Annotated[
        Sequence[str] | None,
        Option(
            "Format of the modules that match, e.g. '*.down_proj=6'; none keeps them plain.",
            metavar="PATTERN=BITS[:GROUP]",
        ),
    ] = None,
    recipe: Annotated[_File | None, Option("TOML or JSON file with formats per module.")] = None,
    method: Annotated[
        str,
        Option(
            "rtn rounds, search finds the best scales, gptq calibrates on text, best is gptq with "
            "--tune or search, whichever is closer on held-out text."
        ),
    ] = "rtn",
    tune: Annotated[
        bool, Option("After gptq, train codes, scales and norms towards the original.")
    ] = False,
    smooth: Annotated[
        bool, Option("Scale columns before rounding, where calibration shows a smaller error.")
    ] = False,
    rotate: Annotated[
        bool, Option("Rotate residual stream and values, which spreads outliers.")
    ] = False,
    calibration: Annotated[
        _File | Sequence[_File] | None,
        Option("Text, JSONL or chat file, or folder, for gptq, --smooth, --target-*."),
    ] = None,
    dequantize: Annotated[bool, Option("Turn quantized weights into plain ones.")] = False,
    requantize: Annotated[bool, Option("Quantize quantized weights again, with a loss.")] = False,
    dtype: Annotated[DType | None, Option("Type of everything that is not codes.")] = None,
    vocab: Annotated[
        int | None, Option("Keep the first tokens alone: a multiple of 64, such as 65536.")
    ] = None,
    vocab_for: Annotated[
        _File | Sequence[_File] | None,
        Option("Keep the tokens that a text, JSONL or chat file, or folder, uses."),
    ] = None,
    text: Annotated[
        _File | Sequence[_File] | None,
        Option("Texts that show how many more tokens a cut vocabulary takes; default: built in."),
    ] = None,
    plan: Annotated[bool, Option("Show what would be done, and stop.")] = False,
    device: Annotated[
        str | None, Option("Refuse an output that would not fit: iphone-15-pro, 6GB, ...")
    ] = None,
    resume: Annotated[bool, Option("Continue an interrupted conversion.")] = False,
    revision: Revision = None,
    offline: Offline = False,
    allow_untied_head: Annotated[
        bool, Option("Keep a head that differs from a tied embedding.")
    ] = False,
    allow_nonfinite: Annotated[
        bool, Option("Copy NaN and infinity (not when quantizing).")
    ] = False,
    progress: OnProgress | None = None,
) -> Conversion:
    """Convert SOURCE to MLX weights in the folder OUT, quantized where bits are given.

    A plan of a source on the Hub is made from its headers. `progress` is told of the stages
    `downloading`, `measuring`, `comparing sizes`, `comparing methods`, `writing` (text to learn
    from), `calibrating`, `tuning`, `converting` and `evaluating`, as far as there is something to
    do.

    Raises:
        UsageError: options that exclude each other, or an output that is taken.
        RejectedError: the source is damaged or not supported.
        NotFoundError: there is no such source, or it cannot be reached.
        ResourceError: too little disk, or the device cannot hold the output.
    """
    from apertus_mlx.backend import tf32
    from apertus_mlx.convert.plan.options import read_request
    from apertus_mlx.memory import parse_device

    tf32.switch_off()
    texts = [Path(each) for each in as_list(calibration)]
    request = read_request(
        bits=bits, group_size=group_size, mode=mode, embed_bits=embed_bits, head_bits=head_bits,
        rules=as_list(set), recipe=None if recipe is None else Path(recipe), target_bpw=target_bpw,
        target_size=target_size, method=method, smooth=smooth, rotate=rotate, tune=tune,
        dequantize=dequantize, requantize=requantize, dtype=dtype,
        allow_untied_head=allow_untied_head, allow_nonfinite=allow_nonfinite, vocab=vocab,
        vocab_for=[str(each) for each in as_list(vocab_for)],
    )  # fmt: skip
    measured = [Path(each) for each in as_list(text)]
    if measured and not request.cuts_vocabulary:
        raise UsageError("--text: only --vocab and --vocab-for use it")
    if texts and request.method != "gptq" and not smooth and request.target is None:
        raise UsageError("--calibration: only --method gptq, --smooth and targets use it")
    target_device = None if device is None else parse_device(device)
    output = Path(out) if out is not None else None
    if plan and source is not None and not offline and _is_on_hub(source):
        planned = _plan_remote(str(source), revision, request, output)
        _require_fit(planned.plan, target_device)
        return planned
    job, target = _prepare(
        source, revision, offline, request, texts, output, plan, resume, progress, measured
    )  # fmt: skip
    _require_fit(job.plan, target_device)
    if plan:
        needs = sum(job.needed_bytes), job.minutes(target)
        return Conversion(target, job.source_name, job.commit, job.plan, False, job.cut, *needs)
    _write(job, target, resume, progress)
    return Conversion(target, job.source_name, job.commit, job.plan, True, job.cut)


@checked
def plan(
    model: Annotated[
        _Name | None, Option("Model folder or Hub id; default: the embedded model.")
    ] = None,
    *,
    device: Annotated[
        str | None,
        Option("iphone-15-pro, 'M3 Max', m1-8gb, a size as 6GB, or all; default: this machine."),
    ] = None,
    context: Annotated[
        int | None, Option("Tokens of prompt and answer; default: 4096.", Range(1, 2**31))
    ] = None,
    ranks: Annotated[
        int, Option("Over how many machines the model is split; plan for one.", Range(1, 64))
    ] = 1,
    revision: Revision = None,
    offline: Offline = False,
    draft: Annotated[
        _Name | None, Option("Plan for this draft in memory, too: a folder or Hub id.")
    ] = None,
    progress: OnProgress | None = None,
    **cache: Unpack[CacheKeywords],
) -> MemoryPlan:
    """Show what MODEL takes in memory, whether it fits a device, and the best settings there.

    A Hub id is planned from its headers; no weights are downloaded. `plan_overview` plans for all
    devices, or all models. `cache` is the fields of `CacheOptions`. `progress` is told of the stage
    `downloading`, where `offline` is not given and the Hub is not asked for headers alone.

    Raises:
        UsageError: an unknown device, a context beyond the model's, or a model that does not divide
            by `ranks`.
        NotFoundError: there is no such model, or it cannot be reached.
        RejectedError: the checkpoint is damaged or has to be converted first.
    """
    from apertus_mlx.generation.memory_plan import find_device
    from apertus_mlx.memory.report import plan_for_device

    options = CacheOptions(**known(CacheOptions, cache))
    target, on_gpu, precision = find_device(device)
    inventory = _inventory(model, revision, offline, progress)
    other = None if draft is None else _inventory(draft, None, offline, progress)
    # Ranks compute with MLX, wherever that is.
    cpu = precision if ranks == 1 else None
    return plan_for_device(
        inventory, target, context, options.form, options.prefill_step, on_gpu, cpu, other, ranks
    )


@checked
def plan_pipeline(
    model: _Name | None = None,
    *,
    device: str | None = None,
    context: int | None = None,
    ranks: int = 1,
    revision: str | None = None,
    offline: bool = False,
    progress: OnProgress | None = None,
    **cache: Unpack[CacheKeywords],
) -> PipelinePlan:
    """What each of several machines takes if the model is split by layers, by their memory.

    `device` names each of them, with commas between, or one of which there are `ranks`. The other
    options are those of `plan`.

    Raises:
        UsageError: fewer than two machines, more than layers, another number of devices than
            `ranks`, or see `plan`.
        NotFoundError: there is no such model, or it cannot be reached.
        RejectedError: the checkpoint is damaged or has to be converted first.
    """
    from apertus_mlx.generation.memory_plan import find_device
    from apertus_mlx.memory.pipeline_report import plan_stages

    options = CacheOptions(**known(CacheOptions, cache))
    names: list[str | None] = [None] if device is None else [*device.split(",")]
    if len(names) == 1:
        names *= ranks
    if len(names) < 2 or ranks not in (1, len(names)):
        raise UsageError(
            f"--pipeline: {len(names)} machines, and --ranks {ranks}; --ranks 2 splits over two "
            "alike, --device 64GB,36GB over these"
        )
    found = [find_device(name) for name in names]
    on_gpu = all(each for _, each, _ in found)
    inventory = _inventory(model, revision, offline, progress)
    return plan_stages(
        inventory,
        [target for target, _, _ in found],
        context,
        options.form,
        options.prefill_step,
        on_gpu,
    )


@checked
def plan_overview(
    model: _Name | None = None,
    *,
    all_models: bool = False,
    device: str | None = None,
    context: int | None = None,
    ranks: int = 1,
    revision: str | None = None,
    offline: bool = False,
    progress: OnProgress | None = None,
    **cache: Unpack[CacheKeywords],
) -> Overview:
    """What one model takes on every known device, or all released models take on one `device`.

    With `all_models` nothing is downloaded: their sizes are those that `apertus-mlx models` shows;
    without it `device` is left out or `all`. The other options are those of `plan`; of a model with
    a shorter context its own is planned.

    Raises:
        UsageError: an unknown device, a model beside `all_models`, all models on all devices, or a
            model that does not divide by `ranks`.
        NotFoundError: there is no such model, or it cannot be reached.
        RejectedError: the checkpoint is damaged or has to be converted first.
    """
    from apertus_mlx.generation.memory_plan import find_device
    from apertus_mlx.hub.apertus_models import RELEASED, expected_inventory, is_estimate
    from apertus_mlx.memory.devices import is_all, known_devices
    from apertus_mlx.memory.footprint import choose_backend
    from apertus_mlx.memory.overview import Overview, plan_row

    options = CacheOptions(**known(CacheOptions, cache))
    settings = context, options.form, options.prefill_step
    if all_models:
        if model is not None:
            raise UsageError(f"--all: plans every released model; leave out {str(model)!r}")
        if is_all(device):
            raise UsageError("--all: leave out --device all: one model, or one device")
        target, on_gpu, precision = find_device(device)
        rows = []
        for repo_id in RELEASED:
            inventory = expected_inventory(repo_id)
            cpu = precision if ranks == 1 else None
            backend = choose_backend(inventory, on_gpu, cpu=cpu, is_card=target.is_card)
            estimated = is_estimate(repo_id)
            rows.append(plan_row(inventory, target, *settings, backend, estimated, ranks))
        return Overview(rows)
    if device is not None and not is_all(device):
        raise UsageError(f"--device {device}: an overview of one model is over all devices")
    inventory = _inventory(model, revision, offline, progress)
    # All of them are Apple's, so MLX computes on the GPU.
    backend = choose_backend(inventory, on_gpu=True)
    rows = [plan_row(inventory, each, *settings, backend, ranks=ranks) for each in known_devices()]
    return Overview(rows)


@checked
def verify(
    directory: Annotated[_File, Option("A folder that `convert` wrote.")],
    *,
    golden: Annotated[
        bool,
        Option("Compute the golden answers in float32: write them, or compare with the folder's."),
    ] = False,
    progress: OnProgress | None = None,
) -> Verification:
    """Check DIRECTORY: hashes, names, shapes and config, and what Swift apps need.

    What is wrong stands in the result (`errors`, `findings`); it is not raised. `progress` is told
    of the stages `loading` and `answering`, with `golden` alone.

    Raises:
        NotFoundError: there is no such folder.
        RejectedError: with `golden`: the folder holds no tokenizer that makes prompts.
        ResourceError: with `golden`: the weights in float32 do not fit this machine's memory.
    """
    from apertus_mlx.convert.check.verify import verify as run

    return run(Path(directory), golden, progress)


@checked
def evaluate(
    models: Annotated[
        _Name | Sequence[_Name], Option("Model folders or Hub ids.", metavar="MODEL")
    ],
    *,
    reference: Annotated[
        _Name | None,
        Option("Model folder, Hub id or `embedded` to compare with; not with --tasks."),
    ] = None,
    text: Annotated[
        _File | Sequence[_File] | None,
        Option("Text, JSONL or chat file, or folder of such; default: built in."),
    ] = None,
    languages: Annotated[
        bool, Option("Compare on one short text in 115 languages, and show those that lose most.")
    ] = False,
    tokens: Annotated[
        int | None,
        Option(
            "Most tokens to compare per language; default: 2048, with --languages all.",
            Range(2, 2**24),
        ),
    ] = None,
    revision: Annotated[
        str | None, Option("Branch, tag or commit of the models from the Hub.")
    ] = None,
    reference_revision: Annotated[
        str | None, Option("Branch, tag or commit of the reference.")
    ] = None,
    offline: Offline = False,
    progress: OnProgress | None = None,
) -> Comparison:
    """Measure how far each MODEL's predictions are from those of the reference.

    Models come in any form that `convert_model` reads. `progress` is told of the stages
    `downloading` and `measuring`.

    Raises:
        UsageError: different vocabularies or heads, or too little text.
        NotFoundError: there is no such model, or it cannot be reached.
        RejectedError: a checkpoint is damaged or not supported.
    """
    from apertus_mlx.backend import tf32
    from apertus_mlx.convert.evaluation.evaluate import ALL_TOKENS, TOKENS_PER_LANGUAGE
    from apertus_mlx.convert.evaluation.languages import (
        language_set,
        text_tokens,
        tokens_per_character,
    )
    from apertus_mlx.convert.evaluation.side_by_side import by_vocabulary, measure_side_by_side
    from apertus_mlx.convert.evaluation.texts import hold_out, open_text, read_texts

    tf32.switch_off()
    files, names = [Path(each) for each in as_list(text)], as_list(models)
    labels = _labels(names)
    if reference is None:
        raise UsageError("--reference: give the model that the others were made from, or --tasks")
    if languages and files:
        raise UsageError("--languages: has texts of its own; leave out --text")
    # Of the built-in texts those that no conversion calibrates on.
    texts = read_texts(files) if files else hold_out(read_texts())[1]
    if languages:
        texts = language_set()
    folders = _folders(names, revision, offline, progress)
    origin = locate(
        reference, revision=reference_revision, offline=offline,
        progress=_naming(progress, reference),
    )  # fmt: skip
    if languages and len(by_vocabulary(folders, origin)) > 1:
        raise UsageError(
            "--languages: the models have different vocabularies; measure one at a time"
        )
    if tokens is None:
        tokens = ALL_TOKENS if languages else TOKENS_PER_LANGUAGE
    on_layers = partial(_layers(progress), "measuring")
    found = measure_side_by_side(folders, origin, texts, tokens, on_layers)
    evaluations = dict(zip(labels, found, strict=True))
    if not languages:
        return Comparison(evaluations)
    # The models may have a part of the reference's vocabulary.
    tokenizer = open_text(folders[0] if folders else origin)[0]
    return Comparison(evaluations, tokens_per_character(tokenizer), text_tokens(tokenizer))


@checked
def evaluate_tasks(
    models: _Name | Sequence[_Name],
    tasks: str | Sequence[str],
    *,
    out: _File | None = None,
    revision: str | None = None,
    offline: bool = False,
    progress: OnProgress | None = None,
    **options: Unpack[TaskKeywords],
) -> TaskComparison:
    """Put standard tasks to models with lm-eval, which the extra `eval` brings.

    Args:
        models: folders or Hub ids, of forms that `load` takes.
        tasks: names of lm-eval, of ours (`plain_facts`, which needs no network) or of a list of the
            model cards: `apertus-post`, `apertus-pre`, `swissai_eval`.
        out: a JSON file to write. Answers are kept beside it as they come, in a file that ends in
            `.answers.jsonl`; what is in there is not computed again.
        revision: of models from the Hub.
        offline: nothing is downloaded, data sets neither.
        progress: is told of the stages `downloading`, `loading` and those of lm-eval.
        **options: the fields of `TaskOptions`: `chat`, `few_shot`, `limit`, ...

    Raises:
        UsageError: lm-eval is missing, there is no such task, or a value is out of range.
        NotFoundError: a model or a data set cannot be had.
        RejectedError: a checkpoint is damaged or not supported, or lm-eval refuses a task.
        ResourceError: too little memory, or `out` cannot be written.
    """
    from apertus_mlx.generation.options import RunOptions
    from apertus_mlx.measure.tasks.run import find_tasks, run_tasks
    from apertus_mlx.measure.tasks.score_file import answers_path, check_out, write_scores

    settings = TaskOptions(**known(TaskOptions, options))
    names = as_list(models)
    labels = _labels(names)
    wanted = [name for each in as_list(tasks) for name in each.split(",") if name]
    target = None if out is None else Path(out)
    if target is not None:
        check_out(target)
    chosen = find_tasks(wanted, offline)
    for line in chosen.notes:
        _log.info(line)
    folders = _folders(names, revision, offline, progress)
    tell = progress or (lambda _: None)
    found = {}
    for label, folder in zip(labels, folders, strict=True):

        def asked(kind: str, done: int, total: int, label: str = label) -> None:
            tell(Progress(kind, done, total, "requests", label))

        def loaded(done: int, total: int, label: str = label) -> None:
            tell(Progress("loading", done, total, "bytes", label))

        answers = None if target is None else answers_path(target)
        found[label] = run_tasks(folder, chosen, settings, RunOptions(), answers, asked, loaded)
    comparison = TaskComparison(found, tuple(chosen.notes))
    if target is not None:
        write_scores(target, comparison.as_json())
    return comparison


@checked
def distill(
    teacher: Annotated[_Name, Option("Model folder or Hub id to learn from.")],
    student: Annotated[
        _File, Option("Quantized folder made by convert; not changed.", metavar="STUDENT_DIR")
    ],
    out: Annotated[
        _File | None, Option("Output folder; default: the student's name and -distilled, here.")
    ] = None,
    *,
    text: Annotated[
        _File | Sequence[_File] | None,
        Option("Text, JSONL or chat file, or folder of such; default: built in, small."),
    ] = None,
    tokens: Annotated[int, Option("Most tokens to learn from.", Range(2, 2**31))] = 2**20,
    epochs: Annotated[int, Option("How often each text is seen.", Range(1, 10_000))] = 1,
    window: Annotated[int, Option("Tokens that are read in one piece.", Range(2, 2**16))] = 256,
    train: Annotated[
        str, Option("weights: codes, scales and norms; scales: all but the codes.")
    ] = "weights",
    learning_rate: Annotated[float, Option("Highest rate, relative to a typical scale.")] = 1e-3,
    text_share: Annotated[
        float,
        Option("Share of the text itself in the loss; 0 follows the teacher alone.", Range(0, 1)),
    ] = 0.1,
    top_k: Annotated[int, Option("Tokens that the teacher names.", Range(1, 4096))] = 64,
    seed: Annotated[int, Option("Same seed, same result.", Range(0, 2**63 - 1))] = 0,
    resume: Annotated[bool, Option("Continue an interrupted distillation.")] = False,
    offline: Offline = False,
    progress: OnProgress | None = None,
) -> Distillation:
    """Let STUDENT_DIR learn from TEACHER; writes a folder of the same format and size.

    `progress` is told of the stages `downloading`, `asking the teacher`, `learning` and
    `measuring`.

    Raises:
        UsageError: the two do not fit each other, too little text, an output that is taken.
        NotFoundError: there is no such model, or it cannot be reached.
        RejectedError: a folder is damaged or not supported.
        ResourceError: too little memory or disk.
    """
    from apertus_mlx.backend import tf32
    from apertus_mlx.convert.distill.run import distill as run
    from apertus_mlx.convert.distill.run import prepare
    from apertus_mlx.convert.distill.student import TRAINED
    from apertus_mlx.convert.distill.training import Options, best, codes_reach

    tf32.switch_off()
    if not 0 < learning_rate <= 1:
        raise UsageError(f"--learning-rate {learning_rate}: expected above 0 and at most 1")
    files = [Path(each) for each in as_list(text)]
    expect_one_of(TRAINED, train=train)
    trained = next(trained for trained in TRAINED if train == trained)
    options = Options(trained, epochs, learning_rate, text_share, top_k, seed)
    folder = locate(teacher, offline=offline, progress=progress)
    name = str(teacher) if _is_on_hub(teacher) else _local_name(folder)
    job = prepare(folder, Path(student), name, options, files, tokens, window)
    if not files:
        _log.info("learning from the small text in the package; --text takes one for your use")
    windows, length = job.sample.windows.shape
    _log.info(
        f"{counted(windows * length, 'token')} in windows of {length}, {counted(epochs, 'time')}; "
        f"{counted(len(job.held_out), 'window')} held out; the teacher names {top_k} tokens each"
    )
    batches = epochs * -(-windows // job.resources.batch_windows)
    if trained == "weights" and codes_reach(options, batches) < 0.5:
        _log.info(
            f"{counted(batches, 'batch', 'batches')} of text are too few for any code to change: "
            "this trains what --train scales trains; more --text or --epochs reach the codes"
        )
    target = Path(out) if out is not None else Path(f"{Path(student).resolve().name}-distilled")
    outcome = run(job, target, resume, _observer(progress))
    first, kept = outcome.history[0], best(outcome.history, options)
    _log.info(
        f"divergence from the teacher on held-out text: {first.held_out_divergence:.4f} -> "
        f"{kept.held_out_divergence:.4f} nats"
    )
    _log.info(
        f"as a draft: {outcome.quality['overall']['acceptance']:.1%} of its guesses can be "
        "accepted, at temperature 1 on held-out text"
    )
    return Distillation(target, outcome)


# --- models


def _is_on_hub(model: str | Path) -> bool:
    """Whether `model` is a Hub id: text of that form, and nothing here has that name."""
    return isinstance(model, str) and is_repo_id(model) and not Path(model).expanduser().exists()


def _local_name(folder: Path) -> str:
    """What a model that is not from the Hub is called in a manifest."""
    return EMBEDDED_NAME if folder == model_dir() else folder.resolve().name


def _inventory(
    model: str | Path | None, revision: str | None, offline: bool, progress: OnProgress | None
) -> Inventory:
    from apertus_mlx.checkpoint.inventory import take_inventory
    from apertus_mlx.hub import fetch_headers

    if isinstance(model, str) and not offline and _is_on_hub(model):
        _log.info(f"{model}: reading config and headers")
        return fetch_headers(model, revision or "main").inventory()
    folder = locate(model, revision=revision, offline=offline, progress=progress)
    return take_inventory(folder, EMBEDDED_NAME if model is None else str(model))


def _folders(
    names: Sequence[str | Path], revision: str | None, offline: bool, progress: OnProgress | None
) -> list[Path]:
    """The folders of models. `revision` is that of models from the Hub; refused without any."""
    on_hub = [_is_on_hub(name) for name in names]
    return [
        locate(
            name,
            revision=revision if remote or not any(on_hub) else None,
            offline=offline,
            progress=_naming(progress, name),
        )
        for name, remote in zip(names, on_hub, strict=True)
    ]


def _labels(models: Sequence[str | Path]) -> list[str]:
    """A short name for each model: the folder's, or all that was given where two share one.

    Raises:
        UsageError: there is no model, or one twice.
    """
    if not models:
        raise UsageError("models: give at least one")
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


# --- progress


def _layers(progress: OnProgress | None) -> OnLayers:
    if progress is None:
        return lambda stage, done, total: None
    return lambda stage, done, total: progress(
        Progress(stage, done, total, "tokens" if stage in ("writing", "tuning") else "layers")
    )


def _naming(progress: OnProgress | None, model: str | Path) -> OnProgress | None:
    """Of several downloads each says what is downloaded."""
    return progress and (lambda told: progress(replace(told, detail=str(model))))


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
        partial(_layers(progress), "measuring"),
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
    texts: Sequence[Path],
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
        folder = locate(source, revision=revision, offline=offline, progress=progress)
        name = _local_name(folder)
    target = out or Path(default_name(name, request))
    partial = partial_path(target)
    earlier = not resume and partial.is_dir()
    job = prepare(
        folder, request, name, commit, calibration_texts=calibration,
        progress=_layers(progress), target=target, resume=resume,
        inflation_texts=texts,
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
        _layers(progress),
    )
    _log.info(
        f"{format_bytes(total)} -> {format_bytes(job.plan.weight_bytes)}, "
        f"{job.plan.bits_per_weight:.3f} bits per weight"
    )


def _require_fit(plan: Plan, device: Device | None) -> None:
    if device is not None:
        from apertus_mlx.convert.plan.budget import require_fit

        require_fit(plan, device)
