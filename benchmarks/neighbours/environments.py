"""Which virtual environment has which tools; each is built once, by pip, from pinned packages.

Tools exclude each other (transformers 4 and 5), so each group of them has an environment of its
own. It sees the packages of the Python that builds it, but for those that it has itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILT = "built.json"
# For packages without wheels, which want to see PyTorch while they are built.
BUILDING = ("setuptools==84.2.1", "wheel==0.47.0")


@dataclass(frozen=True)
class Environment:
    """A Python with some tools.

    Attributes:
        name: what the table calls it.
        modules: of this folder, which run in it.
        steps: arguments of `pip install`, one call after the other; none for the Python that runs.
    """

    name: str
    modules: tuple[str, ...]
    steps: tuple[tuple[str, ...], ...] = ()

    @property
    def packages(self) -> list[str]:
        """What is pinned for the tools themselves."""
        steps = [step for step in self.steps if step != BUILDING]
        return [word for step in steps for word in step if not word.startswith("-")]


ENVIRONMENTS = (
    Environment(
        "own", ("with_mlx_lm", "with_transformers", "with_compressed_tensors", "rebuilt")
    ),
    Environment(
        "transformers 4", ("with_transformers",), (("transformers==4.57.1", "accelerate==1.15.0"),)
    ),
    Environment(
        "GPTQModel and AutoRound", ("with_gptqmodel", "with_auto_round"),
        (("auto-round==0.16.1",), BUILDING, ("--no-build-isolation", "gptqmodel==7.7.0")),
    ),
    Environment(
        "AutoAWQ", ("with_autoawq",),
        (BUILDING, ("--no-build-isolation", "autoawq==0.2.9", "transformers==4.51.3")),
    ),
    Environment(
        "AutoGPTQ", ("with_autogptq",),
        (("auto-gptq==0.7.1", "transformers==4.51.3", "peft==0.15.2"),),
    ),
    Environment(
        "bitsandbytes", ("with_bitsandbytes",), (("bitsandbytes==0.50.2", "accelerate==1.15.0"),)
    ),
    Environment(
        "Unsloth", ("with_unsloth",),
        (("--no-deps", "unsloth==2026.10.9", "unsloth_zoo==2026.10.9"),),
    ),
)  # fmt: skip


def build(environment: Environment, folder: Path) -> Path:
    """The interpreter of an environment in `folder`, which is built unless it is there already.

    Raises:
        RuntimeError: pip cannot install it; with pip's own words.
    """
    if not environment.steps:
        return Path(sys.executable)
    place = folder / environment.name.replace(" ", "-")
    python, built = place / "bin" / "python", place / BUILT
    steps = json.dumps(environment.steps)
    if built.exists() and built.read_text() == steps:
        return python
    print(f"{environment.name}: building {place}", file=sys.stderr, flush=True)
    venv.create(place, clear=True, with_pip=True)
    [packages] = place.glob("lib/python*/site-packages")
    seen = [entry for entry in sys.path if "site-packages" in entry]
    (packages / "zz_seen.pth").write_text("\n".join(seen) + "\n")
    for step in environment.steps:
        call = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *step]
        done = subprocess.run(
            call, check=False, env=_surroundings(), capture_output=True, text=True
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.lower().startswith("error")]
            raise RuntimeError(f"pip install {' '.join(step)}: {(lines or ['failed'])[-1]}")
    built.write_text(steps)
    return python


def run(python: Path, module: str, corpus: Path) -> str | None:
    """Have the tool of a module write its folders; returns what its process died of, if it did."""
    call = [str(python), "-m", "benchmarks.neighbours.making", module, str(corpus)]
    last = ""
    with subprocess.Popen(
        call, env=_surroundings(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            sys.stderr.write(line)
            if re.match(r"\w*(Error|Exception)\b", line):
                last = line.strip()
    return (last or f"exit code {process.returncode}") if process.returncode else None


def _surroundings() -> dict[str, str]:
    """The CPU alone, and this repository first."""
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
