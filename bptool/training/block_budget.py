"""What each block should keep so that activations fit a budget and the least is computed again, solved exactly.

Like blocks are counted, not listed: a variable for each kind of block and each way to treat it says how many are
treated so, which makes the mixed-integer linear programme as small for 126 layers as for two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isclose

from bptool.config.block_plan import BlockPolicy

_DEAREST = 1e3
"""What the largest effort is scaled to: the solver stops within 1e-6 of the optimum."""

_TOLERANCES = (0.0, 1e-6, 1e-5, 1e-4)
"""By how much the budget is narrowed, in turn: the solver keeps it to some 1e-6, and here it is kept to the byte."""


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
class Kind:
    """Blocks that are alike: their indices in the model, and the ways to treat each."""

    blocks: tuple[int, ...]
    options: tuple[Option, ...]


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
    return sum(len(kind.blocks) * min(option.n_bytes for option in kind.options) for kind in kinds)


def cheapest(kinds: Sequence[Kind], budget_bytes: int) -> Plan:
    """The plan of least effort that holds `budget_bytes` at most, which `least_bytes` must not exceed.

    Among like blocks the first hold least: the backward comes to them last, when the others' tensors are gone.
    """
    assert least_bytes(kinds) <= budget_bytes, "the caller has told the user"
    kinds = [Kind(kind.blocks, _worth_while(kind.options)) for kind in kinds]
    bound = 0.0
    for tolerance in _TOLERANCES:
        counts, lower = _solve(kinds, budget_bytes, tolerance)
        bound = lower if tolerance == 0 else bound
        if counts and _bytes(kinds, counts) <= budget_bytes:
            break
    else:
        counts = [[len(kind.blocks), *[0] * (len(kind.options) - 1)] for kind in kinds]
    effort = _effort(kinds, counts)
    gap = 0.0 if effort <= bound or isclose(effort, bound, rel_tol=1e-9) else (effort - bound) / effort
    return Plan(_laid_out(kinds, counts), _bytes(kinds, counts), effort, gap)


def _solve(kinds: Sequence[Kind], budget_bytes: int, tolerance: float) -> tuple[list[list[int]], float]:
    """How many blocks of each kind are treated in each way, and what no plan can be cheaper than."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    options = [(index, option) for index, kind in enumerate(kinds) for option in kind.options]
    # Offsets are taken out, so that the numbers are the differences that matter, and as large as 1.
    floors = [min(option.n_bytes for option in kind.options) for kind in kinds]
    sizes = np.array([option.n_bytes - floors[index] for index, option in options], dtype=float)
    efforts = np.array([option.effort for _, option in options], dtype=float)
    largest, unit = max(sizes.max(), 1.0), (efforts.max() or 1.0) / _DEAREST
    room = float(budget_bytes - least_bytes(kinds)) / largest
    belongs = np.array([[float(index == kind) for index, _ in options] for kind in range(len(kinds))])
    lengths = np.array([len(kind.blocks) for kind in kinds], dtype=float)
    found = milp(
        efforts / unit,
        integrality=np.ones(len(options)),
        bounds=Bounds(0, np.inf),
        constraints=[
            LinearConstraint(belongs, lengths, lengths),
            LinearConstraint(sizes[None] / largest, -np.inf, room * (1 - tolerance)),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return [], 0.0
    numbers = iter(np.rint(found.x).astype(int).tolist())
    counts = [[next(numbers) for _ in kind.options] for kind in kinds]
    return counts, float(found.mip_dual_bound) * unit


def _worth_while(options: Sequence[Option]) -> tuple[Option, ...]:
    """Those that no other one beats, or equals, in both bytes and effort; the smallest first."""
    found: list[Option] = []
    for option in sorted(options, key=lambda option: (option.n_bytes, option.effort)):
        if not found or option.effort < found[-1].effort:
            found.append(option)
    return tuple(found)


def _bytes(kinds: Sequence[Kind], counts: Sequence[Sequence[int]]) -> int:
    return sum(option.n_bytes * number for option, number in _treated(kinds, counts))


def _effort(kinds: Sequence[Kind], counts: Sequence[Sequence[int]]) -> float:
    return sum(option.effort * number for option, number in _treated(kinds, counts))


def _treated(kinds: Sequence[Kind], counts: Sequence[Sequence[int]]) -> Iterator[tuple[Option, int]]:
    for kind, row in zip(kinds, counts, strict=True):
        yield from zip(kind.options, row, strict=True)


def _laid_out(kinds: Sequence[Kind], counts: Sequence[Sequence[int]]) -> tuple[BlockPolicy, ...]:
    policies: dict[int, BlockPolicy] = {}
    for kind, row in zip(kinds, counts, strict=True):
        treated = [option.policy for option, number in zip(kind.options, row, strict=True) for _ in range(number)]
        policies |= dict(zip(sorted(kind.blocks), treated, strict=True))
    return tuple(policies[block] for block in sorted(policies))
