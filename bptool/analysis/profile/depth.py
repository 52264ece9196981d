"""A deep model's tally from shallow ones: like blocks cost alike, and the rest grows by as much with each.

That it does is not assumed: the same rule is applied to a third depth, a period less, and compared with that depth's
own tally, number by number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from bptool.analysis.memory.depth import Blocks
from bptool.analysis.profile.tally import NOTHING, Cost, ModuleFacts, Place, Tally

_BLOCK = re.compile(r"blocks\.(\d+)(?=\.|$)")


class Counted(NamedTuple):
    """A tally, and the depths that it was made from (none: it was counted in full)."""

    tally: Tally
    depths: tuple[int, ...]


def extended(blocks: Blocks, count: Callable[[int], Tally]) -> Counted:
    """The tally of a model of `blocks.n_layers`, in full only where shallow ones don't tell.

    Args:
        count: makes the tally of the same model with so many layers.
    """
    depths = _depths(blocks)
    if depths is None:
        return Counted(count(blocks.n_layers), ())
    least, low, high = (count(depth) for depth in depths)
    extension = _Extension(blocks, depths[1], low, high)
    if extension.to(depths[0]) != least:
        return Counted(count(blocks.n_layers), ())
    return Counted(extension.to(blocks.n_layers), depths)


def _depths(blocks: Blocks) -> tuple[int, int, int] | None:
    """Without inner blocks, with a period of them, with two; None where the model is hardly deeper."""
    found = blocks.depths()
    return found and (found[0] - blocks.period, found[0], found[1])


@dataclass(frozen=True)
class _Extension:
    """Of the tally of a model of `depth` blocks; that of one with a period more tells how the rest grows."""

    blocks: Blocks
    depth: int
    low: Tally
    high: Tally

    def to(self, n_layers: int) -> Tally:
        """The tally of `n_layers` blocks, some periods more than there are, or one less."""
        periods, rest = divmod(n_layers - self.depth, self.blocks.period)
        assert rest == 0, "a whole number of periods more"
        copies = self._copies(n_layers)
        costs: dict[Place, Cost] = {}
        for place, cost in self.low.costs.items():
            block = _block_of(place.module)
            if block is None:
                costs[place] = cost.plus(self._slope(place), periods)
                continue
            within = place.module[len(f"blocks.{block}") :]
            for copy in copies[block]:
                costs[Place(place.phase, place.kind, f"blocks.{copy}{within}", place.op)] = cost
        modules: dict[str, ModuleFacts] = {}
        for name, facts in self.low.modules.items():
            block = _block_of(name)
            names = [name] if block is None else [_as_block(name, copy) for copy in copies[block]]
            modules |= dict.fromkeys(names, facts)
        return Tally(costs, modules)

    def _copies(self, n_layers: int) -> dict[int, list[int]]:
        """Which blocks of the deeper model each of these becomes: the first ones, the last one, and inner ones."""
        head, period = self.blocks.head, self.blocks.period
        last, added = head + period, n_layers - self.depth
        copies: dict[int, list[int]] = {block: [] for block in range(self.depth)}
        for block in range(n_layers):
            inner = head + (block - head) % period
            kept = block < min(last, last + added)
            copies[block if kept else inner if block < last + added else block - added].append(block)
        return copies

    def _slope(self, place: Place) -> Cost:
        """What a period more adds outside of the blocks."""
        return self.high.costs.get(place, NOTHING).plus(self.low.costs[place], -1)


def _block_of(module: str) -> int | None:
    found = _BLOCK.match(module)
    return int(found[1]) if found else None


def _as_block(module: str, block: int) -> str:
    return _BLOCK.sub(f"blocks.{block}", module, count=1)
