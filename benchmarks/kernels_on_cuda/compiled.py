"""The kernels' text through Nvidia's compiler, for every kind of GPU that it knows; needs none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.kernels_on_cuda import trials

USED = re.compile(r"Used (\d+) registers")
SPILLED = re.compile(r"(\d+) bytes spill stores")


@dataclass(frozen=True, slots=True)
class Compiled:
    """What NVRTC says of a text for one kind of GPU; `log` is what it has against it."""

    registers: int
    spilled_bytes: int
    log: str | None = None


def compile_all(folder: Path) -> Iterator[tuple[bool, str]]:
    """For each kind of GPU whether all kernels of `folder` are right for it, and words."""
    if find_spec("cuda") is None:
        raise SystemExit("pip install cuda-bindings 'cuda-toolkit[nvrtc,cudart]==13.*'")
    nvrtc: Any = import_module("cuda.bindings.nvrtc")
    pathfinder: Any = import_module("cuda.pathfinder")
    headers = pathfinder.find_nvidia_header_directory("cudart")
    options = [*trials.OPTIONS, f"-I{folder}", f"-I{headers}", "--ptxas-options=-v"]
    for kind in _taken(nvrtc.nvrtcGetSupportedArchs()):
        found = {
            trial.key: compiled(
                nvrtc,
                (folder / f"{trial.index}.cu").read_text(),
                [*options, f"--gpu-architecture=sm_{kind}"],
            )
            for trial in trials.read(folder)
        }
        for key, each in found.items():
            if each.log is not None:
                yield False, f"sm_{kind}, {key}: {each.log}"
        whole = [each for each in found.values() if each.log is None]
        words = f"sm_{kind}: {len(whole)} of {len(found)} compile"
        if whole:
            words += f", {max(each.registers for each in whole)} registers at most"
            words += f", {sum(each.spilled_bytes for each in whole)} bytes spilled"
        yield len(whole) == len(found), words


def compiled(nvrtc: Any, text: str, options: list[str]) -> Compiled:
    """`text` compiled with `options`."""
    program = _taken(nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], []))
    try:
        refused = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )[0]
        said = bytearray(_taken(nvrtc.nvrtcGetProgramLogSize(program)))
        _taken(nvrtc.nvrtcGetProgramLog(program, said))
    finally:
        _taken(nvrtc.nvrtcDestroyProgram(program))
    log = said.decode().rstrip("\0\n ")
    used, spilled = USED.search(log), SPILLED.search(log)
    if refused != nvrtc.nvrtcResult.NVRTC_SUCCESS or used is None or spilled is None:
        return Compiled(0, 0, " ".join(log.split())[:300])
    return Compiled(int(used[1]), int(spilled[1]))


def _taken(answer: tuple[Any, ...]) -> Any:
    """What NVRTC gives beside its code, which is none of an error."""
    if answer[0] != 0:
        raise RuntimeError(f"NVRTC: {answer[0]}")
    return answer[1] if len(answer) > 1 else None
