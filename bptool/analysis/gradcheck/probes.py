"""What a check at one point with well-behaved tensors leaves out: each probe meets the target in another way.

Most compare a gradient with the one that is judged already. What a target refuses with an error of its own counts as
right, as nobody is misled; only a backward that fails on an incoming gradient does not, as no caller can foresee it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bptool.analysis.gradcheck.differences import Noise
from bptool.analysis.gradcheck.probing import HOLDS, Answer, Setting, compared, first_line
from bptool.analysis.gradcheck.result import ProbeCheck, Verdict
from bptool.analysis.gradcheck.second_order import double_backward
from bptool.analysis.gradcheck.strange_inputs import (
    expanded_inputs,
    noncontiguous_inputs,
    repeated_indices,
    zero_indices,
)
from bptool.analysis.gradcheck.subject import Gradients, Subject, real_view
from bptool.analysis.gradcheck.tangents import forward_slope, has_own_jvp


def probe(subject: Subject, gradients: Gradients, noise: Noise, verdicts: Mapping[str, Verdict]) -> list[ProbeCheck]:
    """Every probe's answer; a probe that does not apply holds and says so. Without any gradient none is asked.

    Args:
        verdicts: of each tensor, by name.
    """
    if all(grad is None for grad in gradients.values()):
        return []
    setting = Setting(subject, gradients, noise, verdicts)
    answers = {ask.__name__: ask(setting) for ask in PROBES}
    subject.clear()
    return [ProbeCheck(name=name, holds=found.holds, detail=found.detail) for name, found in answers.items()]


def noncontiguous_gradient(setting: Setting) -> Answer:
    """The gradient that comes in lies in memory with gaps."""

    def with_gaps(weight: Tensor) -> Tensor:
        turned = weight.movedim(0, -1) if weight.dim() else weight
        gaps = torch.stack([turned, torch.full_like(turned, float("nan"))], -1)[..., 0]
        return gaps.movedim(-1, 0) if weight.dim() else gaps

    return _with_incoming(setting, with_gaps, lambda weight: weight)


def expanded_gradient(setting: Setting) -> Answer:
    """The gradient that comes in is one number expanded, as the backward of `sum` sends it."""

    def expanded(weight: Tensor) -> Tensor:
        return weight.flatten()[:1].sum().expand(weight.shape)

    return _with_incoming(setting, expanded, lambda weight: expanded(weight).contiguous())


def unchanged_gradient(setting: Setting) -> Answer:
    """The gradient that comes in is as it was after the backward: it may belong to somebody else."""
    if _is_scalar(setting.subject):
        return Answer(True, "nothing to ask: the output is a scalar")
    kept: list[tuple[Tensor, Tensor]] = []

    def sent(weight: Tensor) -> Tensor:
        kept.append((weight.clone(), weight))
        return kept[-1][0]

    _gradients_for(setting.subject, sent)
    if all(torch.equal(after, before) for after, before in kept):
        return Answer(True, "the gradient that comes in is left as it is")
    return Answer(False, "the backward changes the gradient that comes in: work on a copy, grad = grad.clone()")


def rng_replay(setting: Setting) -> Answer:
    """Random numbers drawn again from the same seed give the same gradient."""
    subject = setting.subject
    torch.manual_seed(subject.random_seed)
    before = torch.get_rng_state()
    subject.value()
    if torch.equal(before, torch.get_rng_state()):
        return Answer(True, "it draws no random numbers")
    return compared(setting, subject.gradient()[1], HOLDS)


def forward_mode(setting: Setting) -> Answer:
    """Where a function has a `jvp` of its own, it gives the slope along a direction that the right backward gives."""
    if not has_own_jvp(setting.subject.scalar(setting.subject.outputs())):
        return Answer(True, "nothing to ask: no autograd.Function with a jvp of its own")
    names = [name for name, verdict in setting.verdicts.items() if verdict == "right"]
    directions = setting.directions()
    direction = {n: v for n, v in directions.draw(names, "forward mode").items() if v.numel()}
    if not direction:
        return Answer(True, "nothing to ask: no gradient is known to be right")
    try:
        forward = forward_slope(setting.subject, direction)
    except Exception as error:  # whatever an operation without forward mode raises
        return Answer(True, f"not offered: {first_line(error)}")
    if forward is None:
        return Answer(True, "not offered: no tangent arrives at the output")
    backward, size = directions.by_backward(direction)
    if abs(forward - backward) <= 1e6 * setting.noise.epsilon * size:
        return Answer(True, "the same slope along a direction")
    return Answer(False, f"the slope along a direction is {forward:.6g}, and {backward:.6g} by the right backward")


def second_call(setting: Setting) -> Answer:
    """Another call comes between a forward and its backward; and the backward runs twice."""
    subject = setting.subject

    def others(tensor: Tensor) -> Tensor:
        return tensor.detach().flatten().roll(1).view(tensor.shape).requires_grad_(tensor.requires_grad)

    try:
        subject.clear()
        value = subject.scalar(subject.outputs())
        with subject.arguments.swapped(others):
            held = _tried(subject.outputs)
        value.backward(retain_graph=True)
        first = subject.collected()
        del held
    except RuntimeError as error:
        return Answer(True, f"refused: {first_line(error)}")
    found = compared(setting, first, HOLDS)
    if not found.holds:
        return Answer(False, f"after another call {found.detail}")
    subject.clear()
    try:
        value.backward()
    except RuntimeError as error:
        return Answer(True, f"a second backward of one graph is refused: {first_line(error)}")
    found = compared(setting, subject.collected(), HOLDS)
    return found if found.holds else Answer(False, f"in a second backward of one graph {found.detail}")


def accumulation(setting: Setting) -> Answer:
    """A backward adds to what `.grad` holds."""
    subject = setting.subject
    held = {}
    for name, leaf in subject.leaves.items():
        grad = setting.gradients[name]
        held[name] = torch.full_like(leaf.base, _largest(grad))
        leaf.tensor.grad = held[name].clone()
    subject.scalar(subject.outputs()).backward()
    gradients: Gradients = {}
    for name, leaf in subject.leaves.items():
        grad = leaf.tensor.grad
        added = None if grad is None else grad.detach() - held[name]
        kept = added is None or leaf.kept is None
        gradients[name] = added if kept else torch.where(leaf.kept.bool(), added, 0)  # type: ignore[arg-type, union-attr]
    return compared(setting, gradients, HOLDS)


def _largest(grad: Tensor | None) -> float:
    """Its largest element, or 1 where there is none but 0."""
    if grad is None or not grad.numel():
        return 1.0
    return float(real_view(grad).abs().nan_to_num(0, 0, 0).max().item()) or 1.0


PROBES: tuple[Callable[[Setting], Answer], ...] = (
    noncontiguous_gradient,
    expanded_gradient,
    unchanged_gradient,
    noncontiguous_inputs,
    expanded_inputs,
    zero_indices,
    repeated_indices,
    rng_replay,
    forward_mode,
    double_backward,
    second_call,
    accumulation,
)


def _with_incoming(setting: Setting, strange: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor]) -> Answer:
    subject = setting.subject
    if _is_scalar(subject):
        return Answer(True, "nothing to ask: the output is a scalar")
    try:
        gradients = _gradients_for(subject, strange)
    except RuntimeError as error:
        return Answer(False, f"the backward fails: {first_line(error)}")
    return compared(setting, gradients, HOLDS, reference=_gradients_for(subject, plain))


def _is_scalar(subject: Subject) -> bool:
    return all(weight is None or weight.numel() == 1 for weight in subject.output_weights())


def _gradients_for(subject: Subject, incoming: Callable[[Tensor], Tensor]) -> Gradients:
    """The leaves' gradients with changed weights coming in at the outputs."""
    subject.clear()
    ends: list[Tensor] = [
        _Sends.apply(output, incoming(weight.clone()))  # type: ignore[no-untyped-call]
        for output, weight in zip(subject.outputs(), subject.output_weights(), strict=True)
        if weight is not None and output.requires_grad
    ]
    if ends:
        torch.stack(ends).sum().backward()
    return subject.collected()


class _Sends(torch.autograd.Function):
    """A scalar whose backward sends a given tensor to an output, as it lies in memory.

    `torch.autograd.backward` would do so too, but imports sympy first, for ten times as long as a small function takes.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, incoming: Tensor) -> Tensor:
        ctx.incoming = incoming
        return torch.zeros((), dtype=torch.float64, device=output.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.incoming, None


def _tried(call: Callable[[], object]) -> object:
    """What a call gives; nothing where it does not like its inputs."""
    try:
        return call()
    except Exception:
        return None
