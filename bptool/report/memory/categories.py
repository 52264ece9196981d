"""How every view names and draws what memory is for."""

from __future__ import annotations

from typing import NamedTuple

from bptool.instruments.memory.trace import Category


class Look(NamedTuple):
    """A category to a reader.

    Attributes:
        meaning: in half a line.
        color: on a terminal, the page's own in its light scheme.
        shade: the same without colour.
    """

    name: str
    meaning: str
    color: str
    shade: str


LOOKS: dict[Category, Look] = {
    "parameters": Look("parameters", "weights and buffers", "#2f6fb3", "█"),
    "optimizer_state": Look("optimizer state", "what the update rule remembers of each parameter", "#86b9e8", "▓"),
    "inputs": Look("inputs", "the step's batches", "#8d949c", "="),
    "gradients": Look("gradients", "of the parameters", "#e8a33d", "▒"),
    "activations": Look("activations", "what the forward leaves behind for the backward", "#23a27d", "░"),
    "temporaries": Look("temporaries", "what an operation needs for a moment", "#cf6fa2", "+"),
}
"""From the bottom of a picture to its top, as `STACK` has them."""
