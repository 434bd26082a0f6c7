"""`apertus-mlx models`: the released models and those on this disk, and which of them fit here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from apertus_mlx.cli.options import JsonOption
from apertus_mlx.cli.output import Table, print_report
from apertus_mlx.cli.progress import show_progress
from apertus_mlx.cli.sink import note
from apertus_mlx.errors import ApertusError, UsageError
from apertus_mlx.generation.options import Offline
from apertus_mlx.system.arguments import Option, Range
from apertus_mlx.system.sizes import counted, format_bytes

if TYPE_CHECKING:
    from apertus_mlx.checkpoint.inventory import Inventory

DEFAULT_CONTEXT = 4096


def models(
    *,
    download: Annotated[str | None, Option("Download this model.", metavar="ID")] = None,
    remove: Annotated[
        str | None, Option("Remove this model from the Hub's cache.", metavar="ID")
    ] = None,
    yes: Annotated[bool, Option("Remove without a question.")] = False,
    context: Annotated[
        int, Option("Tokens of prompt and answer to plan for.", Range(1, 2**31))
    ] = DEFAULT_CONTEXT,
    device: Annotated[
        str | None, Option("Plan for iphone-15-pro, 6GB, ...; default: this machine.")
    ] = None,
    offline: Offline = False,
    json: JsonOption = False,
) -> None:
    """List the released models and those on this disk: download, memory, whether they fit.

    On this disk are models in the Hub's cache and what `convert` wrote into the current folder.
    """
    if download is not None and remove is not None:
        raise UsageError("--remove: leave out --download; one at a time")
    if download is not None:
        _download(download, offline, json)
    elif remove is not None:
        _remove(remove, yes, json)
    else:
        place = _Place(device, context)
        found = list(_list(place))
        print_report(json, lambda: _as_json(place, found), lambda: _words(place, found))


@dataclass(frozen=True, slots=True)
class _Listed:
    model: str
    released: bool
    # Where it is on this disk and what it takes there.
    directory: str | None
    disk_bytes: int | None
    download_bytes: int | None
    download_is_estimate: bool
    # The peak of a run with the settings that fit or, if none does, with the most frugal ones.
    memory_bytes: int | None
    fits: bool | None
    # Why it cannot be planned for.
    problem: str | None


class _Place:
    """Where the models shall run, and with how many tokens."""

    def __init__(self, device: str | None, context: int) -> None:
        from apertus_mlx.generation.memory_plan import find_device

        self.context = context
        self.device, self._on_gpu, self._cpu = find_device(device)

    def memory(self, inventory: Inventory) -> tuple[int, bool]:
        """Bytes that a run takes, and whether there are so many."""
        from apertus_mlx.errors import ResourceError
        from apertus_mlx.memory.fit import PREFILL_STEPS, fit, possible_forms
        from apertus_mlx.memory.footprint import choose_backend, footprint

        context = min(self.context, inventory.config.max_position_embeddings)
        backend = choose_backend(
            inventory, self._on_gpu, cpu=self._cpu, is_card=self.device.is_card
        )
        try:
            found = fit(inventory, self.device.memory_bytes, context, backend)
        except ResourceError:
            form = possible_forms(inventory.config)[-1]
            least = footprint(inventory, form, context, PREFILL_STEPS[-1], backend)
            return least.total_bytes, False
        return found.footprint.total_bytes, True


def _list(place: _Place) -> Iterator[_Listed]:
    from apertus_mlx.convert.write.manifest import MANIFEST
    from apertus_mlx.hub.apertus_models import (
        RELEASED,
        cached_models,
        expected_download_bytes,
        expected_inventory,
        is_estimate,
    )
    from apertus_mlx.hub.demo import model_dir

    cached = {model.repo_id: model for model in cached_models()}
    for repo_id in [*RELEASED, *(name for name in cached if name not in RELEASED)]:
        released, on_disk = repo_id in RELEASED, cached.get(repo_id)
        if on_disk is not None and on_disk.directory is not None:
            yield _on_disk(place, repo_id, on_disk.directory, on_disk.size_bytes, released)
        elif released:
            memory_bytes, fits = place.memory(expected_inventory(repo_id))
            download = expected_download_bytes(repo_id), is_estimate(repo_id)
            held = None if on_disk is None else on_disk.size_bytes
            yield _Listed(repo_id, True, None, held, *download, memory_bytes, fits, None)
        elif on_disk is not None:
            problem = f"{repo_id}: its download is unfinished"
            yield _Listed(
                repo_id, False, None, on_disk.size_bytes, None, False, None, None, problem
            )
    for folder in sorted(path.parent for path in Path().glob(f"*/{MANIFEST}")):
        yield _on_disk(place, str(folder), folder, _size(folder), released=False)
    yield _on_disk(place, "embedded", model_dir(), _size(model_dir()), released=False)


def _on_disk(place: _Place, name: str, directory: Path, disk_bytes: int, released: bool) -> _Listed:
    from apertus_mlx.checkpoint.inventory import take_inventory

    memory_bytes = fits = problem = None
    try:
        memory_bytes, fits = place.memory(take_inventory(directory, name))
    except ApertusError as error:
        problem = str(error)
    where = str(directory)
    return _Listed(name, released, where, disk_bytes, 0, False, memory_bytes, fits, problem)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _as_json(place: _Place, found: list[_Listed]) -> dict[str, Any]:
    return {
        "device": place.device.name,
        "limit_bytes": place.device.memory_bytes,
        "context": place.context,
        "models": [asdict(each) for each in found],
    }


def _words(place: _Place, found: list[_Listed]) -> Iterator[str | Table]:
    yield Table(["model", "on disk", "download", "memory", "fits"], [_row(each) for each in found])
    yield ""
    yield (
        f"memory: peak of a run with {counted(place.context, 'token')} of context; "
        f"{place.device.name}: {format_bytes(place.device.memory_bytes)} for the process; "
        "~ is an estimate"
    )
    for each in found:
        if each.problem is not None:
            yield each.problem


def _row(each: _Listed) -> list[str]:
    def size(size_bytes: int | None, sign: str = "") -> str:
        return f"{sign}{format_bytes(size_bytes)}" if size_bytes else "-"

    fits = {True: "yes", False: "no", None: "-"}[each.fits]
    sign = "~" if each.download_is_estimate else ""
    return [
        each.model, size(each.disk_bytes), size(each.download_bytes, sign),
        size(each.memory_bytes), fits,
    ]  # fmt: skip


def _download(repo_id: str, offline: bool, json: bool) -> None:
    from apertus_mlx.hub import resolve

    with show_progress() as progress:
        snapshot = resolve(repo_id, offline=offline, progress=progress)
    values = {"model": repo_id, "directory": str(snapshot.directory), "commit": snapshot.commit}
    print_report(json, lambda: values, lambda: [values["directory"]])


def _remove(repo_id: str, yes: bool, json: bool) -> None:
    from apertus_mlx.hub.apertus_models import find_cached, remove_cached

    model = find_cached(repo_id)
    if not yes and not _is_agreed(f"remove {repo_id} ({format_bytes(model.size_bytes)})? [y/N]"):
        raise UsageError(f"--remove {repo_id}: nothing is removed; --yes answers the question")
    values: Mapping[str, Any] = {"model": repo_id, "freed_bytes": remove_cached(model)}
    print_report(
        json,
        lambda: values,
        lambda: [f"{repo_id}: removed, {format_bytes(values['freed_bytes'])} freed"],
    )


def _is_agreed(question: str) -> bool:
    """Ask a person; without one there is no answer."""
    import sys

    if not sys.stdin or not sys.stdin.isatty():
        return False
    note(question)
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        return False
