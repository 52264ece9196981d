"""What each phase does, by hand."""

from __future__ import annotations

from bptool.analysis.profile.parts import phase_counts
from bptool.analysis.profile.result import PhaseCounts
from bptool.analysis.profile.tally import Cost, Place, Tally


def test_phases_are_in_the_steps_order_and_add_up() -> None:
    tally = Tally(
        {
            Place("step", "forward", "", "add"): Cost(0, 1, 12, 1),
            Place("backward", "dgrad", "a", "mm"): Cost(20, 0, 8, 1),
            Place("backward", "wgrad", "a", "mm"): Cost(30, 0, 9, 1),
            Place("recompute", "recompute", "a", "mm"): Cost(10, 2, 7, 1),
            Place("forward", "forward", "a", "mm"): Cost(10, 2, 7, 1),
            Place("forward", "dgrad", "loss", "mm"): Cost(5, 0, 3, 1),  # a fused loss
        }
    )
    assert phase_counts(tally) == [
        PhaseCounts(phase="forward", flops=15, pointwise_flops=2, bytes_moved=10),
        PhaseCounts(phase="recompute", flops=10, pointwise_flops=2, bytes_moved=7),
        PhaseCounts(phase="backward", flops=50, pointwise_flops=0, bytes_moved=17),
        PhaseCounts(phase="step", flops=0, pointwise_flops=1, bytes_moved=12),
    ]
