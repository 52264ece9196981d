"""What each block should keep so that activations fit a budget and the least is computed again, solved exactly.

Like blocks are counted, not listed: for each kind of block a variable for each way to treat it says how many are
treated so, and one for each operation in how many its result is kept. That makes the mixed-integer linear programme as
small for 126 layers as for two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isclose
from typing import NamedTuple

from bptool.config.block_plan import BlockPolicy, write_saved
from bptool.native_output import native_output_dropped

_DEAREST = 1e3
"""What the largest effort is scaled to: the solver stops within 1e-6 of the optimum."""

_TOLERANCES = (0.0, 1e-6, 1e-5, 1e-4)
"""By how much the budget is narrowed, in turn: the solver keeps it to some 1e-6, and here it is kept to the byte."""

_SOLVER_S = 5.0
"""For which it may look for a better plan than it has; the gap says how much better one could be."""


@dataclass(frozen=True)
class Option:
    """A way to treat a block.

    Attributes:
        n_bytes: what it holds when the forward ends, to any common offset.
        effort: what it costs to compute again, in any unit.
    """

    policy: BlockPolicy
    n_bytes: int
    effort: float


@dataclass(frozen=True)
class Result:
    """Of an operation, which a block may keep.

    Attributes:
        operation: its name in the block.
        n_bytes: what the block then holds more.
        effort: what it spares.
        draws: whether the operation draws random numbers. Where its result is kept, so are those of all that draw some
            after it: what is not run again draws none, and they would draw others.
    """

    operation: str
    n_bytes: int
    effort: float
    draws: bool = False


@dataclass(frozen=True)
class Selection:
    """A block that keeps single results, and computes the rest again.

    Attributes:
        n_bytes, effort: where it keeps none of them.
        results: in the order of the operations.
        known: choices of operations that have a name.
    """

    n_bytes: int
    effort: float
    results: tuple[Result, ...]
    known: Mapping[frozenset[str], BlockPolicy] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """Blocks that are alike: their indices in the model, and the ways to treat each."""

    blocks: tuple[int, ...]
    options: tuple[Option, ...]
    selection: Selection | None = None


@dataclass(frozen=True)
class Plan:
    """The cheapest that fits.

    Attributes:
        policies: of each block, from the first on.
        n_bytes, effort: of all of them together.
        gap: by how much, at most, a better plan could be cheaper, as a share of `effort`; 0: this is the optimum.
    """

    policies: tuple[BlockPolicy, ...]
    n_bytes: int
    effort: float
    gap: float


@dataclass(frozen=True)
class Times:
    """What recomputation does to forward and backward: the backward takes as much longer as is computed again.

    Attributes:
        forward, backward, again: of one micro-batch, or of one layer; in seconds, or in any other unit of work. The
            backward is what it is where nothing is computed again.
    """

    forward: float
    backward: float
    again: float = 0.0

    @property
    def backward_and_again(self) -> float:
        """The backward with the recomputation that it waits for."""
        return self.backward + self.again

    @property
    def overhead(self) -> float:
        """What recomputation adds to forward and backward, as a share of both."""
        return self.again / (self.forward + self.backward)

    def __add__(self, other: Times) -> Times:
        return Times(self.forward + other.forward, self.backward + other.backward, self.again + other.again)


def least_bytes(kinds: Sequence[Kind]) -> int:
    """What the blocks hold where each is treated so as to hold least."""
    return sum(len(kind.blocks) * _least(kind) for kind in kinds)


def cheapest(kinds: Sequence[Kind], budget_bytes: int) -> Plan:
    """The plan of least effort that holds `budget_bytes` at most, which `least_bytes` must not exceed.

    Among like blocks the first hold least: the backward comes to them last, when the others' tensors are gone.
    """
    assert least_bytes(kinds) <= budget_bytes, "the caller has told the user"
    kinds = [_worth_while(kind) for kind in kinds]
    bound = 0.0
    for tolerance in _TOLERANCES:
        counts, lower = _solve(kinds, budget_bytes, tolerance)
        bound = lower if tolerance == 0 else bound
        treated = [_treated(kind, of_kind) for kind, of_kind in zip(kinds, counts, strict=False)]
        if counts and sum(option.n_bytes for options in treated for option in options) <= budget_bytes:
            break
    else:
        treated = [[_most_frugal(kind)] * len(kind.blocks) for kind in kinds]
    chosen = dict(pair for kind, options in zip(kinds, treated, strict=True) for pair in _laid_out(kind, options))
    effort = sum(option.effort for option in chosen.values())
    gap = 0.0 if effort <= bound or isclose(effort, bound, rel_tol=1e-9) else (effort - bound) / effort
    policies = tuple(chosen[block].policy for block in sorted(chosen))
    return Plan(policies, sum(option.n_bytes for option in chosen.values()), effort, gap)


class _Counts(NamedTuple):
    """Of a kind: how many of its blocks are treated in each way, how many select, and how many keep each result."""

    options: list[int]
    selecting: int
    results: list[int]


@dataclass
class _Programme:
    """The mixed-integer linear programme: a column for each count, in the order of `_Counts`.

    Attributes:
        rows: of the constraints, by column, each with the least and the most that it may come to.
    """

    sizes: list[float] = field(default_factory=list)
    efforts: list[float] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float, float]] = field(default_factory=list)

    def add(self, kind: Kind) -> None:
        """Offsets are taken out of the bytes, so that the numbers are the differences that matter."""
        floor, columns = _least(kind), len(self.sizes)
        ways = _ways(kind)
        self.sizes += [float(way.n_bytes - floor) for way in ways]
        self.efforts += [way.effort for way in ways]
        count = float(len(kind.blocks))
        self.rows.append((dict.fromkeys(range(columns, columns + len(ways)), 1.0), count, count))
        if kind.selection:
            self._add_results(kind.selection, columns + len(ways) - 1)

    def _add_results(self, selection: Selection, selecting: int) -> None:
        drawing = -1
        for column, result in enumerate(selection.results, start=selecting + 1):
            self.sizes.append(float(result.n_bytes))
            self.efforts.append(-result.effort)
            self.rows.append(({column: 1.0, selecting: -1.0}, -float("inf"), 0.0))
            if result.draws:
                if drawing >= 0:
                    self.rows.append(({drawing: 1.0, column: -1.0}, -float("inf"), 0.0))
                drawing = column


def _solve(kinds: Sequence[Kind], budget_bytes: int, tolerance: float) -> tuple[list[_Counts], float]:
    """The counts, none where there was no time to find any, and what no plan can be cheaper than."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    programme = _Programme()
    for kind in kinds:
        programme.add(kind)
    sizes, efforts = np.array(programme.sizes), np.array(programme.efforts)
    largest, unit = max(sizes.max(), 1.0), (np.abs(efforts).max() or 1.0) / _DEAREST
    room = float(budget_bytes - least_bytes(kinds)) / largest
    matrix = np.zeros((len(programme.rows), len(sizes)))
    for row, (columns, _, _) in enumerate(programme.rows):
        matrix[row, list(columns)] = list(columns.values())
    lower, upper = np.array([row[1:] for row in programme.rows]).T
    with native_output_dropped():  # the solver tells of its insides, unasked
        found = milp(
            efforts / unit,
            integrality=np.ones(len(sizes)),
            bounds=Bounds(0, np.inf),
            constraints=[
                LinearConstraint(matrix, lower, upper),
                LinearConstraint(sizes[None] / largest, -np.inf, room * (1 - tolerance)),
            ],
            options={"mip_rel_gap": 0.0, "time_limit": _SOLVER_S},
        )
    bound = 0.0 if found.mip_dual_bound is None else max(float(found.mip_dual_bound) * unit, 0.0)
    if found.x is None:
        return [], bound
    numbers = iter(np.rint(found.x).astype(int).tolist())
    return [_counts(kind, numbers) for kind in kinds], bound


