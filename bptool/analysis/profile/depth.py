"""A deep model's tally from shallow ones: like blocks cost alike, and the rest grows by as much with each.

That it does is not assumed: the same rule is applied to a third depth, a period less, and compared with that depth's
own tally, number by number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from bptool.analysis.like_blocks import Blocks, Lengths
from bptool.analysis.profile.tally import NOTHING, Cost, ModuleFacts, Place, Tally

_BLOCK = re.compile(r"blocks\.(\d+)(?=\.|$)")


class Counted(NamedTuple):
    """A tally, and the depths that it was made from (none: it was counted in full)."""

    tally: Tally
    depths: tuple[int, ...]


def extended(blocks: Blocks, count: Callable[[Lengths], Tally]) -> Counted:
    """The tally of a model with these blocks, in full only where shallow ones don't tell.

    Args:
        count: makes the tally of the same model with stretches of these lengths.
    """
    depths = least, low, high = blocks.shortened(-1), blocks.shortened(0), blocks.shortened(0, last=1)
    if not blocks.is_deep(high):
        return Counted(count(blocks.lengths), ())
    extension = _Extension(blocks, low, count(low), count(high))
    if extension.to(least) != count(least):
        return Counted(count(blocks.lengths), ())
    return Counted(extension.to(blocks.lengths), tuple(map(sum, depths)))


@dataclass(frozen=True)
class _Extension:
    """Of the tally of a model of lengths `of_low`; that of one with a period more tells how the rest grows."""

    blocks: Blocks
    of_low: Lengths
    low: Tally
    high: Tally

    def to(self, lengths: Lengths) -> Tally:
        """The tally of other lengths, some periods more than there are, or one less."""
        copies = self.blocks.copies(self.of_low, lengths)
        of = [list(copies.of(block)) for block in range(sum(self.of_low))]
        costs: dict[Place, Cost] = {}
        for place, cost in self.low.costs.items():
            block = _block_of(place.module)
            if block is None:
                costs[place] = cost.plus(self._slope(place), copies.periods)
                continue
            within = place.module[len(f"blocks.{block}") :]
            for copy in of[block]:
                costs[place._replace(module=f"blocks.{copy}{within}")] = cost
        modules: dict[str, ModuleFacts] = {}
        for name, facts in self.low.modules.items():
            block = _block_of(name)
            names = [name] if block is None else [_as_block(name, copy) for copy in of[block]]
            modules |= dict.fromkeys(names, facts)
        return Tally(costs, modules)

    def _slope(self, place: Place) -> Cost:
        """What a period more adds outside of the blocks."""
        return self.high.costs.get(place, NOTHING).plus(self.low.costs[place], -1)


def _block_of(module: str) -> int | None:
    found = _BLOCK.match(module)
    return int(found[1]) if found else None


def _as_block(module: str, block: int) -> str:
    return _BLOCK.sub(f"blocks.{block}", module, count=1)
