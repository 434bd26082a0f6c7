"""Answers that are kept in a file as they come, so that an interrupted run goes on.

A line is a JSON object: the digest of a model, that of a request, and the answer. It is written by
one call, so that a kill leaves at most one line unfinished, which is then ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from apertus_mlx.errors import ResourceError
from apertus_mlx.system.model_files import exists, read_own_file

MAX_FILE_BYTES = 4 * 2**30


class KeptAnswers:
    """The answers of one model; those of others in the same file are left alone.

    Args:
        path: the file, made where it is missing; None keeps nothing.
        model: a digest of what the answers depend on beside the request.

    Raises:
        ResourceError: the file cannot be written.
    """

    def __init__(self, path: Path | None, model: str) -> None:
        self._path, self._model = path, model
        self._found: dict[str, Any] = {}
        if path is None:
            return
        whole = True
        if exists(path):
            content = read_own_file(path, MAX_FILE_BYTES)
            whole = not content or content.endswith(b"\n")
            for line in content.splitlines():
                self._note(line)
        # What a kill has left unfinished must not swallow the next line.
        self._write(b"" if whole else b"\n")

    def find(self, request: str) -> Any:
        """The answer to the request of this digest; None where there is none."""
        return self._found.get(request)

    def keep(self, request: str, answer: Any) -> None:
        """Keep an answer.

        Raises:
            ResourceError: the file cannot be written.
        """
        self._found[request] = answer
        line = {"model": self._model, "request": request, "answer": answer}
        self._write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")

    def _note(self, line: bytes) -> None:
        try:
            value = json.loads(line)
            if value["model"] == self._model:
                self._found[str(value["request"])] = value["answer"]
        except (ValueError, KeyError, TypeError):
            return

    def _write(self, data: bytes) -> None:
        if self._path is None:
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            descriptor = os.open(self._path, flags, 0o666)
            try:
                os.write(descriptor, data)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ResourceError(f"{self._path}: {error.strerror}") from None


def digest(*parts: Any) -> str:
    """A digest of what JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
