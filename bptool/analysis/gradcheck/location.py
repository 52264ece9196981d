"""Where the wrong entries of a gradient are: directions that are zero outside of a block, by bisection."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Span = tuple[int, int]
Wrong = Callable[[Tensor], bool]
"""Whether the gradient is wrong within a mask, a tensor of zeros and ones of its shape."""

_MOST_QUESTIONS = 160
_MOST_SPANS = 4
EVERYWHERE = "everywhere"


def locate(shape: torch.Size, wrong: Wrong, device: torch.device, *, most: int = 160) -> str:
    """`[12, 200]`, `[64:128, :]` or `everywhere`: where a tensor's gradient is wrong, as Python would index it.

    One dimension after the other, each within what is left of those before it. Where there are many separate places the
    first are named.

    Args:
        most: questions that may be asked, about; with fewer, the answer is a larger block.
    """
    asked = _Questions(wrong, min(most, _MOST_QUESTIONS))
    mask = torch.ones(shape, dtype=torch.float64, device=device)
    found: list[list[Span]] = []
    for dim, size in enumerate(shape):
        spans = _joined(_bisect(asked, mask, dim, (0, size)))
        if not spans:  # it is too little here to be seen: say what is known
            spans = [(0, size)]
        keep = torch.zeros(size, dtype=torch.bool, device=device)
        for start, stop in spans:
            keep[start:stop] = True
        mask = mask * keep.view([size if d == dim else 1 for d in range(len(shape))])
        found.append(spans)
    if all(spans == [(0, size)] for spans, size in zip(found, shape, strict=True)):
        return EVERYWHERE
    return "[" + ", ".join(_index(spans, size) for spans, size in zip(found, shape, strict=True)) + "]"


class _Questions:
    """Counts, so that a gradient that is wrong in a scattered way does not take forever."""

    def __init__(self, wrong: Wrong, most: int) -> None:
        self._wrong = wrong
        self.left = most

    def ask(self, mask: Tensor) -> bool:
        self.left -= 1
        return self._wrong(mask)


def _bisect(asked: _Questions, mask: Tensor, dim: int, span: Span) -> list[Span]:
    """The wrong parts of a span; breadth first, so that a wrong half is known before any of its elements."""
    level, done = [span], []
    while level:
        halves: list[Span] = []
        for start, stop in level:
            if stop - start == 1 or asked.left <= 2:
                done.append((start, stop))
                continue
            middle = (start + stop) // 2
            parts = [part for part in ((start, middle), (middle, stop)) if asked.ask(_within(mask, dim, part))]
            halves += parts
            if not parts:  # only both together are enough to be seen
                done.append((start, stop))
        if len(level) == 4 and len(halves) == 8 and _throughout(asked, mask, dim, halves[0]):
            return [*done, *halves]
        level = halves
    return done


def _throughout(asked: _Questions, mask: Tensor, dim: int, span: Span) -> bool:
    """Whether all is wrong on the way down to one element; as all eighths are, it is then taken to be so everywhere."""
    start, stop = span
    while stop - start > 1:
        middle = (start + stop) // 2
        if not all(asked.ask(_within(mask, dim, part)) for part in ((start, middle), (middle, stop))):
            return False
        stop = middle
    return True


def _within(mask: Tensor, dim: int, span: Span) -> Tensor:
    part = torch.zeros_like(mask)
    part.narrow(dim, span[0], span[1] - span[0]).fill_(1)
    return mask * part


def _joined(spans: list[Span]) -> list[Span]:
    """Spans in order, neighbours made one."""
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _index(spans: list[Span], size: int) -> str:
    if spans == [(0, size)] and size > 1:
        return ":"
    starts, singles = [start for start, _ in spans], all(stop - start == 1 for start, stop in spans)
    steps = {b - a for a, b in pairwise(starts)}
    if singles and len(spans) > 2 and len(steps) == 1:
        return f"{starts[0]}:{starts[-1] + 1}:{steps.pop()}"
    shown = [str(start) if stop - start == 1 else f"{start}:{stop}" for start, stop in spans[:_MOST_SPANS]]
    more = ["..."] if len(spans) > _MOST_SPANS else []
    return shown[0] if len(spans) == 1 else f"({', '.join([*shown, *more])})"
