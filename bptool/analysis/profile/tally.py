"""A step's operations summed up: by phase, what they are for, module and operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from bptool.instruments.operations.trace import Kind, Operation, OperationTrace
from bptool.training.instrument import Phase


class Place(NamedTuple):
    """Which operations are summed; how fast they can be depends on the last two.

    Attributes:
        dtype: in which they compute.
        causal: whether they are an attention that looks at no later position.
    """

    phase: Phase
    kind: Kind
    module: str
    op: str
    dtype: str = ""
    causal: bool = False


class Cost(NamedTuple):
    """Of some operations together."""

    flops: int = 0
    pointwise_flops: int = 0
    bytes_moved: int = 0
    calls: int = 0

    def plus(self, other: Cost, times: int = 1) -> Cost:
        """With so many times the other's."""
        return Cost(  # written out: a deep model has tens of thousands of them
            self.flops + times * other.flops,
            self.pointwise_flops + times * other.pointwise_flops,
            self.bytes_moved + times * other.bytes_moved,
            self.calls + times * other.calls,
        )


NOTHING = Cost()


class ModuleFacts(NamedTuple):
    """What is known of a module besides its operations.

    Attributes:
        type: its class.
        calls: in the step's forwards.
        parameters, trainable: numbers of its own, without its submodules'; a shared parameter is its first owner's.
        differentiated: whether the backward came through it or to its parameters.
        recomputed: whether activation checkpointing ran it again, as a whole.
    """

    type: str
    calls: int
    parameters: int
    trainable: int
    differentiated: bool
    recomputed: bool = False


@dataclass(frozen=True)
class Tally:
    """A step, all micro-batches together.

    Attributes:
        modules: all of the model's, by name; the model itself is the empty one.
    """

    costs: Mapping[Place, Cost]
    modules: Mapping[str, ModuleFacts] = field(default_factory=dict)

    def flops(self, *kinds: Kind) -> int:
        """Of matrix products, convolutions and attention that are for this."""
        return sum(cost.flops for place, cost in self.costs.items() if place.kind in kinds)

    def by_module(self) -> dict[str, dict[Kind, Cost]]:
        """Each module's own, by what it is for; modules without operations are not there."""
        found: dict[str, dict[Kind, Cost]] = {}
        for place, cost in self.costs.items():
            costs = found.setdefault(place.module, {})
            costs[place.kind] = costs.get(place.kind, NOTHING).plus(cost)
        return found

    def by_op(self) -> dict[tuple[str, Kind], Cost]:
        """Each operation's, by what it is for."""
        found: dict[tuple[str, Kind], Cost] = {}
        for place, cost in self.costs.items():
            found[place.op, place.kind] = found.get((place.op, place.kind), NOTHING).plus(cost)
        return found


def tally_of(trace: OperationTrace, model: nn.Module, micro_batches: int, ran: int) -> Tally:
    """Of a step with so many micro-batches, of which the trace holds the first: later ones do what the second does.

    Args:
        model: whose parameters are counted.
        ran: how many micro-batches the trace holds: all, or two.
    """
    costs: dict[Place, Cost] = {}
    for operation in trace.operations:
        of = operation
        place = Place(of.phase, of.kind, of.module, of.op, of.dtype, of.causal)
        cost = Cost(operation.flops, operation.pointwise_flops, operation.bytes_moved, 1)
        again = micro_batches - 1 if ran < micro_batches and _is_of_second(operation) else 1
        costs[place] = costs.get(place, NOTHING).plus(cost, operation.times * again)
    for place in [place for place in costs if place.phase == "data"]:
        costs[place] = Cost(*(number * micro_batches // ran for number in costs[place]))
    calls = {name: calls * micro_batches // ran for name, calls in trace.calls.items()}
    return Tally(costs, _facts(trace, model, calls))


def _is_of_second(operation: Operation) -> bool:
    """Whether it is the second micro-batch's, or adds its loss to the step's."""
    return operation.micro_batch == 1 or operation.phase == "step"


def _facts(trace: OperationTrace, model: nn.Module, calls: Mapping[str, int]) -> dict[str, ModuleFacts]:
    parameters, trainable = dict.fromkeys(trace.types, 0), dict.fromkeys(trace.types, 0)
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        parameters[owner] += parameter.numel()
        trainable[owner] += parameter.numel() if parameter.requires_grad else 0
    return {
        name: ModuleFacts(
            type=kind,
            calls=calls.get(name, 0),
            parameters=parameters[name],
            trainable=trainable[name],
            differentiated=name in trace.differentiated,
            recomputed=name in trace.recomputed,
        )
        for name, kind in trace.types.items()
    }
