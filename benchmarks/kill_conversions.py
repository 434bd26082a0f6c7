"""Kills conversions and distillations at random moments (SIGKILL) and lets them go on.

    PYTHONPATH=.:tests python benchmarks/kill_conversions.py --kills 200 [--kinds gptq tuned]

Half of the moments are drawn over the duration of a whole run, the others come right after a random
line of progress. A run that was killed goes on with `--resume` until it is killed again or done.
After each kill there must be nothing under the final name, or the whole output, and nothing beside
`.OUT.partial`, in TMPDIR or in HOME; in the end the output must be, byte for byte, that of a run
that nobody killed. Prints counts as JSON; ends with 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from apertus_mlx.convert.check.verify import verify
from apertus_mlx.convert.distill import resources
from apertus_mlx.convert.write.workspace import partial_path
from tests.convert_builders import tree
from tests.resumable_work import KINDS, make_work


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed."""

    files: dict[str, bytes]
    duration_s: float
    lines: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--child", nargs=3, metavar=("KIND", "FOLDER", "TARGET"))
    arguments = parser.parse_args()
    if arguments.child:
        kind, folder, target = arguments.child
        # Many steps from little text.
        resources.BATCH_TOKENS = 128
        work = make_work(kind, Path(folder))
        work.run(Path(target), resume=True, progress=lambda line: print(line, flush=True))
        return
    with tempfile.TemporaryDirectory() as place:
        draw = random.Random(arguments.seed)
        counts, faults = kill_all(Path(place), arguments.kills, draw, arguments.kinds)
    print(json.dumps({"kills": counts, "faults": faults}, indent=2))
    sys.exit(bool(faults))


def kill_all(
    place: Path, kills: int, draw: random.Random, kinds: Sequence[str] = KINDS
) -> tuple[dict[str, int], list[str]]:
    """Kill until there are enough; returns how many there were of each kind, and what failed."""
    models = place / "models"
    models.mkdir()
    for kind in kinds:
        make_work(kind, models)
    homes = [place / name for name in ("home", "tmp")]
    for home in homes:
        home.mkdir()
    wholes = {kind: whole_run(kind, models, place) for kind in kinds}
    counts: Counter[str] = Counter()
    faults: list[str] = []
    number = 0
    while sum(counts.values()) < kills:
        kind = kinds[number % len(kinds)]
        target = place / f"round-{number}" / "out"
        target.parent.mkdir()
        number += 1
        while sum(counts.values()) < kills:
            if not killed(start(kind, models, target, place), wholes[kind], draw):
                break
            counts[kind] += 1
            faults += [f"{kind}: {fault}" for fault in left(target, wholes[kind], homes)]
            if target.exists() and not partial_path(target).exists():
                break
        if not target.exists() or partial_path(target).exists():
            child = start(kind, models, target, place)
            errors = child.communicate()[1]
            if child.returncode:
                faults.append(f"{kind}: {errors.decode().strip().splitlines()[-1]}")
        if not target.exists() or tree(target) != wholes[kind].files:
            faults.append(f"{kind}: another output than a whole run's")
        if [path.name for path in target.parent.iterdir()] != ["out"]:
            faults.append(f"{kind}: left {sorted(p.name for p in target.parent.iterdir())}")
        print(f"{kind}: {counts[kind]} kills", file=sys.stderr, flush=True)
    return dict(counts), faults


def whole_run(kind: str, models: Path, place: Path) -> Whole:
    target = place / f"whole-{kind}" / "out"
    target.parent.mkdir()
    began = time.monotonic()
    child = start(kind, models, target, place)
    lines, errors = child.communicate()
    if child.returncode:
        raise SystemExit(errors.decode())
    if verify(target).errors:
        raise SystemExit(f"{kind}: {verify(target).errors}")
    return Whole(tree(target), time.monotonic() - began, len(lines.splitlines()))


def start(kind: str, models: Path, target: Path, place: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, __file__, "--child", kind, str(models), str(target)],
        env={**os.environ, "HOME": str(place / "home"), "TMPDIR": str(place / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def killed(child: subprocess.Popen[bytes], whole: Whole, draw: random.Random) -> bool:
    """Kill the run at a random moment; whether it was still going."""
    if draw.random() < 0.5:
        with suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=draw.uniform(0, whole.duration_s))
    else:
        assert child.stdout is not None
        for _ in range(draw.randint(1, whole.lines)):
            if not child.stdout.readline():
                break
    child.send_signal(signal.SIGKILL)
    child.communicate()
    return child.returncode == -signal.SIGKILL


def left(target: Path, whole: Whole, homes: list[Path]) -> list[str]:
    """What a kill must not leave."""
    found = [f"left {path}" for home in homes for path in home.rglob("*")]
    allowed = {target.name, partial_path(target).name}
    found += [f"left {p.name}" for p in target.parent.iterdir() if p.name not in allowed]
    if target.exists() and tree(target) != whole.files:
        found.append("half an output under the final name")
    return found


if __name__ == "__main__":
    main()
