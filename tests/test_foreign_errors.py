"""What the system and libraries raise, by what it means to a user."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from apertus_mlx.errors import (
    ApertusError,
    NotFoundError,
    RejectedError,
    ResourceError,
    UsageError,
)
from apertus_mlx.foreign_errors import explain


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, ResourceError), (errno.EDQUOT, ResourceError), (errno.EROFS, ResourceError),
        (errno.EIO, ResourceError), (errno.ENOMEM, ResourceError), (errno.EMFILE, ResourceError),
        (errno.ESTALE, ResourceError), (errno.EACCES, ResourceError), (errno.EAGAIN, ResourceError),
        (errno.ENAMETOOLONG, UsageError), (errno.EILSEQ, UsageError), (errno.EISDIR, UsageError),
        (errno.ENOENT, NotFoundError), (errno.ELOOP, NotFoundError),
        (errno.ECONNREFUSED, NotFoundError),
    ],
)  # fmt: skip
def test_errors_of_the_system(code: int, kind: type[ApertusError]) -> None:
    error = explain(OSError(code, os.strerror(code), "some/file"))
    assert type(error) is kind
    assert "\n" not in str(error)
    assert code in (errno.ENOMEM, errno.EAGAIN) or "some/file" in str(error)


def test_memory_that_is_not_there() -> None:
    """As the libraries really say it, when asked for more than addresses can name."""
    for asked in (
        lambda: np.zeros((2**40, 2**8)),
        lambda: bytearray(2**62),
    ):
        with pytest.raises(MemoryError) as caught:
            asked()
        assert isinstance(explain(caught.value), ResourceError), caught.value
    assert isinstance(explain(RuntimeError("std::bad_alloc")), ResourceError)
    assert isinstance(explain(RuntimeError("can't start new thread")), ResourceError)


def test_names_that_are_no_text() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        "caf\udce9".encode()
    assert isinstance(explain(caught.value), UsageError)


def test_bugs_stay_bugs() -> None:
    for error in (
        ValueError("x"),
        KeyError("x"),
        OSError("x"),
        RuntimeError("x"),
        OSError(9999, ""),
    ):
        assert explain(error) is None
    assert explain(KeyboardInterrupt()) is None
    ours = RejectedError("x")
    assert explain(ours) is ours
