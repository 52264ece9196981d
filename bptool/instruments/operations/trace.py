"""The record of a step's operations: what each one is for, what it costs, and whose it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bptool.training.instrument import Phase

Kind = Literal["forward", "recompute", "dgrad", "wgrad", "optimizer"]
"""What an operation is for: `dgrad` and `wgrad` are the two gradients that a layer owes, of its input and of its
parameters; `optimizer` is clipping and the update. A gradient may be computed in the forward (the fused loss)."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation, as PyTorch's dispatcher saw it below autograd.

    Attributes:
        phase: announced by the step; the innermost one.
        micro_batch: number of the micro-batch within the step, from 0; 0 for what comes after them.
        module: the call that it belongs to, by the dotted name under which the module was called; in a backward, the
            call that recorded the node. Empty: the model itself, or none of its modules.
        op: aten's name without the overload, such as `mm`.
        flops: of matrix products, convolutions and attention (all T x T scores, also where they are causal); a
            multiply-add is two.
        pointwise_flops: one for each result element of each arithmetic step of any other operation.
        bytes_moved: inputs read once and results written once; views move nothing.
        shapes: of the tensors it takes, such as `[8, 1024] x [1024, 4096]`.
        dtype: in which it computes, such as `bfloat16`; empty where it takes no tensor.
        node: autograd's sequence number: of the node that a forward's operation recorded, or that a backward's belongs
            to; None where there is none.
        start_s, duration_s: on the recorder's clock; 0 on fake tensors.
        causal: whether it is an attention that is told to look at no later position.
        times: how many like operations it stands for, where a step was counted on fake tensors; the costs are of one.
        outside_s: since the operation before it in the same phase ended (or the phase began): Python and autograd.
    """

    phase: Phase
    kind: Kind
    micro_batch: int
    module: str
    op: str
    flops: int
    pointwise_flops: int
    bytes_moved: int
    shapes: str = ""
    dtype: str = ""
    node: int | None = None
    start_s: float = 0.0
    duration_s: float = 0.0
    outside_s: float = 0.0
    causal: bool = False
    times: int = 1


@dataclass(frozen=True)
class OperationTrace:
    """A step's operations in order.

    Attributes:
        calls: how often each module was called in forwards (recomputation not counted), by the name of the call.
        types: the class of each module, by the same names; modules that were never called are among them.
        differentiated: the modules that a backward came through, and those whose own parameters got a gradient.
        recomputed: the modules that activation checkpointing ran again, each as a whole.
    """

    operations: tuple[Operation, ...]
    calls: dict[str, int]
    types: dict[str, str]
    differentiated: frozenset[str] = frozenset()
    recomputed: frozenset[str] = frozenset()
