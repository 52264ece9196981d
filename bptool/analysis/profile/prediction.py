"""How long a step should take, from what was counted."""

from __future__ import annotations

from collections.abc import Mapping

from bptool.analysis.profile.kernel_rates import KernelRates
from bptool.analysis.profile.result import PhaseTimes, PredictedPhase, PredictedTime
from bptool.analysis.profile.roofline import Rates, predicted_s
from bptool.analysis.profile.tally import Cost, Place
from bptool.training.instrument import Phase
from bptool.units import format_rate

PHASES: tuple[Phase, ...] = ("data", "forward", "recompute", "backward", "clip", "optimizer")
"""Those that a step is the sum of, in order."""

PUBLISHED = (1.7, 2.5)
"""How many times as long as predicted for a GPU published runs took: nearest and farthest (test_published_steps.py)."""


def predict(costs: Mapping[Place, Cost], units: int, rates: Rates, times: PhaseTimes | None) -> PredictedTime:
    """The step's time, operation by operation and phase by phase, beside the measured one where there is one.

    On a CPU each operation's own overhead adds to its work; a GPU works off a queue, so a phase takes the longer of the
    launches and the work.

    Args:
        costs: of one step.
        units: what it works off, such as tokens.
    """
    phases = [_predicted(phase, costs, rates, times) for phase in PHASES]
    step_s = sum(phase.predicted_s for phase in phases)
    return PredictedTime(
        basis=_basis(rates),
        step_s=step_s,
        units_per_s=units / step_s if step_s else 0.0,
        phases=[phase for phase in phases if phase.predicted_s or phase.measured_s is not None],
    )


def _predicted(phase: Phase, costs: Mapping[Place, Cost], rates: Rates, times: PhaseTimes | None) -> PredictedPhase:
    """Recomputation that was measured in the backward, being compiled into it, is predicted there too."""
    unseen = times is not None and times.recompute is None
    inside = [
        (place, cost)
        for place, cost in costs.items()
        if phase == ("backward" if unseen and place.phase == "recompute" else place.phase)
    ]
    work_s = sum(predicted_s(place, cost, rates) for place, cost in inside)
    overhead_s = sum(cost.calls for _, cost in inside) * rates.operation_s
    expected_s = max(work_s, overhead_s) if rates.runs_ahead else work_s + overhead_s
    measured = times.of(phase) if times else None
    measured_s = measured.median_s if measured else None
    error = (expected_s - measured_s) / measured_s if measured_s else None
    return PredictedPhase(phase=phase, predicted_s=expected_s, measured_s=measured_s, relative_error=error)


def _basis(rates: Rates) -> str:
    """In a sentence."""
    line = rates.roofline
    memory = format_rate(line.bytes_per_s, "B")
    if rates.kernels is not None:
        return (
            "each operation at this machine's measured rate of its kind:"
            f" {_of_kernels(rates.kernels, rates.step_format)}; memory {memory} as a = b + 3 c,"
            f" {format_rate(rates.kernels.in_place_bytes_per_s, 'B')} as an update in place; and"
            f" {rates.operation_source}"
        )
    each = (
        f"each operation takes the longer of its FLOPs at {format_rate(line.flops_per_s, 'FLOP')} ({line.flops_source})"
        f" and its bytes at {memory} ({line.bytes_source})"
    )
    if not rates.runs_ahead:
        return f"{each}, and {rates.operation_source}"
    return f"{each}; a phase takes at least {rates.operation_source}"


def _of_kernels(kernels: KernelRates, dtype: str) -> str:
    """Arithmetic in this format."""
    products = kernels.products[dtype]
    found = {
        "products with weights from memory": products.forward,
        "their dgrad": products.dgrad,
        "their wgrad": products.wgrad,
    }
    if kernels.shape is not None:
        tokens, width, _ = kernels.shape
        found[f"attention ({tokens} tokens, heads {width} wide)"] = kernels.attention[dtype].forward
        found["its gradients"] = kernels.attention[dtype].backward
    found["exponentials and their like"] = kernels.elementary[dtype]
    return ", ".join(f"{what} {format_rate(rate, 'FLOP')}" for what, rate in found.items())
