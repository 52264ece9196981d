"""What the rest of a training step does to a gradient: recomputation, clipping and the plainest update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from bptool.analysis.gradcheck.identities.identity import (
    Agreement,
    Identity,
    agree_as_one,
    as_identity,
    rounding_unit,
)
from bptool.analysis.gradcheck.model_at_hand import ModelAtHand, gradients
from bptool.config.block_plan import BLOCK_POLICIES
from bptool.config.overrides import of_mode
from bptool.errors import BptoolError
from bptool.training.activation_checkpoint import SUBLAYER_POLICIES, has_sublayers
from bptool.training.instrument import Instrument, Phase
from bptool.training.selective import NotRepeated

CHECKPOINTING, CLIPPING, DESCENT = "activation_checkpointing", "clipping_norm", "gradient_descent_update"
_DROPOUT = 0.1
_RECOMPUTABLE = "a block can be computed again where it keeps nothing from call to call, such as a cache of keys"
_EPS = 1e-6
"""What clipping adds to the norm, so that a gradient of zero divides nothing by zero."""


def activation_checkpointing(at_hand: ModelAtHand) -> Identity | str:
    """Every policy's gradient is that of no policy, to the bit: in the trainer's own float32, with dropout on.

    Returns:
        The identity, or why it cannot be checked.
    """
    plain = of_mode("fp32") | {"training.compile": False, "activation_checkpoint.policy": "none"}
    if at_hand.built_in:
        plain["model.dropout"] = at_hand.config.model.dropout or _DROPOUT
        plain |= {"training.micro_batch_size": 1, "training.sequence_length": at_hand.few_tokens}  # bits are bits
    at_hand = at_hand.changed(plain)
    without, again = _trained_gradient(at_hand), _trained_gradient(at_hand)
    if agree_as_one(again, without, 0.0).relative_error:
        return f"{CHECKPOINTING}: the gradient is another at each run, whatever the policy"
    blocks = at_hand.workload.blocks(at_hand.trained_step().model)
    if not blocks:
        return f"{CHECKPOINTING}: the workload has no repeated blocks to recompute"
    policies = _policies(blocks)
    agreements = [
        _policy_agrees(at_hand.changed({"activation_checkpoint.policy": policy}), without, policy)
        for policy in policies
        if policy != "none"
    ]
    dropout = f", dropout {plain['model.dropout']:g} drawn again" if at_hand.built_in else ""
    return as_identity(CHECKPOINTING, agreements, f"{', '.join(policies)}: the same gradient to the bit{dropout}")


def _policies(blocks: Sequence[nn.Module]) -> list[str]:
    """All that can be had of these blocks. A plan or a budget, whose blocks do one or another of these, is left out."""
    foreign = [policy for policy in SUBLAYER_POLICIES if not any(has_sublayers(block, policy) for block in blocks)]
    return [policy for policy in (*BLOCK_POLICIES, "every_k") if policy not in foreign]


def clipping(at_hand: ModelAtHand) -> Identity:
    """The norm over all parameters together, and a gradient above it scaled by c / (norm + 1e-6), below it left alone.

    The step reads the norm in float32, once: its rounding is all that is allowed.
    """
    free = _clipped(at_hand, 0.0)
    used = [gradient for gradient in free.gradients.values() if gradient is not None]
    norm = math.sqrt(math.fsum(float(gradient.double().square().sum()) for gradient in used))
    if not math.isfinite(norm) or not math.isfinite(free.norm):
        nothing = Agreement(False, math.nan, 0.0, f"the norm is {free.norm}")
        return as_identity(CLIPPING, [nothing], "the norm over all gradients together")
    n_numbers = sum(gradient.numel() for gradient in used)
    tolerance = 2 * rounding_unit(torch.float32) + (n_numbers + 4) * rounding_unit(torch.float64)
    agreements, limit = [_norm_agrees(free.norm, norm, tolerance)], norm / 2
    for clip_norm in (limit, 2 * norm):
        if clip_norm == 0:
            continue
        factor = min(1.0, clip_norm / (norm + _EPS))
        expected = {name: None if g is None else g * factor for name, g in free.gradients.items()}
        found = agree_as_one(_clipped(at_hand, clip_norm).gradients, expected, tolerance if factor < 1 else 0.0)
        where = f"clipped to {clip_norm:.3g}, {found.where}"
        agreements.append(Agreement(found.holds, found.relative_error, found.tolerance, where))
    factor = limit / (norm + _EPS)
    detail = (
        f"the norm over all {len(used)} gradients together is {norm:.6g}; clipped to {limit:.4g} each is scaled by"
        f" c / (norm + 1e-6) = {factor:.6g}"
    )
    return as_identity(CLIPPING, agreements, detail, {"norm": norm, "factor": factor})


def gradient_descent(at_hand: ModelAtHand) -> Identity:
    """`theta - lr grad`, to the bit: in the trainer's own step, with its own gradient."""
    changes: dict[str, object] = {"optimizer.name": "gradient-descent", "optimizer.implementation": "auto"}
    changes |= {
        **of_mode("fp32"),
        "training.compile": False,
        "schedule.name": "constant",
        "schedule.warmup_steps": 0,
    }
    seen = _AtUpdate()
    at_hand = at_hand.changed(changes)
    step = at_hand.trained_step(seen)
    seen.model = step.model
    before = _copies(step.model)
    outcome = step(0, at_hand.batches(1, None))
    expected = {
        name: theta if (gradient := seen.gradients.get(name)) is None else theta - outcome.lr * gradient
        for name, theta in before.items()
    }
    found = agree_as_one(_copies(step.model), expected, 0.0)
    moved = math.sqrt(sum(float((expected[name] - before[name]).double().square().sum()) for name in before))
    detail = f"theta - lr grad to the bit, lr = {outcome.lr:g}; the update's norm is {moved:.4g}"
    return as_identity(DESCENT, [found], detail, {"update_norm": moved, "lr": outcome.lr})


