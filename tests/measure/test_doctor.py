"""The doctor on a simulated device: faulty kernels stay off, and only those that gain come on."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from apertus_mlx.backend.metal import enabled, verdict
from apertus_mlx.backend.metal.compiled_step import CompiledStep
from apertus_mlx.backend.metal.fused import FusedStep
from apertus_mlx.backend.metal.needed import kernels_for
from apertus_mlx.backend.metal.verdict import Verdict
from apertus_mlx.backend.mlx import load_inventory
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.errors import RejectedError
from apertus_mlx.measure.doctor import visit as visits
from apertus_mlx.measure.doctor.attended import AttendedDevice
from apertus_mlx.measure.doctor.chain import Chain, linked
from apertus_mlx.measure.doctor.consult import consult, keys_of
from apertus_mlx.measure.doctor.device import Agreement, Attempt, UnfitError
from apertus_mlx.measure.doctor.measure import REPEATS, measure
from apertus_mlx.measure.doctor.mlx_device import MLXDevice
from apertus_mlx.measure.doctor.race import ROUNDS, race
from apertus_mlx.measure.doctor.visit import conclude, trace
from apertus_mlx.system.user_folders import CACHE_VARIABLE
from tests import metal_harness
from tests.builders import config_4x, random_weights, write_checkpoint
from tests.commands import in_process, refusal
from tests.simulated_device import (
    AGREED,
    HANG_S,
    Double,
    Simulated,
    Unlaunched,
    attended,
    broken,
    make_verdict,
    run_doctor,
    singles,
)


def reasons(device: Any, kernels: Sequence[Double], **options: Any) -> dict[str, str | None]:
    done = consult(device, kernels, options.pop("with_times", False), **options)
    return {kernel.variant: done.reasons.get(kernel.key) for kernel in kernels}


def test_every_fault_is_found() -> None:
    kernels = singles("wrong", "slightly wrong", "unstable", "not a number", "good")
    found = reasons(Simulated(), kernels)
    assert found.pop("good") is None
    for part, reason in zip(("wrong:", "wrong:", "unstable:", "not finite"), found.values(),
                            strict=True):  # fmt: skip
        assert reason is not None and reason.startswith(part)
    assert "e-06, at most 1.0e-06" in str(found["slightly wrong"])


def test_other_processes_take_the_blame() -> None:
    """What crashes, hangs or leaves its process is named; the others get their turn."""
    variants = ("good", "aborts", "refused", "hangs", "misshapen", "leaves", "also good")
    with attended(*variants, limit_s=HANG_S) as device:
        found = reasons(device, singles(*variants))
    assert found["good"] is None and found["also good"] is None
    assert "SIGABRT" in str(found["aborts"])
    assert "Unable to build metal library" in str(found["refused"])
    assert "no answer within 4 s" in str(found["hangs"])
    assert "shapes [(1, 64)]" in str(found["misshapen"])
    assert "code 3" in str(found["leaves"]) and "out of cheese" in str(found["leaves"])


def test_everything_goes_through_the_pipe() -> None:
    kernels = singles("good", "fine")
    with attended("good", "fine") as device:
        done = consult(device, kernels, with_times=True)
    assert done.running == {kernel.place: kernel for kernel in kernels}
    assert done.agreement == AGREED
    assert done.model_race is not None and done.model_race.ratio == pytest.approx(0.8)
    assert done.compilation_race is not None
    assert done.compilation_race.ratio == pytest.approx(0.9)


def test_a_device_that_does_not_start() -> None:
    with (
        AttendedDevice([sys.executable, "-c", "raise SystemExit('no such chip')"]) as device,
        pytest.raises(RejectedError, match=r"does not start: .*no such chip"),
    ):
        device.attempt(Double())


def test_only_what_gains_in_every_round_comes_on() -> None:
    kernels = [
        Double("a", "usual"),
        Double("a", "better"),
        Double("b", "slower"),
        Double("c", "all but one"),
        Double("d", "barely"),
    ]
    device = Simulated(
        {
            "a-usual": [0.9] * 5,
            "a-better": [0.8, 0.7, 0.97, 0.7, 0.7],
            "b-slower": [1.2] * 5,
            "c-all but one": [0.5, 0.5, 0.5, 0.99, 0.5],
            "d-barely": [0.981] * 5,
        }
    )
    done = consult(device, kernels, with_times=True)
    assert keys_of(done.accepted) == {"a": ("a-better", "a-usual")}
    assert done.running == {"a": kernels[1]}
    assert [result.state for result in done.results()] == ["spare", "on", "off", "off", "off"]
    assert "1.20" in done.reasons["b-slower"] and "0.99" in done.reasons["c-all but one"]
    # Who has lost a round need not run the others.
    assert device.calls == {"a-usual": 10, "a-better": 10, "b-slower": 2, "c-all but one": 8,
                            "d-barely": 2}  # fmt: skip
    assert "kernels are on in 1 of 4 places; a token takes 0.90" in conclude(done, "doctor")


def test_rounds_are_abba() -> None:
    order: list[str] = []

    def timed(name: str) -> float:
        order.append(name)
        return 1.0 if name == "A" else 0.5

    found = race(lambda: timed("B"), lambda: timed("A"), 0.98)
    assert "".join(order) == "AB" + ROUNDS * "ABBA"
    assert found.won and found.ratios == (0.5,) * ROUNDS


def test_a_time_that_cannot_be_taken_wins_nothing() -> None:
    def crashes() -> float:
        raise UnfitError("ends its process (SIGABRT)")

    found = race(crashes, lambda: 1.0, 0.98)
    assert not found.won and found.reason == "ends its process (SIGABRT)"
    assert not race(lambda: float("nan"), lambda: 1.0, 0.98).won
    assert not race(lambda: 1.0, lambda: 0.0, 0.98).won


def test_without_times_nothing_comes_on() -> None:
    done = consult(Simulated(), singles("good", "wrong"), with_times=False)
    assert done.running == {}
    assert keys_of(done.accepted) == {"place 0": ("place 0-good",)}
    line = conclude(done, "apertus-mlx doctor my-model")
    assert line.startswith("kernels are off: 1 of 2 are right")
    assert line.endswith("apertus-mlx doctor my-model --tune")


def test_the_whole_model_has_the_last_word() -> None:
    off = Agreement(64, 64, 1e-3, 1e-9, 1e-4)
    done = consult(Simulated(found=off), singles("good", "fine"), with_times=True)
    assert done.running == {} and len(done.reasons) == 2
    assert "logits differ by 1.0e-03" in conclude(done, "doctor")

    device = Simulated(crashing=frozenset({"place 0"}))
    for with_times in (False, True):
        done = consult(device, singles("good", "fine"), with_times)
        assert list(done.accepted) == ["place 1"]
        assert done.reasons == {"place 0-good": "in the model: ends its process (SIGABRT)"}

    device = Simulated({"place 0-good": [0.6] * 5}, slowing=frozenset({"place 0"}))
    done = consult(device, singles("good", "fine"), with_times=True)
    assert list(done.running) == ["place 1"]
    assert "with the others" in done.reasons["place 0-good"]
    assert device.models == [{"place 0-good", "place 1-fine"}, {"place 1-fine"}]

    device = Simulated(slowing=frozenset({"place 0", "place 1"}))
    done = consult(device, singles("good", "fine"), with_times=True)
    assert done.running == {} and "as fast" in conclude(done, "doctor")


def test_near_ties_may_fall_differently() -> None:
    agreement = Agreement(64, 64, 1e-3, 1e-4, 5e-2)
    assert agreement.fault() is None
    assert replace(agreement, same=60).fault() is None
    assert "4 of 64" in str(replace(agreement, same=60, divergence=0.1).fault())
    nan = float("nan")
    assert replace(agreement, error=nan).fault() is not None
    assert replace(agreement, same=63, divergence=nan).fault() is not None


def test_the_plain_form_must_be_the_same_function() -> None:
    kernel = Double()
    attempt = Attempt(REPEATS, REPEATS, 5e-7, 5e-7, 5e-7)
    assert attempt.fault(kernel.tolerance) is None
    assert "plain form" in str(
        replace(attempt, plain_error=1e-2, difference=1e-2).fault(kernel.tolerance)
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    monkeypatch.delenv(enabled.SWITCH_VARIABLE, raising=False)
    return folder / verdict.FILE_NAME


def test_a_second_look_keeps_the_order() -> None:
    kernels = [Double("a", "usual"), Double("a", "better"), Double("b", "good")]
    ratios = {"a-usual": [0.9] * 5, "a-better": [0.8] * 5, "b-good": [1.1] * 5}
    first = consult(Simulated(ratios), kernels, with_times=True)
    known = make_verdict([kernels[0]], accepted=keys_of(first.accepted), rejected=first.reasons)
    again = consult(Simulated(), kernels, with_times=False, previous=known)
    assert again.running == first.running and again.reasons == first.reasons

    failed = Simulated()
    failed.attempt = lambda kernel: measure(  # type: ignore[method-assign]
        kernel, broken("wrong" if kernel.variant == "better" else "good")
    )
    again = consult(failed, kernels, with_times=False, previous=known)
    assert again.running == {"a": kernels[0]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer with 4-bit weights."""
    config = config_4x(num_hidden_layers=1, quantization={"group_size": 32, "bits": 4})
    weights: dict[str, Any] = dict(random_weights(config_4x(num_hidden_layers=1)))
    for name in [name for name, weight in weights.items() if weight.ndim == 2]:
        path = name.removesuffix(".weight")
        parts = mx.quantize(mx.array(weights[name]), group_size=32, bits=4)
        weights.update(zip((name, f"{path}.scales", f"{path}.biases"), parts, strict=True))
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), config, weights)


