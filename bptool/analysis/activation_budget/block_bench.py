"""A model's blocks one by one, on fake tensors: what each holds, treated in some way, and what it runs.

A shallow model is run once, and then one block of each kind by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map  # what torch itself nests tensors with

from bptool.analysis.machine import Machine
from bptool.analysis.memory.simulation import eager_on_cpu
from bptool.config.block_plan import BlockPolicy, write_plan
from bptool.config.overrides import override
from bptool.config.schema import ActivationCheckpointSettings, Config
from bptool.instruments.memory.ledger import MemoryLedger
from bptool.instruments.memory.trace import MemoryTrace, total_bytes
from bptool.instruments.operations.log import Operation, OperationLog, Shape, shapes_of
from bptool.instruments.packed_sequences import taken_for_unpacked
from bptool.model.alike import abridging
from bptool.training.activation_checkpoint import SUBLAYER_POLICIES, announced, apply, apply_offload, has_sublayers
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.step import TrainStep
from bptool.training.workload import Workload, one, transformer_workload

_CPU = torch.device("cpu")
Call = tuple[Any, Any]
"""Positional and keyword arguments, with a `Shape` in the place of each tensor."""
Phases = Mapping[str, Sequence[Operation]]
"""What was run in the phases `forward`, `backward` and `recompute`."""


class Seen(NamedTuple):
    """One micro-batch of the whole model, nothing recomputed: bytes held when its forward ends, and what was run."""

    held: int
    phases: Phases
    calls: dict[int, Call]
    """How one block of each kind was called, by the index of the kind's first block in the whole model."""


class Alone(NamedTuple):
    """The same of one block, treated in some way; its input is among the bytes."""

    held: int
    phases: Phases


class _Built(NamedTuple):
    step: TrainStep
    ledger: MemoryLedger
    log: OperationLog


@dataclass(frozen=True)
class BlockBench:
    """A model on fake tensors, no deeper than it takes to see one block of each kind.

    Attributes:
        n_blocks: that are here.
        representatives: for each kind, the index of its first block in the whole model, and of one that is here.
    """

    config: Config
    workload: Workload
    machine: Machine
    n_blocks: int
    representatives: dict[int, int]

    @classmethod
    def of(cls, config: Config, workload: Workload, machine: Machine, kinds: Sequence[Sequence[int]]) -> BlockBench:
        """Where the workload can be had with fewer blocks, so few that each kind has one that is not first or last."""
        plain = override(eager_on_cpu(config), {"activation_checkpoint.policy": "none"})
        n_blocks = sum(map(len, kinds))
        enough = max(kind[0] for kind in kinds) + 3
        if workload.of_depth is not None and enough < n_blocks:
            plain = override(plain, {"model.n_layers": enough})
            workload, n_blocks = transformer_workload(plain), enough
        inner = {kind[0]: next((i for i in kind if 0 < i < n_blocks), kind[0]) for kind in kinds}
        return cls(plain, workload, replace(machine, fake=True), n_blocks, inner)

    def step(self) -> Seen:
        """Run one micro-batch."""
        calls: dict[int, Call] = {}
        with self._built() as (step, ledger, log):
            blocks = self.workload.blocks(step.model)
            for index, block in ((first, blocks[here]) for first, here in self.representatives.items()):
                block.register_forward_pre_hook(partial(_note_call, calls, index), with_kwargs=True)
            with step.announcer.phase("step"), abridging(iter):
                step.accumulate([step.workload.batch(torch.Generator())], [1])
            return Seen(_held_by_forward(ledger.trace()), log.by_phase, calls)

    def alone(
        self, calls: Mapping[int, Call], ways: Mapping[int, Sequence[BlockPolicy]] | None = None
    ) -> dict[int, dict[BlockPolicy, Alone]]:
        """One block of each kind by itself, treated in each of the kind's ways.

        Args:
            ways: by the kind's first block; None: those that need no choice of operations.
        """
        found: dict[int, dict[BlockPolicy, Alone]] = {}
        with self._built() as built:
            blocks = self.workload.blocks(built.step.model)
            for first, call in calls.items():
                block = blocks[self.representatives[first]]
                own = _whole(block) if ways is None else ways[first]
                found[first] = {policy: _alone(block, policy, call, built) for policy in own}
        return found

    @contextmanager
    def _built(self) -> Iterator[_Built]:
        log = OperationLog()
        with self.machine.simulated() as ledger:
            step = build_step(self.config, replace(self.workload, weight=one), _CPU, Announcer([ledger, log]))
            step.model.train()
            with taken_for_unpacked(), log:
                yield _Built(step, ledger, log)


def _whole(block: nn.Module) -> list[BlockPolicy]:
    """Nothing of a block is computed again, or all, or a sublayer."""
    return ["none", "full", *(policy for policy in SUBLAYER_POLICIES if has_sublayers(block, policy))]


def _note_call(calls: dict[int, Call], index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
    calls[index] = shapes_of((args, kwargs))


def _alone(block: nn.Module, policy: BlockPolicy, call: Call, built: _Built) -> Alone:
    step, ledger, log = built
    before = {module: module.__dict__.get("forward") for module in block.modules()}
    given = tree_map(lambda leaf: leaf.empty() if isinstance(leaf, Shape) else leaf, call)
    since = len(ledger.trace().events)
    log.by_phase = {}
    settings = ActivationCheckpointSettings(policy="plan", plan=write_plan([policy]))
    apply([block], settings, announced(step.announcer))
    apply_offload([block], settings)
    try:
        # Its input is the block's to keep, or not; angles and masks are there anyway.
        args, kwargs = tree_map(lambda leaf: leaf.clone() if _has_gradient(leaf) else leaf, given)
        with step.announcer.phase("forward"), step.precision.autocast():
            outputs = [leaf for leaf in tree_leaves(block(*args, **kwargs)) if _has_gradient(leaf)]
        # A sum's backward needs no tensor. Where nothing of the block is trained there is none.
        total = sum((output.sum().float() for output in outputs), torch.zeros(()))
        del args, kwargs, outputs
        held = total_bytes([a for a in ledger.trace().live_at(sys.maxsize) if a.born >= since]) - total.nbytes
        with step.announcer.phase("backward"):
            if total.requires_grad:
                total.backward()
    finally:
        step.optimizers.zero_grad()
        for module, forward in before.items():
            module.__dict__.pop("forward", None) if forward is None else setattr(module, "forward", forward)
    return Alone(held, log.by_phase)


def _has_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _held_by_forward(trace: MemoryTrace) -> int:
    forward = trace.events_of(0, "forward")
    live = trace.live_at(int(forward[-1]))
    return total_bytes([a for a in live if a.born >= forward[0] and a.phase == "forward"])
