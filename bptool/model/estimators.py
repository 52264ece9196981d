"""Gradients for choices that have none: rounding, argmax, sampling.

    straight_through    the hard value forward, the soft one's gradient backward: biased, and often good enough
                        (Bengio, Leonard and Courville 2013, "Estimating or propagating gradients through stochastic
                        neurons", section 4)
    score_function      cost * grad log p: unbiased, and noisy; a baseline makes it less so (Williams 1992, "Simple
                        statistical gradient-following algorithms for connectionist reinforcement learning": REINFORCE)

Both run through an `autograd.Function` of their own, so `bptool gradcheck` knows an estimate where it sees one: it
shows its bias and doesn't call it wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Baseline = float | Tensor | Literal["leave-one-out"]


@overload
def straight_through(hard: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]: ...


@overload
def straight_through(hard: Tensor, soft: Tensor) -> Tensor: ...


def straight_through(
    hard: Callable[[Tensor], Tensor] | Tensor, soft: Tensor | None = None
) -> Callable[[Tensor], Tensor] | Tensor:
    """A hard choice that passes gradients on as if it were the soft value.

        quantized = straight_through(torch.round)(x)                  # backward: as if it were x
        one_hot = straight_through(F.one_hot(k, 4).float(), p)        # backward: as if it were p
        sign = straight_through(torch.sign(x), F.hardtanh(x))         # no gradient where x is beyond 1

    Args:
        hard: the function that makes the hard value of the soft one, or that value, of `soft`'s shape; no gradient goes
            to it.
        soft: where gradients go.

    Returns:
        A function like `hard`; or the hard value, in `soft`'s dtype.

    Raises:
        ValueError: hard and soft value are of different shapes.
    """
    if isinstance(hard, Tensor):
        if soft is None:
            raise ValueError("straight_through: a hard value needs a soft one that takes its gradient")
        return _passed(hard, soft, None)
    if soft is not None:
        raise ValueError("straight_through: give a function alone, or a hard value and a soft one")
    function = hard

    def estimated(x: Tensor) -> Tensor:
        with torch.no_grad():
            value = function(x)
        return _passed(value, x, function)

    return estimated


def score_function(cost: Tensor, log_probability: Tensor, baseline: Baseline = 0.0) -> Tensor:
    """Costs of sampled choices, with the gradient that their expectation has, on average (REINFORCE).

        choice = Categorical(logits=logits)
        k = choice.sample((64,))
        loss = score_function(cost(k), choice.log_prob(k), "leave-one-out").mean()

    The gradient is `d cost + (cost - baseline) d log p`: its second part alone is Williams' estimate, the first is for
    what the cost itself depends on. It cannot be differentiated a second time: that would be another estimate
    (Foerster et al. 2018, "DiCE").

    Args:
        cost: one number for each sample; what is minimised.
        log_probability: of each sample, in `cost`'s shape, with a gradient.
        baseline: what costs are compared with, which changes no expectation as long as it doesn't depend on the sample:
            a number, a tensor that can be broadcast to `cost`, or "leave-one-out", the mean cost of the other samples
            along the first dimension (Kool, van Hoof and Welling 2019).

    Returns:
        `cost`'s values.

    Raises:
        ValueError: the shapes differ, or there is one sample alone to leave out.
    """
    if cost.shape != log_probability.shape:
        raise ValueError(
            f"score_function: cost is {list(cost.shape)} and log_probability {list(log_probability.shape)};"
            " give one of each for a sample"
        )
    watcher = _watcher.get()
    if watcher is not None:
        baseline = watcher.baseline(baseline)
    with torch.no_grad():
        found = _leave_one_out(cost) if isinstance(baseline, str) else baseline
        advantage = cost - found
    result: Tensor = _ScoreFunction.apply(cost, log_probability, advantage)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    """Takes (soft, hard): gives hard, and its gradient to soft."""

    generate_vmap_rule = True

    @staticmethod
    def forward(soft: Tensor, hard: Tensor) -> Tensor:
        return hard.to(soft.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope, None

    @staticmethod
    def jvp(ctx: Any, soft_tangent: Tensor, hard_tangent: Any) -> Tensor:
        return soft_tangent.clone()


class _ScoreFunction(torch.autograd.Function):
    """Takes (cost, log probability, advantage): gives cost, and advantage times its gradient to the log probability."""

    generate_vmap_rule = True

    @staticmethod
    def forward(cost: Tensor, log_probability: Tensor, advantage: Tensor) -> Tensor:
        return cost.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        (advantage,) = ctx.saved_tensors
        return slope, slope * advantage, None

    @staticmethod
    def jvp(ctx: Any, cost: Tensor, log_probability: Tensor, unused: Any) -> Tensor:
        (advantage,) = ctx.saved_tensors
        found: Tensor = cost + advantage * log_probability
        return found


ESTIMATED_EDGES = {"_StraightThroughBackward": ("straight_through", 0), "_ScoreFunctionBackward": ("score_function", 1)}
"""By the name of a node in autograd's graph: the estimator that it is of, and which of its inputs gets an estimate."""


class Watcher:
    """What a check may change while a function with estimators runs; this one changes nothing."""

    def straight_through(
        self, hard: Tensor, soft: Tensor, function: Callable[[Tensor], Tensor] | None
    ) -> Tensor | None:
        """What to go on with in place of the estimator's output; None: that. `function` made the hard value of the soft
        one, where `straight_through` was given a function."""
        return None

    def baseline(self, baseline: Baseline) -> Baseline:
        """The baseline to use."""
        return baseline


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """While this is entered, estimators ask `watcher`."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def _passed(hard: Tensor, soft: Tensor, function: Callable[[Tensor], Tensor] | None) -> Tensor:
    if hard.shape != soft.shape:
        raise ValueError(
            f"straight_through: the hard value is {list(hard.shape)} and the soft one {list(soft.shape)}; they must be"
            " of one shape"
        )
    watcher = _watcher.get()
    if watcher is not None:
        other = watcher.straight_through(hard.detach(), soft, function)
        if other is not None:
            return other
    result: Tensor = _StraightThrough.apply(soft, hard.detach())  # type: ignore[no-untyped-call]
    return result


def _leave_one_out(cost: Tensor) -> Tensor:
    """The mean of all the others along the first dimension."""
    if cost.dim() == 0 or cost.shape[0] < 2:
        raise ValueError("score_function: baseline='leave-one-out' needs two samples or more along the first dimension")
    return (cost.sum(0, keepdim=True) - cost) / (cost.shape[0] - 1)