def test_enabled_asks_machine_verdict_and_switch(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory = take_inventory(tiny)
    model = (inventory.config, inventory.specs, mx.float32)
    kernels = kernels_for(*model)
    accepted = {kernels[0].place: (kernels[0].key,)}
    stored = Verdict(verdict.this_machine(), verdict.text_hash(kernels), "tiny", "", True, accepted,
                     {}, True)  # fmt: skip
    verdict.store_verdict(stored)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert enabled.enabled(*model) == verdict.NOTHING
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert enabled.enabled(*model) == verdict.Accepted({kernels[0].place: kernels[0]}, True)
    assert enabled.enabled(*model[:2], mx.bfloat16) == verdict.NOTHING
    monkeypatch.setenv(enabled.SWITCH_VARIABLE, "0")
    assert enabled.enabled(*model) == verdict.NOTHING
    monkeypatch.delenv(enabled.SWITCH_VARIABLE)
    verdict.store_verdict(replace(stored, tuned=False))
    assert enabled.enabled(*model) == verdict.NOTHING


@pytest.mark.nightly
@pytest.mark.skipif(metal_harness.missing() is not None, reason=str(metal_harness.missing()))
def test_real_kernels_pass_on_the_real_device(tiny: Path) -> None:
    """From the texts that Metal would get, which the harness runs, to the whole model."""
    inventory = take_inventory(tiny)
    kernels = kernels_for(inventory.config, inventory.specs, mx.float32)
    # The usual ones; tiles are other constants of the same text.
    usual = [kernel for kernel in kernels if "tile" not in kernel.key or "tile2x4" in kernel.key]
    chosen = [kernel for kernel in usual if "peaks" not in kernel.key and "best" not in kernel.key]
    device = MLXDevice(inventory, "float32", metal_harness.metal_kernel)
    done = consult(device, chosen, with_times=False)
    assert done.reasons == {}
    assert done.agreement is not None and done.disagreement is None
    assert done.agreement.same == done.agreement.tokens
    assert 0 < done.agreement.error < 1e-5


@pytest.mark.parametrize(("ratio", "pays"), [(0.9, True), (0.99, False), (1.2, False)])
def test_a_step_is_compiled_only_if_that_pays(ratio: float, pays: bool) -> None:
    done = consult(Simulated(compiled=ratio), singles("good"), with_times=True)
    assert done.compilation_race is not None and done.compilation_race.won is pays
    assert ("compiled step" in conclude(done, "doctor")) is pays


def test_a_compiled_step_that_is_wrong_stays_off() -> None:
    wrong = replace(AGREED, error=1e-2)
    kernels = singles("good")
    done = consult(Simulated(found_compiled=wrong), kernels, with_times=True)
    assert done.compilation_race is not None and not done.compilation_race.won
    assert done.running == {kernel.place: kernel for kernel in kernels}
    assert "the step is not compiled: logits differ by 1.0e-02" in conclude(done, "doctor")


def test_loading_uses_what_is_enabled(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inventory = take_inventory(tiny)
    kernels = kernels_for(inventory.config, inventory.specs, mx.float32)
    chosen = {kernel.place: kernel for kernel in reversed(kernels)}
    assert load_inventory(inventory, "float32")._step is None
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    found = verdict.Accepted(chosen, True)
    monkeypatch.setattr(enabled, "enabled", lambda *arguments: found)
    model = load_inventory(inventory, "float32")
    assert isinstance(model._step, CompiledStep) and isinstance(model._step._step, FusedStep)
    assert model.make_cache()[0].joined


def test_a_chain_depends_on_itself() -> None:
    kernel = Double()
    x, other = mx.arange(4.0), mx.arange(9)
    out = mx.arange(6.0).reshape(2, 3) + 10
    assert linked([x, other], [out])[0].tolist() == [10, 11, 12, 13]
    assert linked([x], [out[0]])[0].tolist() == [10, 11, 12, 13]
    assert linked([other, x], [out])[0].tolist() == other.tolist()
    chain = Chain(kernel, kernel.plain)
    assert all(chain.seconds(fused) < 1 for fused in (True, False))


def test_a_text_that_mlx_does_not_take() -> None:
    assert trace(Double()) is None
    assert "ValueError" in str(trace(Unlaunched()))


def test_on_the_command_line(tiny: Path, tmp_path: Path) -> None:
    done = run_doctor(APERTUS_MLX_KERNELS="0")
    text = done.stdout.decode()
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    for part in ("MLX 0.", "Python 3.", "memory", "float32 product: right",
                 "embedded in float32 has", "APERTUS_MLX_KERNELS=0"):  # fmt: skip
        assert part in text
    if not mx.metal.is_available():
        assert text.splitlines()[-1] == "no Metal: kernels stay off"
        assert "not checked" in text
    report = json.loads(run_doctor(str(tiny), "--json", "--tune").stdout)
    assert set(report) == {
        "machine", "products", "products_right", "model", "dtype", "kernels", "examined", "tuned",
        "agreement", "disagreement", "model_ratios", "compilation_ratios",
        "row_costs", "row_costs_stored", "switched_off", "conclusion", "stored",
    }  # fmt: skip
    assert len(report["row_costs"]) == 5 and report["row_costs"][0] == 1
    assert report["model"] == tiny.name and report["dtype"] == "float32"
    assert set(report["machine"]["identity"]) == {"chip", "system", "mlx", "package"}
    inventory = take_inventory(tiny)
    expected = kernels_for(inventory.config, inventory.specs, mx.float32)
    assert [kernel["key"] for kernel in report["kernels"]] == [kernel.key for kernel in expected]
    for kernel in report["kernels"]:
        assert set(kernel) == {"place", "key", "state", "reason", "tolerance", "attempt", "ratios"}
        if not mx.metal.is_available():
            assert (kernel["state"], kernel["reason"]) == ("unchecked", None)

    assert in_process("doctor", "--reset").returncode == 0
    refusal(in_process("doctor", "--reset", "--tune"), 2)
    refusal(in_process("doctor", tmp_path), 3)
    refusal(in_process("doctor", tmp_path / "absent"), 4)


def test_a_visit_with_metal(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way through a machine that says it has Metal, and has not: every kernel is refused."""
    inventory = take_inventory(tiny)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    report = visits.visit(inventory, "tiny", "float32", with_times=True)
    assert report.examined and report.tuned and report.stored
    assert {kernel.state for kernel in report.kernels} == {"off"}
    assert all("No Metal back-end" in str(kernel.reason) for kernel in report.kernels)
    assert report.conclusion == "kernels stay off: none of them is right on this machine"
    kernels = kernels_for(inventory.config, inventory.specs, mx.float32)
    found = verdict.find_verdict(verdict.this_machine(), kernels)
    assert found is not None and len(found.rejected) == len(kernels) and found.accepted == {}
