"""What the system and libraries raise, by what it means to a user."""

from __future__ import annotations

import errno
import os
import sys

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.errors import (
    ApertusError,
    NotFoundError,
    RejectedError,
    ResourceError,
    UsageError,
)
from apertus_mlx.system.foreign_errors import explain


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
    assert ("not enough memory" in str(error)) == (code == errno.ENOMEM)
    assert code == errno.ENOMEM or "some/file" in str(error)


def test_memory_that_is_not_there() -> None:
    """As the libraries really say it, when asked for more than addresses can name."""
    for asked in (
        lambda: np.zeros((2**40, 2**8)),
        lambda: bytearray(2**62),
    ):
        with pytest.raises(MemoryError) as caught:
            asked()
        assert isinstance(explain(caught.value), ResourceError), caught.value


@pytest.mark.skipif(
    sys.platform != "darwin" or not mx.metal.is_available(),
    reason="on a processor MLX crashes instead",
)
def test_memory_that_metal_has_not() -> None:
    with pytest.raises(Exception, match=r".") as caught:
        mx.eval(mx.zeros((2**20, 2**18)))
    assert isinstance(explain(caught.value), ResourceError), caught.value


@pytest.mark.parametrize(
    "words",
    [
        "std::bad_alloc",
        "can't start new thread",
        "[METAL] Command buffer execution failed: Insufficient Memory "
        "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
        "[metal::malloc] Attempting to allocate 137438953472 bytes which is greater than the "
        "maximum allowed buffer size of 9534832640 bytes.",
    ],
)
def test_words_that_only_another_machine_says(words: str) -> None:
    assert isinstance(explain(RuntimeError(words)), ResourceError)


def test_a_library_that_another_one_needs() -> None:
    """As the loader says it of MLX for CUDA where there is no driver."""
    words = "libcuda.so.1: cannot open shared object file: No such file or directory"
    error = explain(ImportError(words))
    assert type(error) is NotFoundError
    assert "libcuda.so.1" in str(error)
    assert explain(ImportError("cannot import name 'x' from 'y'")) is None


@pytest.mark.parametrize(
    "words",
    [
        "Can not find locations of CUDA headers, please set environment variable CUDA_HOME.",
        "cudaSetDevice(device_) failed: CUDA driver version is insufficient for CUDA runtime "
        "version",
        "cudaGraphLaunch(handle_, stream) failed: no kernel image is available for execution on "
        "the device",
    ],
)
def test_a_library_for_another_card_or_driver(words: str) -> None:
    error = explain(RuntimeError(words))
    assert type(error) is NotFoundError
    assert "docs/cuda.md" in str(error)


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


def test_what_a_backend_lacks() -> None:
    """As MLX on a processor says it of a product of two quantized matrices."""
    with pytest.raises(RuntimeError) as caught:
        mx.eval(mx.qqmm(mx.ones((8, 64)), mx.ones((8, 64))))
    error = explain(caught.value)
    assert type(error) is UsageError
    assert "[QQMatmul]" in str(error)
    assert "--compute cpu" in str(error)


@pytest.mark.parametrize(
    "words",
    [
        "[quantized_matmul] No implementation for problem shape: 1x64x300x8, transpose: true,\n "
        'activation: float32, bits: 3, group size: 64, mode: "affine".',
        "[gather_qmm] No implementation for problem shape: 1x64x300x8.",
        "[Load::eval_gpu] Not implemented.",
        "Hadamard has no CUDA implementation.",
        "[quantized_matmul] 5-bit quantization is not supported.",
        "[SVD::eval_gpu] Metal SVD NYI.",
    ],
)
def test_what_only_another_backend_lacks(words: str) -> None:
    for kind in (RuntimeError, ValueError):
        error = explain(kind(words))
        assert type(error) is UsageError
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "words",
    [
        "[matmul] Last dimension of first input with shape (2,3) must match.",
        "[Primitive::vjp] Not implemented for Sort.",
        "[QuantizedMatmul::vmap] NYI",
        "tying of NYIs",
    ],
)
def test_what_is_wrong_on_every_backend_is_a_bug(words: str) -> None:
    assert explain(RuntimeError(words)) is None
    assert explain(NotImplementedError("not implemented")) is None
