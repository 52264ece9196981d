"""The format alone: events by hand."""

from __future__ import annotations

import json
from pathlib import Path

from bptool.interop.chrome_trace import Count, Flow, Slice, write_chrome_trace


def test_events_come_in_order_and_outer_slices_first(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    write_chrome_trace(
        file,
        process="p",
        thread="t",
        slices=[
            Slice("inner", "op", 1000, 2000, {"FLOPs": 3}),
            Slice("outer", "phase", 1000, 4500, {}),
            Slice("first", "phase", 0, 1000, {}),
        ],
        flows=[Flow("backward of it", 500, 1500), Flow("backward of it", 500, 3000)],
        counts=[Count("GFLOP/s", 0, 2.5)],
    )
    both = {"pid": 1, "tid": 1}
    flow = {"name": "backward of it", "cat": "autograd", **both}
    assert json.loads(file.read_text())["traceEvents"] == [
        {"name": "process_name", "ph": "M", "args": {"name": "p"}, **both},
        {"name": "thread_name", "ph": "M", "args": {"name": "t"}, **both},
        {"name": "first", "cat": "phase", "ph": "X", "ts": 0.0, "dur": 1.0, "args": {}, **both},
        {"name": "GFLOP/s", "ph": "C", "ts": 0.0, "args": {"value": 2.5}, **both},
        {"id": 1, "ph": "s", "ts": 0.5, **flow},
        {"id": 2, "ph": "s", "ts": 0.5, **flow},
        {"name": "outer", "cat": "phase", "ph": "X", "ts": 1.0, "dur": 3.5, "args": {}, **both},
        {"name": "inner", "cat": "op", "ph": "X", "ts": 1.0, "dur": 1.0, "args": {"FLOPs": 3}, **both},
        {"id": 1, "ph": "f", "bp": "e", "ts": 1.5, **flow},
        {"id": 2, "ph": "f", "bp": "e", "ts": 3.0, **flow},
    ]
