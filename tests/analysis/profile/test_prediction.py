from __future__ import annotations

from dataclasses import replace

import pytest
from profile_traces import costs, operation, times

from bptool.analysis.profile.kernel_rates import AttentionRate, AttentionShape, KernelRates, ProductRate
from bptool.analysis.profile.prediction import predict
from bptool.analysis.profile.roofline import Rates, gpu_rates
from bptool.gpus import GPUS

# Seconds at 100 FLOP/s and 10 bytes/s: 5 and 2 in the forward, 20 in the backward, 3 in the update.
STEP = costs(
    operation(flops=500, bytes_moved=10),
    operation("add", bytes_moved=20),
    operation(flops=2000, phase="backward", kind="dgrad"),
    operation("_fused_adamw_", pointwise_flops=100, bytes_moved=30, phase="optimizer", kind="optimizer"),
)


def rates(operation_s: float = 0.0, runs_ahead: bool = False) -> Rates:
    known = ("said so", "too", f"{operation_s} s for each")
    return Rates("a machine", {"float32": 100.0}, "float32", 10.0, operation_s, runs_ahead, 1.0, *known)


def test_phase_by_phase() -> None:
    found = predict(STEP, 60, rates(), None)
    assert {phase.phase: phase.predicted_s for phase in found.phases} == {"forward": 7, "backward": 20, "optimizer": 3}
    assert (found.step_s, found.units_per_s) == (30, 2)
    assert all(phase.measured_s is None and phase.relative_error is None for phase in found.phases)


def test_on_a_cpu_each_operations_own_time_adds() -> None:
    found = predict(STEP, 60, rates(operation_s=0.5), None)
    assert [phase.predicted_s for phase in found.phases] == [8, 20.5, 3.5]
    assert "0.5 s for each" in found.basis


def test_a_gpu_works_while_the_host_launches() -> None:
    """Two launches of 4 s are longer than the forward's 7, and one is shorter than the backward's 20."""
    found = predict(STEP, 60, rates(operation_s=4, runs_ahead=True), None)
    assert [phase.predicted_s for phase in found.phases] == [8, 20, 4]


def test_the_error_beside_what_was_measured() -> None:
    """A phase that was measured and not counted is shown with all of it as error."""
    found = predict(STEP, 60, rates(), times(data=0.5, forward=14, backward=16, optimizer=3))
    assert {phase.phase: (phase.measured_s, phase.relative_error) for phase in found.phases} == {
        "data": (0.5, -1),
        "forward": (14, -0.5),
        "backward": (16, 0.25),
        "clip": (0, None),
        "optimizer": (3, 0),
    }


def test_recomputation_that_has_no_time_of_its_own_is_predicted_in_the_backward() -> None:
    """As where it is compiled into it: 5 more seconds."""
    again = STEP | costs(operation("bmm", flops=500, phase="recompute"))
    found = predict(again, 60, rates(), times(data=0, forward=7, backward=20, optimizer=3))
    assert {phase.phase: phase.relative_error for phase in found.phases if phase.predicted_s} == {
        "forward": 0,
        "backward": 0.25,
        "optimizer": 0,
    }
    assert found.step_s == 35


def test_nothing_was_counted() -> None:
    found = predict({}, 60, rates(), None)
    assert (found.step_s, found.units_per_s, found.phases) == (0, 0, [])


def test_the_basis_names_the_rates() -> None:
    basis = predict(STEP, 60, gpu_rates(GPUS["h100"], "bf16"), None).basis
    assert "989.4 TFLOP/s (h100 data sheet, dense)" in basis
    assert "3.4 TB/s (h100 data sheet)" in basis
    assert "5 µs to launch" in basis


def test_the_basis_names_what_was_measured_of_each_kind() -> None:
    attention = {"float32": AttentionRate(5e9, 2e9)}
    products = {"float32": ProductRate(9e9, 8e9, 7e9)}
    kernels = KernelRates(products, AttentionShape(256, 64), attention, {"float32": 1e9}, 30e9)
    basis = predict(STEP, 60, replace(rates(), kernels=kernels), None).basis
    assert "products with weights from memory 9.0 GFLOP/s, their dgrad 8.0 GFLOP/s, their wgrad 7.0 GFLOP/s" in basis
    assert "attention (256 tokens, heads 64 wide) 5.0 GFLOP/s, its gradients 2.0 GFLOP/s" in basis
    assert "exponentials and their like 1.0 GFLOP/s" in basis
    assert "memory 10.0 B/s as a = b + 3 c, 30.0 GB/s as an update in place" in basis
    none = replace(kernels, shape=None, attention={})
    assert "attention" not in predict(STEP, 60, replace(rates(), kernels=none), None).basis


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_a_faster_format_is_never_predicted_slower(mode: str) -> None:
    step = costs(operation(flops=10**12, bytes_moved=10**6, dtype="bfloat16" if mode == "bf16" else "float32"))
    assert predict(step, 1, gpu_rates(GPUS["h100"], mode), None).step_s == pytest.approx(
        1e12 / {"fp32": 66.9e12, "bf16": 989.4e12}[mode]
    )
