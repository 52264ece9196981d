"""Which blocks of a deep model are alike, and the shallow models that tell of it.

A model is one stretch of blocks after another, each treated in one way (`20*full+6*none` makes two); within a stretch
blocks repeat with a period. A shallow model has the same stretches with fewer periods in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NamedTuple

from bptool.config.block_plan import parse_plan, write_plan
from bptool.config.overrides import override
from bptool.config.schema import Config
from bptool.training.workload import Workload

Lengths = tuple[int, ...]
"""How many blocks each stretch has."""

_FEWEST_GAPS = 4  # between blocks that are written out, for bundles to be in


class Stretch(NamedTuple):
    """Blocks that are treated alike.

    Attributes:
        head: blocks at its beginning that are not like the later ones; its last one may differ too.
        period: blocks after which the pattern begins again, such as k where every k-th is recomputed.
    """

    n_layers: int
    head: int = 1
    period: int = 1

    @property
    def least(self) -> int:
        """Fewest blocks that have a whole period of inner ones, and leave as many over as the stretch does."""
        inner = self.n_layers - self.head - 1  # the last block's backward comes first, and may differ
        return self.head + 1 + self.period + inner % self.period

    def bundled(self, most: int) -> list[int]:
        """How many periods are left out between each two that are written out, where at most so many blocks are."""
        fewest = self.least + _FEWEST_GAPS * self.period
        left_out = max(0, -(-(self.n_layers - max(most, fewest)) // self.period))
        gaps = (self.n_layers - self.least) // self.period - left_out
        return [left_out * (gap + 1) // gaps - left_out * gap // gaps for gap in range(gaps)] if left_out else []

    @property
    def is_long(self) -> bool:
        """Whether anything is saved by shortening it."""
        return self.n_layers > self.least + self.period


@dataclass(frozen=True)
class Blocks:
    """All stretches of a model."""

    stretches: tuple[Stretch, ...]

    @property
    def lengths(self) -> Lengths:
        """Of the model itself."""
        return tuple(stretch.n_layers for stretch in self.stretches)

    def shortened(self, periods: int, last: int | None = None) -> Lengths:
        """With `periods` more than the least in each long stretch, and in the last of these with `last` more."""
        more = {index: periods for index, stretch in enumerate(self.stretches) if stretch.is_long}
        if more and last is not None:
            more[max(more)] = last
        return tuple(
            stretch.least + more[index] * stretch.period if index in more else stretch.n_layers
            for index, stretch in enumerate(self.stretches)
        )

    def is_deep(self, deepest: Lengths) -> bool:
        """Whether shallow models, the deepest of which is this, are worth simulating in its place."""
        return sum(self.lengths) > sum(deepest)

    def outline(self, most: int) -> Outline:
        """At most so many blocks of each stretch by themselves, or a few periods; the others in bundles."""
        lengths: list[int] = []
        numbers: list[int] = []
        bundles: dict[int, Bundle] = {}
        number = 0  # in the model
        for stretch in self.stretches:
            counts = stretch.bundled(most)
            lengths.append(stretch.n_layers - sum(counts) * stretch.period)
            for place in range(lengths[-1]):
                numbers.append(number)
                number += 1
                gap, within = divmod(place - stretch.head + 1, stretch.period)
                if within == 0 and 1 <= gap <= len(counts) and counts[gap - 1]:
                    begin, number = number, number + counts[gap - 1] * stretch.period
                    bundles[len(numbers) - 1] = Bundle(range(begin, number), stretch.period)
        return Outline(tuple(lengths), tuple(numbers), bundles)

    def copies(self, low: Lengths, deep: Lengths) -> Copies:
        """How a model of lengths `deep` is made of one of `low`."""
        return Copies(self, low, deep)


class Bundle(NamedTuple):
    """Whole periods of blocks in the midst of a stretch.

    Attributes:
        numbers: theirs in the model.
    """

    numbers: range
    period: int


class Outline(NamedTuple):
    """A deep model of which some blocks are written out, and the others told in bundles between them.

    Attributes:
        lengths: how many blocks of each stretch are written out.
        numbers: what number each of these has in the model.
        bundles: the others, by the place of the written block that they follow.
    """

    lengths: Lengths
    numbers: tuple[int, ...]
    bundles: Mapping[int, Bundle]


class Copies:
    """Inner blocks of each stretch of a shallow model are copied until it is as long as the deep one's.

    Args:
        low: the shallow model's lengths; `deep`: the other's, in each stretch some whole periods more (or one less).
    """

    def __init__(self, blocks: Blocks, low: Lengths, deep: Lengths) -> None:
        periods = [divmod(b - a, s.period) for s, a, b in zip(blocks.stretches, low, deep, strict=True)]
        assert not any(rest for _, rest in periods), "a whole number of periods more"
        self.periods = sum(number for number, _ in periods)
        self.n_layers = sum(deep)
        starts = [0, *accumulate(low)]
        added = [number * stretch.period for stretch, (number, _) in zip(blocks.stretches, periods, strict=True)]
        before = [0, *accumulate(added)]
        self._sources: list[int] = []
        self._shifts: list[tuple[int, int]] = []
        for number, (stretch, length) in enumerate(zip(blocks.stretches, low, strict=True)):
            self._sources += [starts[number] + one for one in _sources(stretch, length, added[number])]
            first, last = before[number], before[number + 1]
            kept = stretch.head + stretch.period
            for place in range(length):
                self._shifts.append((last if place >= kept else first, last if place else first))

    def source(self, block: int) -> int:
        """The shallow model's block that this one of the deep model copies."""
        return self._sources[block]

    def of(self, block: int) -> Iterator[int]:
        """The deep model's blocks that copy this one of the shallow model."""
        return (copy for copy, source in enumerate(self._sources) if source == block)

    def first(self, block: int) -> int:
        """Where the first copy of a shallow model's block is; one of a stretch's end stays at its end."""
        return block + self._shifts[block][0]

    def last(self, block: int) -> int:
        """The same, where blocks are counted from their stretch's end, but for the one that opens it."""
        return block + self._shifts[block][1]


