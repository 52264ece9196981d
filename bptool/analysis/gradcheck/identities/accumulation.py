"""k micro-batches, their gradients added up, are one batch: also where they count unequal numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten  # what torch itself nests tensors with

from bptool.analysis.gradcheck.identities.identity import Agreement, Identity, agree_as_one, as_identity, rounding_unit
from bptool.analysis.gradcheck.model_at_hand import ModelAtHand, gradients
from bptool.model.loss import IGNORED
from bptool.training.step import TrainStep
from bptool.training.workload import Batch

NAME = "accumulation"
_PARTS = (1, 1, 2)
"""Sequences in each micro-batch of the built-in transformer; they count unequal numbers of tokens."""


def accumulation(at_hand: ModelAtHand) -> Identity | str:
    """The identity, or why it cannot be checked."""
    return _of_transformer(at_hand) if at_hand.built_in else _of_workload(at_hand)


def _of_transformer(at_hand: ModelAtHand) -> Identity:
    small = {"training.micro_batch_size": sum(_PARTS), "training.sequence_length": at_hand.few_tokens}
    at_hand = at_hand.changed(small)
    step = at_hand.exact_step()
    (whole,) = at_hand.batches(1, torch.float64)
    masked = {**whole, "targets": _partly_ignored(whole["targets"])}
    parts = _rows(masked, _PARTS)
    agreement = _agrees(step, masked, parts, _counted, "ignored targets")
    counts = ", ".join(str(_counted(part)) for part in parts)
    return as_identity(NAME, [agreement], f"{len(parts)} micro-batches with {counts} counted tokens = one batch")


def _of_workload(at_hand: ModelAtHand) -> Identity | str:
    step, workload = at_hand.exact_step(), at_hand.workload
    parts = at_hand.batches(3, torch.float64)
    whole = _joined(parts)
    if whole is None:
        return f"{NAME}: the workload's micro-batches cannot be joined along a first dimension"
    weights = [int(workload.weight(part)) for part in parts]
    with torch.no_grad(), _as_evaluated(step.model):
        try:
            together = workload.loss(step.model, whole)
        except Exception as error:  # of the user's code, which may know one size of batch alone
            return f"{NAME}: the workload's loss takes no batch of several micro-batches ({type(error).__name__})"
        of_parts = [
            float(workload.loss(step.model, part)) * weight for part, weight in zip(parts, weights, strict=True)
        ]
    one, mean = float(together), sum(of_parts) / max(sum(weights), 1)
    allowed = _operations(step.model, parts) * rounding_unit(together.dtype) * max(abs(one), abs(mean))
    if abs(one - mean) > allowed and at_hand.config.training.gradient_accumulation_steps == 1:
        return (
            f"{NAME}: the loss of {len(parts)} micro-batches together is {one:.6g}, their mean by Workload.weight"
            f" {mean:.6g}: samples are coupled, or random, or `weight` is not what the loss averages over"
        )
    agreement = _agrees(step, whole, parts, workload.weight, "micro-batches")
    counts = ", ".join(map(str, weights))
    return as_identity(NAME, [agreement], f"{len(parts)} micro-batches that count {counts} {workload.unit} = one batch")


def _agrees(
    step: TrainStep, whole: Batch, parts: Sequence[Batch], weight: Callable[[Batch], int], what: str
) -> Agreement:
    """The trainer's own accumulation of the parts, beside plain autograd's gradient of all at once."""
    step.optimizers.zero_grad()
    with _as_evaluated(step.model):
        step.accumulate(parts, [int(weight(part)) for part in parts])
        accumulated = gradients(step.model)
        step.optimizers.zero_grad()
        at_once, unit = _gradient(step, whole)
        with _moved_by(unit, step.model):
            moved = agree_as_one(_gradient(step, whole)[0], at_once, 0.0).relative_error
    # Each operation's rounding does as much to the gradient as a rounding of the weights.
    found = agree_as_one(accumulated, at_once, _operations(step.model, parts) * max(moved, unit))
    return replace(found, where=f"{what}: {found.where}")


def _gradient(step: TrainStep, batch: Batch) -> tuple[dict[str, torch.Tensor | None], float]:
    """Plain autograd's, and the rounding unit of the loss."""
    step.optimizers.zero_grad()
    loss = step.workload.loss(step.model, batch)
    loss.backward()
    return gradients(step.model), rounding_unit(loss.dtype)


@contextmanager
def _moved_by(unit: float, model: nn.Module) -> Iterator[None]:
    """Each weight rounded up or down by a share `unit` of itself, and put back."""
    before = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter, value in before:
            ups = torch.randint(2, value.shape, generator=generator).to(value)
            parameter.copy_(value * (1 + 2 * unit * (2 * ups - 1)))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


@contextmanager
def _as_evaluated(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, whatever the step says: dropout's masks, batch statistics and the experts' imbalance are
    functions of the whole batch."""
    model.eval()
    with patch.object(model, "train", lambda mode=True: model):
        yield


def _operations(model: nn.Module, parts: Sequence[Batch]) -> float:
    """Lengths of all the sums from the loss to the first layer, on both sides: each matrix's, forward and backward, and
    a gradient's sum over everything that the batch holds."""
    sides = sum(sum(parameter.shape) for parameter in model.parameters())
    leaves = [leaf for part in parts for leaf in _leaves(part)]
    return float(4 * sides + 2 * sum(leaf.numel() for leaf in leaves))


def _leaves(batch: Batch) -> list[torch.Tensor]:
    leaves: list[Any] = tree_leaves(batch)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _rows(batch: Batch, counts: Sequence[int]) -> list[Batch]:
    pieces = {key: value.split(list(counts)) for key, value in batch.items()}
    return [{key: piece[number] for key, piece in pieces.items()} for number in range(len(counts))]


def _partly_ignored(targets_BT: torch.Tensor) -> torch.Tensor:
    """Some targets of each sequence, other ones in each, at most half of them."""
    rows, tokens = targets_BT.shape
    ignored = torch.arange(tokens) % (2 + torch.arange(rows)[:, None] % 3) == 1
    return targets_BT.masked_fill(ignored.to(targets_BT.device), IGNORED)


def _counted(batch: Batch) -> int:
    return int((batch["targets"] >= 0).sum())


def _joined(batches: Sequence[Batch]) -> Batch | None:
    """Several micro-batches as one, along the first dimension; None where that cannot be."""
    flat = [tree_flatten(batch) for batch in batches]
    columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
    together: list[Any] = []
    for column in columns:
        if all(isinstance(leaf, Tensor) and leaf.dim() for leaf in column):
            if len({leaf.shape[1:] for leaf in column}) > 1:
                return None
            together.append(torch.cat(column))
        elif any(isinstance(leaf, Tensor) for leaf in column) or any(leaf != column[0] for leaf in column):
            return None
        else:
            together.append(column[0])
    return tree_unflatten(together, flat[0][1])
