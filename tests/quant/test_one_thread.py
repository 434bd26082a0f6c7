"""What is small is computed on one thread of BLAS, and only that."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from apertus_mlx.quant import annealing, descent, gptq, groupwise, search
from apertus_mlx.quant.columns import Columns
from apertus_mlx.quant.curvature import Curvature
from apertus_mlx.quant.spec import QuantSpec
from tests.quant.test_gptq import correlated, gaussian

SPEC = QuantSpec(2, 64)
Fit = Callable[[np.ndarray, Columns, Curvature], object]


def threads() -> set[int]:
    """How many threads each BLAS would use now."""
    return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}


def in_groups(target: np.ndarray, _: Columns, curvature: Curvature) -> Columns:
    grouped = curvature.in_groups(SPEC.group_size)
    assert grouped is not None
    return groupwise.fit_in_groups(target, SPEC, grouped, "BF16")


@pytest.mark.skipif(not threads(), reason="NumPy's products come from a library of the system")
@pytest.mark.parametrize(
    ("module", "fit"),
    [
        (descent, descent.improve),
        (descent, annealing.anneal),
        (groupwise, in_groups),
        (gptq, gptq.round_in_order),
    ],
)
def test_groups_use_one_thread(
    module: ModuleType, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    curvature = Curvature.of(correlated(128).astype(np.float32))
    target = np.ascontiguousarray(gaussian((16, 128)).T)
    start = search.fit_columns(target, SPEC, curvature.diagonal, "BF16")
    settle, seen = module.settle, []

    def watched(*given: object) -> object:
        seen.append(threads())
        return settle(*given)

    monkeypatch.setattr(module, "settle", watched)
    with threadpool_limits(limits=2, user_api="blas"):
        fit(target, start, curvature)
        assert threads() == {2}
    assert seen and all(each == {1} for each in seen)