def _sources(stretch: Stretch, length: int, added: int) -> Iterator[int]:
    last = stretch.head + stretch.period  # those from here on stay at the end
    for block in range(length + added):
        inner = stretch.head + (block - stretch.head) % stretch.period
        kept = block < min(last, last + added)
        yield block if kept else inner if block < last + added else block - added


@dataclass(frozen=True)
class ShallowModels:
    """The same step with fewer blocks.

    Attributes:
        of: the config and workload with a stretch of each of these lengths.
    """

    blocks: Blocks
    of: Callable[[Lengths], tuple[Config, Workload]]


def shallow_models(config: Config, workload: Workload) -> ShallowModels | None:
    """None where the workload does not know how to be shallower."""
    of_depth, settings = workload.of_depth, config.activation_checkpoint
    if of_depth is None:
        return None
    if settings.policy != "plan":
        period = math.lcm(workload.period, settings.every if settings.policy == "every_k" else 1)
        one = Stretch(workload.n_layers, workload.head, period)
        return ShallowModels(Blocks((one,)), lambda lengths: (config, of_depth(sum(lengths))))
    plan = [(policy, len(list(group))) for policy, group in groupby(parse_plan(settings.plan))]
    heads = [workload.head, *[1] * (len(plan) - 1)]
    stretches = tuple(Stretch(count, head, workload.period) for (_, count), head in zip(plan, heads, strict=True))

    def shorter(lengths: Sequence[int]) -> tuple[Config, Workload]:
        policies = [policy for (policy, _), length in zip(plan, lengths, strict=True) for _ in range(length)]
        changes = {"model.n_layers": len(policies), "activation_checkpoint.plan": write_plan(policies)}
        return override(config, changes), of_depth(len(policies))

    return ShallowModels(Blocks(stretches), shorter)
