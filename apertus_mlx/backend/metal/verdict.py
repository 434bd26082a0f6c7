"""What `apertus-mlx doctor` found out about the kernels on a machine, kept in the user's cache."""

from __future__ import annotations

import fcntl
import json
import logging
import platform
import plistlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from apertus_mlx import __version__
from apertus_mlx.backend.hardware import device_name
from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.errors import RejectedError, ResourceError
from apertus_mlx.system.model_files import read_own_file
from apertus_mlx.system.strict_json import parse_object
from apertus_mlx.system.user_folders import CACHE_VARIABLE, cache_folder
from apertus_mlx.system.whole_file import whole_file

FILE_NAME, LOCK_NAME = "kernels.json", "doctor.lock"
# Raised whenever the meaning of the file changes; others count as no verdict.
FORMAT = 1
MAX_VERDICTS = 64
MACOS_VERSION = Path("/System/Library/CoreServices/SystemVersion.plist")

_log = logging.getLogger(__name__)
_Type = TypeVar("_Type")


@dataclass(frozen=True, slots=True)
class Machine:
    """What a verdict holds for: anywhere else a kernel may fail or be slow."""

    chip: str
    system: str
    mlx: str
    package: str

    def __str__(self) -> str:
        return f"{self.chip}, {self.system}, MLX {self.mlx}, apertus-mlx {self.package}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known about the kernels of one model on one machine."""

    machine: Machine
    # Of all kernels that the model could use; see `text_hash`.
    texts: str
    # What the doctor was asked about, for people.
    model: str
    date: str
    # Whether the kernels were timed; those of an untimed verdict stay off.
    tuned: bool
    # Place -> keys of the kernels that may stand there, the best first.
    accepted: dict[str, tuple[str, ...]]
    # Key -> why it stays off.
    rejected: dict[str, str]
    # Whether a compiled step is faster; None if that was not tried.
    compiled_step: bool | None


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a model may use: place -> kernel, and whether its step is faster compiled."""

    kernels: Mapping[str, Kernel]
    compiled_step: bool


NOTHING = Accepted({}, False)


def this_machine() -> Machine:
    """The identity of this machine; asks neither the GPU nor another process."""
    return Machine(device_name(), _system(), version("mlx"), __version__)


def _system() -> str:
    if sys.platform == "darwin":
        try:
            found = plistlib.loads(MACOS_VERSION.read_bytes())
            return f"macOS {found['ProductVersion']} ({found['ProductBuildVersion']})"
        except (OSError, ValueError, KeyError):
            pass
    return f"{platform.system()} {platform.release()}"


def text_hash(kernels: Sequence[Kernel]) -> str:
    """A hash of the kernels' keys and texts; their order does not matter."""
    texts = sorted([kernel.key, *map(str, asdict(kernel.text()).values())] for kernel in kernels)
    return sha256(json.dumps(texts).encode()).hexdigest()


def find_verdict(machine: Machine, kernels: Sequence[Kernel]) -> Verdict | None:
    """The stored verdict on `kernels` on `machine`; a damaged file counts as none, with a note."""
    try:
        verdicts = _read()
    except RejectedError as error:
        _log.warning("kernels are off: %s; `apertus-mlx doctor --tune` writes it anew", error)
        return None
    except ResourceError:  # no folder in which one could be
        return None
    here = [verdict for verdict in verdicts if verdict.machine == machine]
    if not here and (tuned := [verdict for verdict in verdicts if verdict.tuned]):
        _log.warning(
            "kernels are off: proved on %s, but this is %s; run `apertus-mlx doctor --tune`",
            *(tuned[-1].machine, machine),
        )
    texts = text_hash(kernels) if here else ""
    return next((verdict for verdict in here if verdict.texts == texts), None)


def find_accepted(machine: Machine, kernels: Sequence[Kernel]) -> Accepted:
    """What of `kernels` was proved right and fast on `machine`: of each place the best."""
    verdict = find_verdict(machine, kernels) if kernels else None
    if verdict is None or not verdict.tuned:
        return NOTHING
    by_key = {(kernel.place, kernel.key): kernel for kernel in kernels}
    chosen = {
        place: by_key[place, keys[0]]
        for place, keys in verdict.accepted.items()
        if keys and (place, keys[0]) in by_key
    }
    return Accepted(chosen, bool(verdict.compiled_step))


def store_verdict(verdict: Verdict) -> Path:
    """Put `verdict` in place of an older one; call under `only_doctor`. Returns the file.

    Raises:
        ResourceError: the file cannot be written.
    """
    path = cache_folder() / FILE_NAME
    try:
        others = [
            other
            for other in _read()
            if (other.machine, other.texts) != (verdict.machine, verdict.texts)
        ]
    except RejectedError as error:
        _log.warning("%s; written anew", error)
        others = []
    kept = [*others, verdict][-MAX_VERDICTS:]
    text = json.dumps({"format": FORMAT, "verdicts": [asdict(one) for one in kept]}, indent=1)
    try:
        with whole_file(path) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _not_written(path, error) from None
    return path


def forget_verdicts() -> Path:
    """Remove every verdict; call under `only_doctor`. Returns the file that was."""
    path = cache_folder() / FILE_NAME
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _not_written(path, error) from None
    return path


@contextmanager
def only_doctor() -> Iterator[None]:
    """Keep other doctors out: they would overwrite this one's verdict and disturb its times.

    Raises:
        ResourceError: another is at work, or the cache folder cannot be written.
    """
    path = cache_folder() / LOCK_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise _not_written(path, error) from None
    with file:
        try:
            # The system frees it when this process ends, however that happens.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResourceError(
                f"{path}: another doctor is at work; wait until it is done"
            ) from None
        yield


def _not_written(path: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"{path}: cannot be written ({error.strerror}); {CACHE_VARIABLE} names another folder"
    )


def _read() -> list[Verdict]:
    """All verdicts; none if there is no file."""
    path = cache_folder() / FILE_NAME
    if not path.exists():
        return []
    content = parse_object(read_own_file(path), str(path))
    if content.get("format") != FORMAT or content.keys() != {"format", "verdicts"}:
        raise RejectedError(f"{path}: not a verdict of this version of apertus-mlx")
    try:
        return [_parse(entry) for entry in _checked(content["verdicts"], list)]
    except ValueError as error:
        raise RejectedError(f"{path}: damaged ({error})") from None


def _parse(entry: object) -> Verdict:
    values = _record(entry, Verdict)
    compiled = values["compiled_step"]
    return Verdict(
        machine=Machine(**_texts(_record(values["machine"], Machine))),
        texts=_checked(values["texts"], str),
        model=_checked(values["model"], str),
        date=_checked(values["date"], str),
        tuned=_checked(values["tuned"], bool),
        accepted={
            place: tuple(_checked(key, str) for key in _checked(keys, list))
            for place, keys in _checked(values["accepted"], dict).items()
        },
        rejected=_texts(_checked(values["rejected"], dict)),
        compiled_step=None if compiled is None else _checked(compiled, bool),
    )


def _record(entry: object, form: type) -> dict[str, Any]:
    record = _checked(entry, dict)
    if record.keys() != {field.name for field in fields(form)}:
        raise ValueError(f"{form.__name__.lower()} has other keys")
    return record


def _texts(entry: Mapping[str, object]) -> dict[str, str]:
    return {key: _checked(value, str) for key, value in entry.items()}


def _checked(value: object, expected: type[_Type]) -> _Type:
    if not isinstance(value, expected):
        raise ValueError(f"{type(value).__name__} where a {expected.__name__} should be")
    return value
