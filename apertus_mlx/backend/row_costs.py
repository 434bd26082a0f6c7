"""What passes over several tokens cost on this machine, as `doctor --tune` measured it.

Kept in the user's cache, for each machine and each model's shapes, formats and type.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from apertus_mlx.backend.metal.verdict import Machine
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.checkpoint.layout import layer
from apertus_mlx.errors import RejectedError, ResourceError
from apertus_mlx.system.model_files import read_own_file
from apertus_mlx.system.strict_json import parse_object
from apertus_mlx.system.user_folders import CACHE_VARIABLE, cache_folder
from apertus_mlx.system.whole_file import whole_file

FILE_NAME = "row-costs.json"
# Raised whenever the meaning of the file changes; others count as nothing measured.
FORMAT = 1
MAX_ENTRIES = 64
MOST_ROWS = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RowCosts:
    """Costs of the products of one layer.

    Attributes:
        machine: where they were measured; they hold nowhere else.
        products: of what; see `products_of`.
        model: what the doctor was asked about, for people.
        date: when, for people.
        costs: of 1, 2, ... rows, beside one.
    """

    machine: Machine
    products: str
    model: str
    date: str
    costs: tuple[float, ...]


def products_of(inventory: Inventory, dtype: str) -> str:
    """A hash of what decides the costs: shapes and formats of the first layer, and the type."""
    first = f"{layer(0)}."
    found = sorted(
        [path.removeprefix(first), matrix.rows, matrix.columns, repr(matrix.spec)]
        for path, matrix in inventory.matrices.items()
        if path.startswith(first)
    )
    return sha256(json.dumps([dtype, found]).encode()).hexdigest()


def find_row_costs(machine: Machine, products: str) -> tuple[float, ...]:
    """What was stored; nothing if it is of another machine, or damaged, which a note says."""
    try:
        entries = _read()
    except RejectedError as error:
        _log.warning("%s; `apertus-mlx doctor --tune` writes it anew", error)
        return ()
    except ResourceError:  # no folder in which one could be
        return ()
    wanted = (machine, products)
    return next((e.costs for e in entries if (e.machine, e.products) == wanted), ())


def store_row_costs(entry: RowCosts) -> Path:
    """Put `entry` in place of an older one; call under `only_doctor`. Returns the file.

    Raises:
        ResourceError: the file cannot be written.
    """
    path = cache_folder() / FILE_NAME
    try:
        before = _read()
    except RejectedError as error:
        _log.warning("%s; written anew", error)
        before = []
    same = (entry.machine, entry.products)
    kept = [other for other in before if (other.machine, other.products) != same]
    entries = [asdict(one) for one in [*kept, entry][-MAX_ENTRIES:]]
    text = json.dumps({"format": FORMAT, "entries": entries}, indent=1)
    try:
        with whole_file(path) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written ({error.strerror}); {CACHE_VARIABLE} names another folder"
        ) from None
    return path


def forget_row_costs() -> None:
    """Remove the file; call under `only_doctor`.

    Raises:
        ResourceError: it cannot be removed.
    """
    path = cache_folder() / FILE_NAME
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be removed ({error.strerror})") from None


def _read() -> list[RowCosts]:
    path = cache_folder() / FILE_NAME
    if not path.exists():
        return []
    content = parse_object(read_own_file(path), str(path))
    if content.get("format") != FORMAT:
        raise RejectedError(f"{path}: not of this version of apertus-mlx")
    try:
        return [
            RowCosts(
                machine=Machine(**entry["machine"]),
                products=entry["products"],
                model=entry["model"],
                date=entry["date"],
                costs=_checked(entry["costs"]),
            )
            for entry in content["entries"]
        ]
    except (TypeError, KeyError, ValueError) as error:
        raise RejectedError(f"{path}: damaged ({error})") from None


def _checked(costs: Sequence[object]) -> tuple[float, ...]:
    found = tuple(float(cost) for cost in costs if isinstance(cost, int | float))
    sound = len(found) == len(costs) <= MOST_ROWS and found[:1] == (1.0,)
    if not sound or not all(math.isfinite(cost) and cost > 0 for cost in found):
        raise ValueError("costs are no numbers above 0, the first of them 1")
    return found
