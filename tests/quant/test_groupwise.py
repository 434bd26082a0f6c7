"""GPTQ group by group: beside a float64 reference that inverts, and beside scales found before."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.quant import descent, gptq, groupwise, search
from apertus_mlx.quant.affine import AffineCodes
from apertus_mlx.quant.curvature import Curvature
from apertus_mlx.quant.spec import QuantSpec
from tests.quant.test_gptq import correlated, curvature_of, gaussian, total


def grouped(columns: int, size: int) -> Curvature:
    found = curvature_of(columns).in_groups(size)
    assert found is not None
    return found


@pytest.mark.parametrize("size", [32, 64])
def test_the_factor_by_groups_beside_float64(size: int) -> None:
    curvature = grouped(320, size)
    groups = curvature.order.reshape(-1, size) // size
    assert (groups == groups[:, :1]).all()
    assert sorted(curvature.order) == list(range(320))
    moments = curvature.moments.astype(np.float64)
    factor = np.linalg.cholesky(moments[np.ix_(curvature.order, curvature.order)])
    assert np.abs(np.tril(curvature.factor) - factor).max() < 1e-4 * np.abs(factor).max()
    assert curvature.left == pytest.approx((np.diag(factor) ** 2).sum(), rel=1e-4)
    means = np.diag(moments).reshape(-1, size).mean(1)
    assert (np.diff(means[groups[:, 0]]) >= 0).all()


def reference(weight: np.ndarray, spec: QuantSpec, curvature: Curvature) -> AffineCodes:
    """After each group the rest solves least squares anew: inverses of what remains, in float64.

    Only what is done inside a group is the package's.
    """
    size, moments = spec.group_size, curvature.moments.astype(np.float64)
    left, remaining = weight.astype(np.float64), list(curvature.order)
    codes = np.zeros(weight.shape, np.uint8)
    scales, biases = (np.zeros((len(weight), weight.shape[1] // size), np.float32) for _ in "sb")
    while remaining:
        columns = remaining[-size:]
        inverse = np.linalg.inv(moments[np.ix_(remaining, remaining)])
        # What the errors of this group cost once all that remain have made up for them.
        own = np.linalg.inv(inverse[-size:, -size:])
        wanted = np.ascontiguousarray(left[:, columns].T, np.float32)
        start = search.fit_columns(
            wanted, spec, np.diag(own).astype(np.float32), "BF16", search.QUICK
        )
        # Column by column: the last first, the others solve anew.
        found, values = np.zeros_like(wanted), wanted.astype(np.float64)
        for column in reversed(range(size)):
            form = start.scales[0].astype(np.float64), start.biases[0]
            found[column] = np.clip(np.rint((values[column] - form[1]) / form[0]), 0,
                                    (1 << spec.bits) - 1)  # fmt: skip
            off = values[column] - (found[column] * form[0] + form[1])
            part = np.linalg.inv(own[: column + 1, : column + 1])
            values[: column + 1] -= part[:, -1:] / part[-1, -1] * off
        here, form = found, (start.scales[0], start.biases[0])
        curve = own.astype(np.float32)
        for _ in range(groupwise.VISITS):
            off = here * form[0] + form[1] - wanted
            here, *pair, _ = descent.visit(curve, curve @ off, here, form, "BF16", spec.bits)
            form = (pair[0], pair[1])
        errors = wanted - (here * form[0] + form[1])
        left[:, remaining] -= (inverse[:, -size:] @ own @ errors).T
        codes[:, columns] = here.T
        group = columns[0] // size
        scales[:, group], biases[:, group] = form
        remaining = remaining[:-size]
    return AffineCodes(codes, scales, biases, spec)


@pytest.mark.parametrize(("bits", "size"), [(2, 32), (4, 64)])
def test_beside_a_reference_that_solves_anew(bits: int, size: int) -> None:
    weight, spec, curvature = gaussian((24, 192)), QuantSpec(bits, size), grouped(192, size)
    expected = reference(weight, spec, curvature)
    found = groupwise.fit_in_groups(weight.T, spec, curvature, "BF16").as_codes()
    # float32 may fall on the other side of a tie, and what follows then differs.
    assert (found.codes == expected.codes).mean() >= 0.9
    moments = curvature.moments.astype(np.float64)
    errors = [total(weight, codes, moments) for codes in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_that_fit_what_is_rounded_leave_less(bits: int) -> None:
    """Than scales found before, for the same moments; columns differ little."""
    draw = np.random.default_rng(0)
    inputs = draw.standard_normal((900, 256))
    inputs[:, 1:] += 0.5 * inputs[:, :-1]
    curvature = Curvature.of((inputs.T @ inputs).astype(np.float32))
    groups = curvature.in_groups(64)
    assert groups is not None
    weight, spec = gaussian((48, 256)), QuantSpec(bits, 64)
    start = search.fit_columns(weight.T, spec, curvature.diagonal, "BF16")
    before = gptq.round_in_order(weight.T, start, curvature).as_codes()
    found = groupwise.fit_in_groups(weight.T, spec, groups, "BF16").as_codes()
    moments = curvature.moments.astype(np.float64)
    assert total(weight, found, moments) < 0.96 * total(weight, before, moments)


def test_mlx_and_numpy_agree() -> None:
    """In float32: objectives within 0.5 %, nearly all codes."""
    spec, results = QuantSpec(3, 64), []
    for array in (np.array, mx.array):
        curvature = Curvature.of(array(correlated(128).astype(np.float32))).in_groups(64)
        assert curvature is not None
        target = array(np.ascontiguousarray(gaussian((48, 128)).T))
        results.append(groupwise.fit_in_groups(target, spec, curvature, "BF16").as_codes())
    moments = grouped(128, 64).moments.astype(np.float64)
    errors = [total(gaussian((48, 128)), result, moments) for result in results]
    assert errors[1] == pytest.approx(errors[0], rel=0.005)
    assert (results[0].codes == results[1].codes).mean() >= 0.9
