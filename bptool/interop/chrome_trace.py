"""Chrome traces: JSON that https://ui.perfetto.dev, chrome://tracing and Speedscope open.

The format is Google's "Trace Event Format": an object with `traceEvents`. Slices are complete events (`X`) that nest by
their times; a flow is a start (`s`) and an end (`f`, which binds to the slice around it) of one id; counters (`C`) are
series of values. Times are microseconds. Here events are in the order of their times, a slice before those inside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_PROCESS, _THREAD = 1, 1
_OUTERMOST_FIRST = {"X": 0, "s": 1, "f": 2, "C": 3}


class Slice(NamedTuple):
    """Something that takes a while. Slices lie apart or one within the other.

    Attributes:
        category: by which a viewer filters.
        begin_ns, end_ns: on the trace's clock.
        details: shown when the slice is clicked.
    """

    name: str
    category: str
    begin_ns: int
    end_ns: int
    details: Mapping[str, str | int | float]


class Flow(NamedTuple):
    """An arrow from the slice around one instant to the slice around a later one."""

    name: str
    begin_ns: int
    end_ns: int


class Count(NamedTuple):
    """The value of a counter from an instant on."""

    name: str
    at_ns: int
    value: float


def write_chrome_trace(
    path: Path,
    *,
    process: str,
    thread: str,
    slices: Iterable[Slice],
    flows: Iterable[Flow] = (),
    counts: Iterable[Count] = (),
) -> None:
    """Write a trace of one thread.

    Args:
        process, thread: what they are called in the viewer.
    """
    events = [*map(_slice, slices), *map(_count, counts)]
    events += [half for number, flow in enumerate(flows, 1) for half in _flow(flow, number)]
    events.sort(key=lambda event: (event["ts"], _OUTERMOST_FIRST[event["ph"]], -event.get("dur", 0)))
    named = [("process_name", process), ("thread_name", thread)]
    names = [{"name": key, "ph": "M", "args": {"name": name}} for key, name in named]
    document = {"traceEvents": [{**event, "pid": _PROCESS, "tid": _THREAD} for event in [*names, *events]]}
    path.write_text(json.dumps({**document, "displayTimeUnit": "ms"}, separators=(",", ":"), allow_nan=False), "utf-8")


def _slice(one: Slice) -> dict[str, Any]:
    times = {"ts": one.begin_ns / 1e3, "dur": (one.end_ns - one.begin_ns) / 1e3}
    return {"name": one.name, "cat": one.category, "ph": "X", **times, "args": dict(one.details)}


def _flow(flow: Flow, number: int) -> list[dict[str, Any]]:
    both = {"name": flow.name, "cat": "autograd", "id": number}
    begin = {**both, "ph": "s", "ts": flow.begin_ns / 1e3}
    return [begin, {**both, "ph": "f", "bp": "e", "ts": flow.end_ns / 1e3}]


def _count(count: Count) -> dict[str, Any]:
    return {"name": count.name, "ph": "C", "ts": count.at_ns / 1e3, "args": {"value": count.value}}
