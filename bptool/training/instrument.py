"""What watches a training step, as the step sees it: phases that begin and end.

The step announces its phases; instruments listen. Neither knows what the other does in between, so one step serves the
trainer, the profiler and the memory estimate alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """The phase's context of all instruments together; nothing is told before it is entered."""
        with ExitStack() as stack:
            for instrument in self.instruments:
                stack.enter_context(instrument.phase(name))
            yield
