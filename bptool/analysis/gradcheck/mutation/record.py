"""What became of one bug that was put into a target's backward."""

from __future__ import annotations

from typing import Literal

from bptool.analysis.result import Record

Outcome = Literal["caught", "missed", "no_effect", "not_applicable"]
"""caught: along a direction of the check the mutated gradient is outside of the error bar, or it is not finite.
missed: along none. no_effect: the gradient stays what it is but for rounding. not_applicable: the target has no
operation that can have this bug."""


class MutationCheck(Record):
    """One bug, in one operation.

    Attributes:
        name: of the bug.
        op: the operation whose backward had it; where it is not applicable, which would have had to be there.
        module: dotted name of the module at whose work the operation was recorded; empty: the target itself.
        relative_error: ||e|| / ||g|| of the error e that it makes in the gradient g of `tensor`; None: g is zero.
        tensor: the parameter or input in which the error stands out most.
        detectable_relative_error: the smallest error that the check would have caught in that tensor.
        detail: one clause more, for a person.
    """

    name: str
    op: str = ""
    module: str = ""
    outcome: Outcome
    relative_error: float | None = None
    tensor: str | None = None
    detectable_relative_error: float | None = None
    detail: str = ""
