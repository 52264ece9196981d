"""One training step: forward, backward, clip, update, as announced phases.

Every command runs this step: `train` repeats it, the memory estimate runs it on fake tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # no public name tells a fake tensor from a real one

from bptool.training.instrument import Announcer
from bptool.training.optimizers import Optimizers
from bptool.training.precision import Precision
from bptool.training.workload import Batch, Workload


@dataclass(frozen=True)
class StepOutcome:
    """What one step did.

    Attributes:
        loss: mean over everything that the step's micro-batches count (tokens), before the update.
        grad_norm: global L2 norm of the gradient, before clipping.
        lr: learning rate of this step.
        weight: what the step counted in all (tokens).
        applied: whether the parameters were updated.
        finite: whether loss and gradient were; under fp16, a gradient that only its scaling made infinite counts.
    """

    loss: float
    grad_norm: float
    lr: float
    weight: int
    applied: bool
    finite: bool


class TrainStep:
    """Gradient accumulation, clipping and update of one model.

    Args:
        learning_rate: of step n, counted from 0.
        clip_norm: global gradient norm above which gradients are scaled down to it; 0: never.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        workload: Workload,
        optimizers: Optimizers,
        precision: Precision,
        learning_rate: Callable[[int], float],
        clip_norm: float,
        announcer: Announcer,
    ) -> None:
        self.model = model
        self.workload = workload
        self.optimizers = optimizers
        self.precision = precision
        self.announcer = announcer
        self._learning_rate = learning_rate
        self._clip_norm = clip_norm

    def __call__(self, step: int, micro_batches: Sequence[Batch]) -> StepOutcome:
        """Run step `step`, counted from 0; its random numbers are drawn from PyTorch's global generators.

        A loss or gradient that is not finite leaves the parameters as they were.
        """
        weights = [int(self.workload.weight(batch)) for batch in micro_batches]  # a user's may be a tensor
        loss = self.accumulate(micro_batches, weights)
        with self.announcer.phase("clip"):
            scaled_norm = torch.nn.utils.get_total_norm(self._gradients())
            # The step's only device synchronisation: both values, before the update.
            loss_value, norm_value = _host_values(loss, scaled_norm / self._scale)
            finite = math.isfinite(loss_value) and math.isfinite(norm_value)
            if finite:
                self._rescale(norm_value)
        lr = self._learning_rate(step)
        applied = self._note_finite(loss_value, finite)
        if applied:
            self.optimizers.set_learning_rate(lr)
            with self.announcer.phase("optimizer"):
                self.optimizers.step()
        self.optimizers.zero_grad()
        overflow_only = not finite and math.isfinite(loss_value) and not self._scale_exhausted
        return StepOutcome(loss_value, norm_value, lr, sum(weights), applied, finite or overflow_only)

    def persistent_tensors(self) -> list[Tensor]:
        """What lives from one step to the next: weights, buffers and the optimizer's state, where there is one yet."""
        return [*self.model.parameters(), *self.model.buffers(), *self.optimizers.state().values()]

    def accumulate(self, micro_batches: Sequence[Batch], weights: Sequence[int]) -> Tensor:
        """Forward and backward of every micro-batch; gradients add up in `.grad`, times the loss scale.

        Each micro-batch's mean loss is weighted by its share of the step's total *before* its backward, so that the sum
        is the gradient of one batch even where the micro-batches hold unequal numbers of valid tokens.

        Returns:
            The step's mean loss, a scalar on the device.
        """
        assert micro_batches, "a step has at least one micro-batch"
        total = max(sum(weights), 1)
        shares = [weight / total for weight in weights] if len(weights) > 1 else [1.0]
        self.model.train()
        step_loss = self._forward_and_backward(micro_batches[0], shares[0])
        for batch, share in zip(micro_batches[1:], shares[1:], strict=True):
            step_loss = step_loss + self._forward_and_backward(batch, share)
        return step_loss

    def _forward_and_backward(self, batch: Batch, share: float) -> Tensor:
        """One micro-batch; returns its part of the step's loss."""
        with self.announcer.phase("forward"), self.precision.autocast():
            loss = self.workload.loss(self.model, batch)
            loss = loss * share if share != 1 else loss
        with self.announcer.phase("backward"):
            (loss * self._scale if self._scale != 1 else loss).backward()
        return loss.detach()

    @property
    def _scale(self) -> float:
        return self.precision.loss_scale.value if self.precision.loss_scale else 1.0

    @property
    def _scale_exhausted(self) -> bool:
        return self.precision.loss_scale is None or self.precision.loss_scale.exhausted

    def _note_finite(self, loss: float, finite: bool) -> bool:
        """Whether to apply the update; fp16's scale learns of a gradient that overflowed."""
        if self.precision.loss_scale and math.isfinite(loss):
            self.precision.loss_scale.update(finite=finite)
        return finite

    def _rescale(self, norm: float) -> None:
        """Undo the loss scale and clip, in one pass over the gradients, or in none where neither is due."""
        clip = min(1.0, self._clip_norm / (norm + 1e-6)) if self._clip_norm else 1.0
        factor = clip / self._scale
        if factor != 1.0:
            # The underscore is all that is private about it: PyTorch's only operation on a list of tensors, one launch.
            torch._foreach_mul_(self._gradients(), factor)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.optimizers.parameters if p.grad is not None]


def _host_values(*scalars: Tensor) -> list[float]:
    """The scalars' values, read in one synchronisation. A fake step is a healthy one: it has no values to read."""
    stacked = torch.stack([scalar.detach().float() for scalar in scalars])
    values: list[float] = [1.0] * len(scalars) if isinstance(stacked, FakeTensor) else stacked.tolist()
    return values
