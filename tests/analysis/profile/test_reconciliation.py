from __future__ import annotations

import pytest
from profile_traces import module_costs, op_costs, operation, timed_trace, times, trace

from bptool.analysis.profile.reconciliation import ratio_by_kind, typical, unexplained, with_durations, with_seconds
from bptool.analysis.profile.recorder_cost import RecorderCost


class TestTypical:
    def test_each_operations_median_by_position(self) -> None:
        """Three steps of two operations; the second step is slow in one, the third in the other."""
        steps = [
            timed_trace(("forward", "a", 0.1, 1), ("forward", "b", 0.2, 2)),
            timed_trace(("forward", "a", 0.9, 9), ("forward", "b", 0.3, 3)),
            timed_trace(("forward", "a", 0.2, 2), ("forward", "b", 0.8, 8)),
        ]
        first, second = typical(steps).operations
        assert (first.outside_s, first.duration_s) == (0.2, 2)
        assert (second.outside_s, second.duration_s) == (0.3, 3)

    def test_one_comes_after_the_other(self) -> None:
        found = typical([timed_trace(("forward", "a", 1, 2), ("backward", "a", 4, 8), ("optimizer", "", 16, 32))])
        assert [one.start_s for one in found.operations] == [1, 3 + 4, 15 + 16]

    def test_the_recorders_own_time_is_taken_out(self) -> None:
        """Of the time before an operation, then as much as may be inside of it, and never more than there is."""
        rows = [
            ("forward", "a", 5.0, 1.0),
            ("forward", "b", 0.75, 3.0),
            ("forward", "c", 0.25, 3.0),
            ("forward", "d", 0, 0.25),
        ]
        steps = [timed_trace(*rows, ("backward", "d", 5, 1), ("clip", "", 5, 1))]
        found = typical(steps, {"forward": RecorderCost(1, 0.5), "backward": RecorderCost(2, 0)})
        assert [one.outside_s for one in found.operations] == [4, 0, 0, 0, 3, 5]
        assert [one.duration_s for one in found.operations] == [1, 2.75, 2.5, 0, 1, 1]

    def test_a_step_that_did_something_else_is_left_out(self) -> None:
        rows = [("forward", "a", 0.0, 1.0), ("optimizer", "", 0.0, 5.0)]
        skipped = timed_trace(("forward", "a", 0, 100))
        found = typical([timed_trace(*rows), skipped, timed_trace(*rows)])
        assert [one.duration_s for one in found.operations] == [1, 5]

    def test_of_all_different_ones_the_latest(self) -> None:
        steps = [timed_trace(("forward", module, 0, i)) for i, module in enumerate("abc")]
        assert [one.module for one in typical(steps).operations] == ["c"]


class TestRatioByKind:
    def test_early_gradients_go_to_the_backward(self) -> None:
        """3 of 12 recorded seconds of the forward are gradients': of 8 timed ones 2, so (10 + 2) / (8 - 2)."""
        steps = trace(
            operation("mm", outside_s=1, duration_s=8),
            operation("mm", outside_s=0.5, duration_s=1, kind="dgrad"),
            operation("mm", outside_s=0.5, duration_s=1, kind="wgrad"),
            operation("mm", outside_s=0, duration_s=40, kind="wgrad", phase="backward"),
        )
        assert ratio_by_kind(times(forward=8, backward=10), steps) == pytest.approx(2)

    def test_without_any_there_is_no_other_ratio(self) -> None:
        steps = trace(operation("mm", duration_s=8), operation("mm", duration_s=9, kind="dgrad", phase="backward"))
        assert ratio_by_kind(times(), steps) is None


class TestSeconds:
    def test_a_modules_time_holds_what_leads_to_its_operations(self) -> None:
        rows = [("forward", "a", 1.0, 10.0), ("forward", "a", 2.0, 20.0), ("backward", "a", 4.0, 40.0)]
        a, b, c = with_seconds(module_costs("a", "b", "c"), timed_trace(*rows, ("forward", "b", 8, 80)))
        assert (a.forward_s, a.dgrad_s, a.wgrad_s, a.recompute_s) == (33, 44, 0, 0)
        assert (b.forward_s, b.dgrad_s) == (88, 0)
        assert (c.forward_s, c.dgrad_s) == (0, 0)

    def test_what_makes_the_batches_is_no_modules_time(self) -> None:
        (found,) = with_seconds(module_costs(""), timed_trace(("data", "", 1, 10), ("forward", "", 2, 20)))
        assert found.forward_s == 22

    def test_an_operations_is_only_what_is_inside(self) -> None:
        steps = trace(
            operation("mm", outside_s=1, duration_s=10),
            operation("mm", outside_s=1, duration_s=20, module="b"),
            operation("mm", outside_s=1, duration_s=40, kind="wgrad", phase="backward"),
        )
        found = with_durations(op_costs(("mm", "forward"), ("mm", "wgrad"), ("add", "forward")), steps)
        assert [op.duration_s for op in found] == [30, 40, 0]


class TestUnexplained:
    def test_the_parts_add_up_to_what_was_measured(self) -> None:
        recorded = timed_trace(
            ("forward", "a", 1, 10),
            ("forward", "b", 2, 20),
            ("recompute", "a", 3, 5),
            ("backward", "a", 4, 40),
            ("optimizer", "", 0.5, 6),
        )
        measured = times(data=0.25, forward=35, recompute=9, backward=43, clip=1, optimizer=7)
        found = {one.phase: one for one in unexplained(measured, recorded)}
        assert list(found) == ["data", "forward", "recompute", "backward", "clip", "optimizer"]
        forward, backward = found["forward"], found["backward"]
        assert (forward.measured_s, forward.operations_s, forward.outside_s, forward.unexplained_s) == (35, 30, 3, 2)
        assert (backward.operations_s, backward.outside_s, backward.unexplained_s) == (40, 4, -1)
        assert found["recompute"].unexplained_s == 1
        assert found["clip"].unexplained_s == 1
        for one in found.values():
            assert one.operations_s + one.outside_s + one.unexplained_s == pytest.approx(one.measured_s)

    def test_modules_add_up_to_what_is_explained(self) -> None:
        recorded = timed_trace(("forward", "a", 1, 10), ("forward", "b", 2, 20), ("forward", "", 3, 30))
        seconds = sum(one.forward_s or 0 for one in with_seconds(module_costs("", "a", "b"), recorded))
        (forward, *_) = [one for one in unexplained(times(forward=70), recorded) if one.phase == "forward"]
        assert seconds == forward.measured_s - forward.unexplained_s

    def test_a_phase_that_the_step_does_not_have(self) -> None:
        assert "recompute" not in {one.phase for one in unexplained(times(), trace(operation()))}
