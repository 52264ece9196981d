"""What watches a training step, as the step sees it: phases that begin and end.

The step announces its phases; instruments listen. Neither knows what the other does in between, so one step serves the
trainer, the profiler and the memory estimate alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Literal

Phase = Literal["step", "data", "forward", "recompute", "backward", "clip", "optimizer"]
"""`step` encloses the others; `recompute` lies inside `backward`."""


class Instrument:
    """Gives a context manager for each phase; this one watches nothing."""

    def phase(self, name: Phase) -> AbstractContextManager[object]:
        """Entered when the phase begins, left when it ends (by an exception too)."""
        return nullcontext()


class Announcer:
    """Tells every instrument of each phase, the first one outermost."""

    def __init__(self, instruments: Sequence[Instrument] = ()) -> None:
        self.instruments = list(instruments)

    def phase(self, name: Phase) -> AbstractContextManager[object]:
        """The phase's context of all instruments together."""
        if not self.instruments:
            return nullcontext()
        stack = ExitStack()
        try:
            for instrument in self.instruments:
                stack.enter_context(instrument.phase(name))
        except BaseException:
            stack.close()
            raise
        return stack
