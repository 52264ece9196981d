"""Memory traces made by hand or by hypothesis, without running anything."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from bptool.instruments.memory.trace import CATEGORIES, Allocation, Category, Event, MemoryTrace


class Tape:
    """Writes a trace as a ledger would, event by event."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.events: list[Event] = []
        self.phases: list[str] = []
        self.step = -1

    def begin(self, phase: str) -> None:
        self.step += phase == "step"
        self.phases.append(phase)
        self._note(None, 0, "", "")

    def end(self) -> None:
        self.phases.pop()
        self._note(None, 0, "", "")

    def allocate(
        self, n_bytes: int, category: Category = "temporaries", module: str = "", op: str = "", tensor: str = ""
    ) -> int:
        index = len(self.allocations)
        born = len(self.events)
        self.allocations.append(Allocation(n_bytes, category, module, op, tensor, self._phase(), born))
        self._note(index, n_bytes, module, op)
        return index

    def release(self, index: int) -> None:
        allocation = self.allocations[index]
        allocation.died = len(self.events)
        self._note(index, -allocation.n_bytes, allocation.module, "")

    def trace(self) -> MemoryTrace:
        return MemoryTrace(tuple(self.allocations), tuple(self.events))

    def _phase(self) -> str:
        return self.phases[-1] if self.phases else ""

    def _note(self, index: int | None, delta: int, module: str, op: str) -> None:
        self.events.append(Event(index, delta, self.step, self._phase(), module, op))


_Action = tuple[str, int]
_ACTIONS = st.tuples(st.sampled_from(["allocate"] * 4 + ["release"] * 3 + ["recompute"]), st.integers(0, 1000))


@st.composite
def traces(draw: st.DrawFn) -> MemoryTrace:
    """Two steps of the trainer's shape, with any allocations and releases in them."""
    tape = Tape()
    _act(tape, draw(st.lists(_ACTIONS, max_size=5)))
    for _ in range(2):
        tape.begin("step")
        for phase in draw(st.sampled_from(_STEPS)):
            tape.begin(phase)
            _act(tape, draw(st.lists(_ACTIONS, max_size=30)))
            tape.end()
        _act(tape, draw(st.lists(_ACTIONS, max_size=5)))
        tape.end()
    return tape.trace()


_STEPS = [
    ["forward", "backward", "optimizer"],
    ["data", "forward", "backward", "forward", "backward", "clip", "optimizer"],
    [],
]


def _act(tape: Tape, actions: Sequence[_Action]) -> None:
    for action, number in actions:
        live = [i for i, a in enumerate(tape.allocations) if a.died is None]
        if action == "allocate":
            category = CATEGORIES[number % len(CATEGORIES)]
            tape.allocate(number, category, f"blocks.{number % 3}", f"aten.op{number % 2}", f"float32[{number // 2}]")
        elif action == "release" and live:
            tape.release(live[number % len(live)])
        elif action == "recompute" and tape.phases[-1:] == ["backward"]:
            tape.begin("recompute")
            tape.allocate(number)
            tape.end()
