"""How every view of a profile names and draws what an operation is for."""

from __future__ import annotations

from typing import NamedTuple


class WorkLook(NamedTuple):
    """A kind of work to a reader.

    Attributes:
        key: as the Result has it.
        meaning: in half a line.
        color: on a terminal, the page's own in its light scheme.
        shade: the same without colour.
        css: class that colours it on a page.
    """

    key: str
    name: str
    meaning: str
    color: str
    shade: str
    css: str


WORK = (
    WorkLook("forward", "forward", "the loss from the batch", "#2f6fb3", "█", "c-forward"),
    WorkLook("dgrad", "dgrad", "gradients of what goes into a layer", "#e8a33d", "▓", "c-dgrad"),
    WorkLook("wgrad", "wgrad", "gradients of the parameters", "#cf6fa2", "▒", "c-wgrad"),
    WorkLook("recompute", "recompute", "activations once more, for the backward", "#23a27d", "░", "c-recompute"),
)
"""What modules spend a step on, in the order in which all views have it."""
