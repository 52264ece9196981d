"""The probe of a second derivative: a backward through the backward."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bptool.analysis.gradcheck.directions import LARGE
from bptool.analysis.gradcheck.probing import Answer, Setting, compared, first_line
from bptool.analysis.gradcheck.subject import inner

_STEPS = (2.0**-10, 2.0**-13)
_TOLERANCE = 1e-4


def double_backward(setting: Setting) -> Answer:
    """With `create_graph` the gradient is the same, and its own derivative is right.

    A second derivative that is wrong fails the check where the target claims it (`GradientTarget.double_backward`);
    elsewhere it is told, unless it would take long. An operation that refuses it misleads nobody.
    """
    subject = setting.subject
    claimed = subject.target.double_backward
    if not claimed and subject.n_elements > LARGE:
        return Answer(True, "not claimed, and not asked of a large target")
    if not setting.finite:
        return Answer(True, "not asked: a gradient is not finite")
    names = [name for name in setting.smooth_names() if setting.gradients[name] is not None]
    if not names:
        return Answer(True, "not asked: no element has a gradient")
    tensors = [subject.leaves[name].tensor for name in names]
    try:
        # An operation that is `once_differentiable` refuses only where the gradient that comes in has a graph.
        value = subject.scalar(subject.outputs()) * torch.ones((), dtype=torch.float64).requires_grad_()
        found = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True, materialize_grads=True)
        dense = [g if g.layout == torch.strided else g.to_dense() for g in found]
        kept = [_kept(setting, name, g) for name, g in zip(names, dense, strict=True)]
        same = compared(setting, {**setting.gradients, **dict(zip(names, [g.detach() for g in kept], strict=True))}, "")
        if not same.holds:
            return Answer(False, f"with create_graph {same.detail}")
        direction = setting.directions().draw(names, "second order")
        along = sum(((g.conj() * direction[name]).real.sum() for name, g in zip(names, kept, strict=True)), value * 0)
        subject.clear()
        along.backward()  # all of it: what refuses may not lie on the way to a leaf
        second = subject.collected()
        by_backward = sum(inner(g, direction[name]) for name in names if (g := second[name]) is not None)
    except RuntimeError as error:  # not implemented is one too
        return Answer(not claimed, f"{'it fails' if claimed else 'not offered'}: {first_line(error)}")
    return _judged(setting, direction, by_backward, claimed)


def _judged(setting: Setting, direction: Mapping[str, Tensor], by_backward: float, claimed: bool) -> Answer:
    """The second derivative along a direction, against differences of the first."""
    coarse, fine = (_difference(setting, direction, step) for step in _STEPS)
    size = max(abs(fine), abs(by_backward))
    first = sum(abs(inner(_gradient(setting, name), v)) for name, v in direction.items())
    bar = (
        2 * abs(coarse - fine)
        + _TOLERANCE * size
        + 1e4 * setting.noise.epsilon * (first + setting.noise.sigma) / _STEPS[1]
    )
    if not abs(fine - by_backward) > bar:
        return Answer(True, "the second derivative agrees with differences of the gradient")
    wrong = f"the second derivative differs from differences of the gradient by {abs(fine - by_backward) / size:.1e}"
    return Answer(not claimed, wrong if claimed else f"not claimed, and not to be relied on: {wrong}")


def _difference(setting: Setting, direction: Mapping[str, Tensor], step: float) -> float:
    slopes = []
    for sign in (1, -1):
        with setting.subject.along(direction) as go:
            go(sign * step)
            _, gradients = setting.subject.gradient()
        slopes.append(sum(inner(g, v) for name, v in direction.items() if (g := gradients[name]) is not None))
    return (slopes[0] - slopes[1]) / (2 * step)


def _gradient(setting: Setting, name: str) -> Tensor:
    grad = setting.gradients[name]
    return torch.zeros_like(setting.subject.leaves[name].base) if grad is None else grad


def _kept(setting: Setting, name: str, grad: Tensor) -> Tensor:
    kept = setting.subject.leaves[name].kept
    return grad if kept is None else grad * kept
