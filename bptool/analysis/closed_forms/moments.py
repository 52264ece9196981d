"""Instants of a simulated step: which micro-batch, phase and block is at work, and what is held for what."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from bptool.analysis.memory.simulation import STEADY
from bptool.analysis.memory.sweeps import block_of
from bptool.instruments.memory.trace import MemoryTrace


@dataclass(frozen=True)
class Moment:
    """An instant of the steady step.

    Attributes:
        event: the one after which it is.
        since: the event that begins this micro-batch's forward, or the step where none has begun.
        micro_batch: its number in the step, from 0.
        phase: innermost, as in the record.
        module: where it happens, as in the record.
        at_work: the block that is being worked on.
        blocks: how many of the first blocks hold what their forward has kept, the one at work among them; none after
            the last backward.
    """

    event: int
    since: int
    micro_batch: int
    phase: str
    module: str
    at_work: int | None
    blocks: int


def end_of_forward(trace: MemoryTrace) -> Moment:
    """When the steady step's last forward has ended."""
    steady: list[int] = trace.events_of(STEADY).tolist()
    phases = [trace.events[event].phase for event in steady]
    ends = [after for (before, after) in pairwise(steady) if _edge(trace, before, after) == ("forward", "step")]
    return moment_of(trace, ends[-1] if phases and ends else steady[0])


def moment_of(trace: MemoryTrace, event: int) -> Moment:
    """What is going on at an event of the steady step."""
    steady: list[int] = [e for e in trace.events_of(STEADY).tolist() if e <= event]
    begins = [
        after
        for before, after in pairwise(steady)
        if _edge(trace, before, after)[1] == "forward" and trace.events[before].phase != "forward"
    ]
    since = begins[-1] if begins else steady[0]
    phase, module = trace.events[event].phase, trace.events[event].module
    at_work = block_of(module) if phase in ("forward", "backward", "recompute") else None
    blocks = _blocks(trace, since, event, at_work)
    return Moment(event, since, max(len(begins) - 1, 0), phase, module, at_work, blocks)


def _blocks(trace: MemoryTrace, since: int, event: int, at_work: int | None) -> int:
    if at_work is not None:
        return at_work + 1
    seen = [(trace.events[e].phase, block_of(trace.events[e].module)) for e in range(since, event + 1)]
    forward = [block for phase, block in seen if phase == "forward" and block is not None]
    backward = [block for phase, block in seen if phase in ("backward", "recompute") and block is not None]
    if trace.events[event].phase in ("clip", "optimizer", "data"):
        return 0
    return min(backward) if backward else max(forward, default=-1) + 1


def _edge(trace: MemoryTrace, before: int, after: int) -> tuple[str, str]:
    return trace.events[before].phase, trace.events[after].phase
