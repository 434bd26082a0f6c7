"""What has to be measured before there is a plan: where it is kept, and the disk that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.convert.calibration import allocation, calibrate, calibrated, held_out_comparison
from apertus_mlx.convert.calibration.allocation import Allocation, allocate_bits, allocated
from apertus_mlx.convert.calibration.calibrated import Calibration
from apertus_mlx.convert.calibration.tuning import Tuning
from apertus_mlx.convert.evaluation import evaluate
from apertus_mlx.convert.plan.plan import Plan
from apertus_mlx.convert.plan.policy import Request
from apertus_mlx.convert.sources.source import Source
from apertus_mlx.convert.write.keep import Keep
from apertus_mlx.convert.write.target import check_space, check_target
from apertus_mlx.convert.write.workspace import MEASURED, is_published, open_workspace, partial_path
from apertus_mlx.errors import UsageError
from apertus_mlx.system.progress import OnLayers


@contextmanager
def measuring(
    directory: Path,
    target: Path | None,
    fingerprint: str,
    resume: bool,
    name: str,
    needed: tuple[int, int],
) -> Iterator[Path]:
    """The folder `name`, beside the output `target`, in which measurements for the plan are kept.

    Args:
        directory: the source.
        target: the output folder; a UsageError where the caller has none.
        fingerprint: of the conversion; an earlier run with the same one is resumed.
        resume: whether an earlier run may be resumed.
        name: of the measurements.
        needed: bytes of the output, and of what lies beside it until it is done.
    """
    if target is None:
        raise UsageError(
            f"{directory}: its plan needs measurements, which lie beside the output; name one"
        )
    if resume and is_published(target, fingerprint):
        yield partial_path(target) / MEASURED / name
        return
    check_target(target, directory)
    check_space(target, *needed)
    with (
        open_workspace(target, fingerprint, resume) as workspace,
        workspace.measuring(name) as folder,
    ):
        yield folder


def allocate_once(
    source: Source,
    request: Request,
    directory: Path,
    calibration: Calibration,
    folder: Path,
    progress: OnLayers,
) -> Allocation:
    """Formats for a size: chosen now, or by an earlier run that left its choice in `folder`."""
    keep = Keep(folder / "allocation.npz")
    kept = keep.load()
    if kept is None:
        found = allocate_bits(source, request, directory, calibration, folder, progress)
        keep.save({"record": found.record, "note": found.note}, {})
    else:
        found = allocated(request, **kept[0])
    # Nobody needs the measurements any more.
    for entry in folder.iterdir():
        if entry.is_file() and entry.name != "allocation.npz":
            entry.unlink()
    return found


def space_for_target(source: Source, request: Request, calibration: Calibration) -> tuple[int, int]:
    """Bytes of the output of a request for a size, and of what lies beside it until it is done."""
    wanted = request.target
    assert wanted is not None
    config, tokens = source.config, _tokens(source.config, request, calibration)
    parameters = layout.parameter_count(config)
    # A target beyond what the model can take is refused for that, a little later.
    output_bytes = min(wanted.total_bytes(parameters), 2 * parameters)
    # Scales are calibrated in 32 bits, which makes codes up to a quarter larger.
    codes_bytes = output_bytes * 5 // 4 if request.method == "gptq" else 0
    kept = max(
        allocation.kept_bytes(config, tokens, codes_bytes),
        evaluate.kept_bytes(config, calibration.judged)
        + (codes_bytes + calibrate.kept_bytes(config, tokens) if codes_bytes else 0),
    )
    return output_bytes, kept


def space_for_plan(plan: Plan, calibration: Calibration) -> tuple[int, int]:
    """The same for a plan that calibrates on little text."""
    config = plan.source.config
    tokens = _tokens(config, plan.request, calibration)
    measured = max(
        evaluate.kept_bytes(config, calibration.judged),
        held_out_comparison.kept_bytes(config, plan.weight_bytes * 5 // 4),
    )
    return plan.weight_bytes, measured + calibrated.kept_bytes(plan, tokens)


def _tokens(config: ModelConfig, request: Request, calibration: Calibration) -> int:
    """To calibrate on, with those that the original writes."""
    windows = calibration.sample.windows
    own = Tuning.on(config, windows).own_tokens if request.tune else 0
    return windows.size + own
