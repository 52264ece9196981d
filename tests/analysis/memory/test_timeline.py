"""The thinned timeline against the record that it is made of."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_traces import Tape, traces
from small_runs import small_config

from bptool.analysis.memory.simulation import STEADY, simulate
from bptool.analysis.memory.timeline import STACK, Kind, Share, Span, Timeline, timeline
from bptool.instruments.memory.trace import CATEGORIES, MemoryTrace
from bptool.training.workload import transformer_workload

N_POINTS = st.integers(1, 80)


def first_event(trace: MemoryTrace) -> int:
    return int(trace.events_of(STEADY)[0])


@given(trace=traces(), n_points=N_POINTS)
@settings(deadline=None)
def test_the_peaks_are_kept(trace: MemoryTrace, n_points: int) -> None:
    found = timeline(trace, STEADY, n_points)
    assert found.points[found.peak].total_bytes == trace.live_bytes[trace.events_of(STEADY)].max()
    assert found.points[found.peak].event + first_event(trace) == trace.peak_event(STEADY)
    phases = {phase for phase in trace.phases_of(STEADY) if phase != "step"}
    assert found.phase_peaks.keys() == phases
    for phase, index in found.phase_peaks.items():
        held = [trace.live_bytes[i] for i in trace.events_of(STEADY).tolist() if trace.events[i].phase == phase]
        assert found.points[index].total_bytes == max(held)
        assert found.points[index].phase == phase


@given(trace=traces(), n_points=N_POINTS)
@settings(deadline=None)
def test_each_point_is_an_instant_of_the_record(trace: MemoryTrace, n_points: int) -> None:
    for point in timeline(trace, STEADY, n_points).points:
        event = point.event + first_event(trace)
        assert point.total_bytes == trace.live_bytes[event]
        for category, n_bytes in zip(STACK, point.held_bytes, strict=True):
            assert n_bytes == sum(a.n_bytes for a in trace.live_at(event) if a.category == category)
        assert (point.phase, point.module, point.op) == trace.events[event][3:]


@given(trace=traces(), n_points=N_POINTS, n_largest=st.integers(0, 6))
@settings(deadline=None)
def test_the_largest_kinds_are_those_of_the_step(trace: MemoryTrace, n_points: int, n_largest: int) -> None:
    first = first_event(trace)
    found = timeline(trace, STEADY, n_points, n_largest)
    for point in found.points:
        totals: dict[tuple[str, str, str, str], list[int]] = {}
        for a in trace.live_at(point.event + first):
            if a.born >= first and a.n_bytes:
                module = "blocks.*" if a.module else ""
                totals.setdefault((a.category, module, a.op, a.tensor), []).append(a.n_bytes)
        expected = sorted(((sum(v), len(v)) for v in totals.values()), key=lambda pair: -pair[0])[:n_largest]
        assert [share.n_bytes for share in point.largest] == [n_bytes for n_bytes, _ in expected]
        for share in point.largest:
            kind = found.kinds[share.kind]
            module = "blocks.*" if kind.module else ""
            alike = totals[kind.category, module, kind.op, kind.tensor]
            assert (share.n_bytes, share.count) == (sum(alike), len(alike))


@given(trace=traces(), n_points=N_POINTS)
@settings(deadline=None)
def test_the_points_fill_the_width_in_order(trace: MemoryTrace, n_points: int) -> None:
    found = timeline(trace, STEADY, n_points)
    assert len(found.edges) == len(found.points) + 1
    assert (found.edges[0], found.edges[-1]) == (0.0, 1.0)
    assert (np.diff(found.edges) > 0).all()
    assert (np.diff([point.event for point in found.points]) > 0).all()
    assert json.loads(json.dumps(asdict(found)))["peak"] == found.peak


@given(trace=traces(), n_points=N_POINTS)
@settings(deadline=None)
def test_a_phase_is_where_its_points_are(trace: MemoryTrace, n_points: int) -> None:
    found = timeline(trace, STEADY, n_points)
    for depth in (0, 1):
        ends = 0
        for span in (s for s in found.spans if s.depth == depth):
            assert ends <= span.begin < span.end
            ends = span.end
            inside = {point.phase for point in found.points[span.begin : span.end]}
            assert inside == {"recompute"} if depth else inside <= {span.phase, "recompute"}
    outer = [span for span in found.spans if span.depth == 0]
    for span in outer:
        assert found.edges[span.end] - found.edges[span.begin] >= min(0.07, 0.5 / len(outer)) - 1e-5
    named = {i for span in outer for i in range(span.begin, span.end)}
    assert {p.phase for i, p in enumerate(found.points) if i not in named} <= {"step", ""}


def test_many_events_become_few_points() -> None:
    tape = Tape()
    tape.begin("step")
    for phase in ("forward", "backward"):
        tape.begin(phase)
        for _ in range(25_000):
            tape.release(tape.allocate(8))
        tape.end()
    tape.end()
    found = timeline(tape.trace(), 0)
    assert found.n_events == 100_006
    assert 380 <= len(found.points) <= 420


def by_hand() -> Timeline:
    """A forward of two layers, a backward that recomputes one of them."""
    tape = Tape()
    tape.allocate(100, "parameters", "blocks.0")
    tape.begin("step")
    tape.begin("forward")
    kept = [tape.allocate(10, "activations", f"blocks.{i}", "aten.mm", "float32[2]") for i in (0, 1)]
    tape.end()
    tape.begin("backward")
    tape.begin("recompute")
    again = tape.allocate(40, "temporaries", "blocks.1", "aten.add", "float32[8]")
    tape.end()
    for index in (again, *kept):
        tape.release(index)
    tape.end()
    tape.end()
    return timeline(tape.trace(), 0, n_points=1)


def test_a_step_by_hand() -> None:
    """Events: step, forward, two allocations, end; backward, recompute, one allocation, end; 3 releases, 2 ends."""
    found = by_hand()
    assert [p.phase for p in found.points] == [
        "step",
        "forward",
        "step",
        "backward",
        "recompute",
        "backward",
        "step",
        "",
    ]
    assert [p.event for p in found.points] == [0, 3, 4, 5, 7, 8, 12, 13]
    assert [p.total_bytes for p in found.points] == [100, 120, 120, 120, 160, 160, 100, 100]
    assert found.peak == 4
    assert dict(found.phase_peaks) == {"forward": 1, "backward": 5, "recompute": 4}
    assert found.spans == (
        Span("forward", 0, 1, 2),
        Span("backward", 0, 3, 6),
        Span("recompute", 1, 4, 5),
    )
    assert found.kinds == (
        Kind("activations", "blocks.*", "aten.mm", "float32[2]"),
        Kind("temporaries", "blocks.1", "aten.add", "float32[8]"),
    )
    assert found.points[4].largest == (Share(1, 1, 40), Share(0, 2, 20))
    assert found.points[0].largest == ()


def test_a_phase_of_few_events_is_wide_enough_to_see() -> None:
    """14 events, 2 phases of at least 7 hundredths: 0.86 of the width goes by events, of which the forward has 3."""
    found = by_hand()
    forward, backward, _ = found.spans
    assert found.edges[forward.end] - found.edges[forward.begin] == pytest.approx(0.07 + 0.86 * 3 / 14, abs=1e-5)
    assert found.edges[backward.end] - found.edges[backward.begin] == pytest.approx(0.07 + 0.86 * 7 / 14, abs=1e-5)


def test_the_trainers_own_step() -> None:
    config = small_config({"activation_checkpoint.policy": "full"})
    trace = simulate(config, transformer_workload(config))
    found = timeline(trace, STEADY)
    assert found.points[found.peak].total_bytes == trace.live_bytes[trace.peak_event(STEADY)]
    assert [s.phase for s in found.spans if s.depth == 0] == ["data", "forward", "backward", "clip", "optimizer"]
    backward = next(s for s in found.spans if s.phase == "backward")
    recomputes = [s for s in found.spans if s.depth == 1]
    assert [s.phase for s in recomputes] == ["recompute"] * config.model.n_layers
    assert all(backward.begin < s.begin < s.end < backward.end for s in recomputes)


def test_the_stack_has_every_category() -> None:
    assert sorted(STACK) == sorted(CATEGORIES)