class _AtUpdate(Instrument):
    """Keeps a copy of the gradients that the optimizer is about to use."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.gradients: dict[str, Tensor | None] = {}
        self.norm = math.nan

    def phase(self, name: Phase) -> AbstractContextManager[object]:
        return self._look(name)

    @contextmanager
    def _look(self, name: Phase) -> Iterator[None]:
        if name == "optimizer" and self.model is not None:
            self.gradients = gradients(self.model)
        yield


def _clipped(at_hand: ModelAtHand, clip_norm: float) -> _AtUpdate:
    """One step in float64, from the same weights, batch and dropout."""
    seen = _AtUpdate()
    step = at_hand.changed({"training.clip_norm": clip_norm}).exact_step(seen)
    seen.model = step.model
    at_hand.seed_all("dropout")
    seen.norm = step(0, at_hand.batches(1, torch.float64)).grad_norm
    return seen


def _norm_agrees(found: float, expected: float, tolerance: float) -> Agreement:
    error = abs(found - expected) / expected if expected else abs(found)
    if abs(found - expected) < torch.finfo(torch.float32).tiny:  # read in float32, below its normal numbers
        error = min(error, tolerance)
    return Agreement(error <= tolerance, error, tolerance, f"the norm is {found:.6g}, not {expected:.6g}")


def _policy_agrees(at_hand: ModelAtHand, without: Mapping[str, Tensor | None], policy: str) -> Agreement:
    """A policy's gradient beside that of none; a recomputation that raises is no gradient."""
    try:
        found = agree_as_one(_trained_gradient(at_hand), without, 0.0)
    except Exception as error:
        if isinstance(error, BptoolError | MemoryError | torch.OutOfMemoryError) and not isinstance(error, NotRepeated):
            raise
        # Else it is of PyTorch's recomputation, or of the user's block that is run a second time.
        return Agreement(False, math.inf, 0.0, f"policy {policy} raises {_first_sentence(error)}; {_RECOMPUTABLE}")
    return Agreement(found.holds, found.relative_error, found.tolerance, f"policy {policy}, {found.where}")


def _first_sentence(error: Exception) -> str:
    sentence = str(error).partition(". ")[0].partition("\n")[0]
    return f"{type(error).__name__}: {sentence}"


def _trained_gradient(at_hand: ModelAtHand) -> dict[str, Tensor | None]:
    step = at_hand.trained_step()
    at_hand.seed_all("dropout")
    step.accumulate(at_hand.batches(1, None), [1])
    return gradients(step.model)


def _copies(model: nn.Module) -> Mapping[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
