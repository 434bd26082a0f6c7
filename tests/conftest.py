"""Fixtures that all tests share, and how examples are drawn."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

# Test processes run side by side, one per core; threads inside them would only get in the way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("APERTUS_MLX_THREADS", "1")
# Bounds are those of float32; MLX reads this at its first product.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# Whoever starts the tests in the background may have Ctrl-C ignored, by all that they start, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run; --hypothesis-seed tries others.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


_whole_run = ExitStack()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--simulated", choices=["card", "mac"], help="as on a GPU, see tests/simulated_gpu.py"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--simulated"):
        from tests.simulated_gpu import SIMULATED

        _whole_run.enter_context(SIMULATED[config.getoption("--simulated")]())


def pytest_unconfigure() -> None:
    _whole_run.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what is marked `without_gpu` where MLX computes on one."""
    from apertus_mlx.backend.hardware import has_gpu

    if has_gpu():
        left_out = pytest.mark.skip(reason="MLX computes on a GPU here")
        for item in items:
            if item.get_closest_marker("without_gpu"):
                item.add_marker(left_out)


def pytest_collection_finish() -> None:
    """Modules of all tests are no garbage: later collections need not look through them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def real_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the released tokenizers, v1 and v1.1, built once for all test processes."""
    from filelock import FileLock

    from tests.real_tokenizers import SHA256, tekken_path, write_real_tokenizers

    if tekken_path() is None:
        pytest.skip("mistral-common is not installed")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folders = {version: shared / f"tokenizer-{version}" for version in SHA256}
    with FileLock(shared / "real_tokenizers.lock"):
        write_real_tokenizers(folders)
    return folders


@pytest.fixture
def no_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of MLX as if no other test of this process had left a model open."""
    from apertus_mlx.backend import memory_limits

    monkeypatch.setattr(memory_limits, "_runs", [])
    monkeypatch.setattr(memory_limits, "_before", [])


@pytest.fixture
def compiling(request: pytest.FixtureRequest) -> Iterator[None]:
    """MLX compiles, as it does where no GPU is simulated."""
    import mlx.core as mx

    mx.enable_compile()
    yield
    if request.config.getoption("--simulated"):
        mx.disable_compile()