def _counts(kind: Kind, numbers: Iterator[int]) -> _Counts:
    options = [next(numbers) for _ in kind.options]
    if kind.selection is None:
        return _Counts(options, 0, [])
    return _Counts(options, next(numbers), [next(numbers) for _ in kind.selection.results])


def _worth_while(kind: Kind) -> Kind:
    """Without options that another one beats, or equals, in both bytes and effort, the smallest first; and without
    results that spare nothing, but for those that come along with others."""
    options: list[Option] = []
    for option in sorted(kind.options, key=lambda option: (option.n_bytes, option.effort)):
        if not options or option.effort < options[-1].effort:
            options.append(option)
    selection = kind.selection
    if selection:
        kept = tuple(result for result in selection.results if result.effort > 0 or result.draws)
        selection = replace(selection, results=kept)
    return Kind(kind.blocks, tuple(options), selection)


def _least(kind: Kind) -> int:
    return _most_frugal(kind).n_bytes


def _most_frugal(kind: Kind) -> Option:
    return min(_ways(kind), key=lambda option: (option.n_bytes, option.effort))


def _ways(kind: Kind) -> list[Option]:
    """Its options, and last, where it may select, to keep none of the results."""
    return [*kind.options, *([_selecting(kind.selection, [])] if kind.selection else [])]


def _treated(kind: Kind, counts: _Counts) -> list[Option]:
    """How each of the kind's blocks is treated, in no order; of those that select each keeps what the next one does."""
    options = [option for option, number in zip(kind.options, counts.options, strict=True) for _ in range(number)]
    for rank in range(counts.selecting):
        assert kind.selection is not None, "else nothing was counted"
        pairs = zip(kind.selection.results, counts.results, strict=True)
        options.append(_selecting(kind.selection, [result for result, number in pairs if number > rank]))
    return options


def _selecting(selection: Selection, kept: Sequence[Result]) -> Option:
    operations = frozenset(result.operation for result in kept)
    return Option(
        selection.known.get(operations) or (write_saved(operations) if operations else "full"),
        selection.n_bytes + sum(result.n_bytes for result in kept),
        selection.effort - sum(result.effort for result in kept),
    )


def _laid_out(kind: Kind, options: Sequence[Option]) -> Iterator[tuple[int, Option]]:
    return zip(sorted(kind.blocks), sorted(options, key=lambda option: option.n_bytes), strict=True)
