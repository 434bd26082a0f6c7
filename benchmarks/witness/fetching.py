"""Fetches a package with apt's own client, checks its sum, and reads the files in it."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.witness.sources import Package


def fetch(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, downloaded unless it is there with the right sum.

    Raises:
        SystemExit: apt cannot fetch this version, or its sum is another.
    """
    path = folder / f"{package.name}.deb"
    if path.exists() and _sum(path) == package.sha256:
        return path
    if (client := shutil.which("apt-get")) is None:
        raise SystemExit(
            f"{package.name}: needs apt-get, of Debian 12; prepare the folder there "
            "(--prepare), and copy it here"
        )
    print(f"{package.name} {package.version}: downloading", file=sys.stderr, flush=True)
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    done = subprocess.run(
        [client, "download", "-q", f"{package.name}={package.version}"],
        cwd=partial, check=False, capture_output=True, text=True,
    )  # fmt: skip
    found = list(partial.glob("*.deb"))
    if done.returncode or len(found) != 1:
        said = (done.stderr.strip().splitlines() or ["nothing was downloaded"])[-1]
        raise SystemExit(
            f"{package.name} {package.version}: {said}; needs the lists of Debian 12 "
            "(apt-get update)"
        )
    if (sum_ := _sum(found[0])) != package.sha256:
        raise SystemExit(f"{package.name}: SHA-256 {sum_}, expected {package.sha256}")
    found[0].replace(path)
    partial.rmdir()
    return path


def files(path: Path) -> Iterator[tuple[str, bytes]]:
    """The regular files in a Debian package by their paths, those named .gz unpacked."""
    with tarfile.open(fileobj=io.BytesIO(_member(path.read_bytes(), b"data.tar"))) as archive:
        for entry in archive:
            if entry.isfile() and (file := archive.extractfile(entry)) is not None:
                data = file.read()
                if entry.name.endswith(".gz"):
                    data = gzip.decompress(data)
                yield entry.name.removeprefix("./"), data


def _member(archive: bytes, name: bytes) -> bytes:
    """The member of an `ar` archive whose name begins so."""
    position = 8
    while position < len(archive):
        header = archive[position : position + 60]
        size = int(header[48:58])
        if header.startswith(name):
            return archive[position + 60 : position + 60 + size]
        position += 60 + size + size % 2
    raise SystemExit(f"no {name.decode()} in the package")


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
