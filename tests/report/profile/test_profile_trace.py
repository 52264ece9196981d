"""A Chrome trace, read back by its own rules: slices nest, times go up, flows have two ends, and it is the record."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bptool.errors import StorageError
from bptool.instruments.operations.trace import Operation, OperationTrace
from bptool.report.profile.trace import write_trace


def op(phase: str, kind: str, module: str, name: str, start: float, duration: float, **more: Any) -> Operation:
    figures = {"flops": 0, "pointwise_flops": 0, "bytes_moved": 0, "micro_batch": 0, **more}
    return Operation(
        phase=phase,  # type: ignore[arg-type]
        kind=kind,  # type: ignore[arg-type]
        module=module,
        op=name,
        start_s=start,
        duration_s=duration,
        **figures,
    )


# A layer inside a block, checkpointed: forward, then the backward with its recomputation, then the update.
STEP = OperationTrace(
    operations=(
        op("forward", "forward", "block.up", "mm", 100.001, 0.002, outside_s=0.001, flops=4_000_000, bytes_moved=2_000),
        op("forward", "forward", "block", "add", 100.004, 0.001, outside_s=0.001, pointwise_flops=8, shapes="[8]"),
        op("forward", "forward", "", "mean", 100.005, 0.001, node=7),
        op("backward", "dgrad", "", "div", 100.008, 0.001, outside_s=0.001, node=7),
        op("recompute", "recompute", "block.up", "mm", 100.010, 0.002, outside_s=0.0005, node=8),
        op("backward", "dgrad", "block.up", "mm", 100.013, 0.002, node=8, dtype="float32"),
        op("backward", "wgrad", "block.up", "mm", 100.015, 0.002, node=8),
        op("optimizer", "optimizer", "", "_fused_adamw_", 100.020, 0.004),
    ),
    calls={"": 1, "block": 1, "block.up": 1},
    types={"": "Model", "block": "Block", "block.up": "Linear"},
)


def written(trace: OperationTrace, path: Path) -> list[dict[str, Any]]:
    write_trace(path, trace, name="tiny")
    document = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert document["displayTimeUnit"] == "ms"
    events: list[dict[str, Any]] = document["traceEvents"]
    return events


def slices(events: list[dict[str, Any]], category: str) -> list[tuple[str, float, float]]:
    """Names, and begins and ends in milliseconds."""
    found = [e for e in events if e["ph"] == "X" and e["cat"] == category]
    return [(e["name"], e["ts"] / 1e3, (e["ts"] + e["dur"]) / 1e3) for e in found]


def assert_keeps_the_rules(events: list[dict[str, Any]]) -> None:
    """Of the Trace Event Format, as a viewer relies on them."""
    times = [event["ts"] for event in events if event["ph"] != "M"]
    assert times == sorted(times)
    assert all(time >= 0 for time in times)
    assert {event["ph"] for event in events} <= {"M", "X", "s", "f", "C"}
    around: dict[tuple[int, int], list[float]] = defaultdict(list)  # the ends of the slices that are open
    ends: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        assert {"name", "ph", "pid", "tid"} <= event.keys()
        open_ends = around[event["pid"], event["tid"]]
        if event["ph"] == "X":
            end = event["ts"] + event["dur"]
            while open_ends and open_ends[-1] <= event["ts"] + 1e-9:
                open_ends.pop()
            assert event["dur"] >= 0
            assert not open_ends or end <= open_ends[-1] + 1e-6, "slices cross"
            open_ends.append(end)
        elif event["ph"] in "sf":
            ends[event["id"]].append(event)
    for begin, end in ends.values():
        assert (begin["ph"], end["ph"], end["bp"]) == ("s", "f", "e")
        assert (begin["name"], begin["cat"]) == (end["name"], end["cat"])


def test_by_hand(tmp_path: Path) -> None:
    events = written(STEP, tmp_path / "trace.json")
    assert_keeps_the_rules(events)
    assert slices(events, "phase") == [
        ("forward", 0, 6),
        ("backward", pytest.approx(7), pytest.approx(17)),
        ("recompute", pytest.approx(9.5), pytest.approx(12)),
        ("optimizer", pytest.approx(20), pytest.approx(24)),
    ]
    assert slices(events, "module") == [
        ("block", 1, 5),
        ("block.up", 1, 3),
        ("block", 10, 12),
        ("block.up", 10, 12),
        ("block", 13, 17),
        ("block.up", 13, 17),
    ]
    kinds = [e["cat"] for e in events if e["ph"] == "X" and e["cat"] not in ("phase", "module")]
    assert kinds == [one.kind for one in STEP.operations]


def test_a_slice_says_what_it_is(tmp_path: Path) -> None:
    first, second, *_, last = [
        e for e in written(STEP, tmp_path / "t") if e["ph"] == "X" and e["name"] in ("mm", "add")
    ]
    assert first["args"] == {
        **{"for": "forward", "module": "block.up", "FLOPs": 4_000_000, "pointwise FLOPs": 0, "bytes moved": 2_000}
    }
    assert second["args"]["shapes"] == "[8]"
    assert (last["cat"], last["args"]["autograd node"]) == ("wgrad", 8)


def test_operations_are_linked_to_their_gradients(tmp_path: Path) -> None:
    events = written(STEP, tmp_path / "trace.json")
    begins = {e["id"]: e["ts"] / 1e3 for e in events if e["ph"] == "s"}
    ends = {e["id"]: e["ts"] / 1e3 for e in events if e["ph"] == "f"}
    assert sorted((begins[i], ends[i]) for i in begins) == [(5.5, 8.5), (11, 14), (11, 16)]


def test_counters_are_rates(tmp_path: Path) -> None:
    events = written(STEP, tmp_path / "trace.json")
    rates = [(e["ts"] / 1e3, e["args"]["value"]) for e in events if e["ph"] == "C" and e["name"] == "GFLOP/s"]
    assert rates[:2] == [(1, 2.0), (3, 0.0)]  # 4 MFLOP in 2 ms, then a gap
    assert rates[-1] == (24, 0.0)


def test_names_of_the_process_and_an_empty_record(tmp_path: Path) -> None:
    events = written(OperationTrace((), {}, {}), tmp_path / "trace.json")
    assert [(e["name"], e["args"]["name"]) for e in events] == [
        ("process_name", "bptool profile tiny"),
        ("thread_name", "one training step"),
    ]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        write_trace(tmp_path / "nowhere" / "trace.json", STEP, name="tiny")


PLACES = st.tuples(
    st.sampled_from(["forward", "recompute", "backward", "clip", "optimizer"]),
    st.sampled_from(["", "a", "a.b", "a.b.c", "d.e", "strange name."]),
    st.floats(0, 1e-3),
    st.floats(-1e-5, 1e-3),
    st.none() | st.integers(0, 3),
    st.integers(0, 1),
)


@given(steps=st.lists(PLACES, max_size=20))
def test_whatever_was_recorded_the_rules_are_kept(
    steps: list[tuple[str, str, float, float, int | None, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Clocks that overlap a little too, and modules that nobody called."""
    operations, at = [], 5.0
    for phase, module, duration, gap, node, micro_batch in steps:
        kind = phase if phase in ("forward", "recompute") else "dgrad" if phase == "backward" else "optimizer"
        outside = max(gap, 0.0) * 1.5
        at += gap
        operations.append(
            op(phase, kind, module, "mm", at, duration, outside_s=outside, node=node, micro_batch=micro_batch)
        )
        at += duration
    trace = OperationTrace(tuple(operations), {"a": 1, "a.b.c": 1}, {})
    events = written(trace, tmp_path_factory.getbasetemp() / "trace.json")
    assert_keeps_the_rules(events)
    assert [e["name"] for e in events if e["ph"] == "X" and e["cat"] not in ("phase", "module")].count("mm") == len(
        steps
    )
