"""Probes that give the target inputs of another layout, or other indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bptool.analysis.gradcheck.connection import function_at_work, plain_name
from bptool.analysis.gradcheck.probing import HOLDS, Answer, Setting, compared, first_line
from bptool.analysis.gradcheck.subject import Gradients, gaussian_like

Change = Callable[[Tensor], Tensor]

_ORDERED = {
    *("scatter", "put", "index_put", "index_copy", "setitem", "ctc_loss"),
    *("max_unpool1d", "max_unpool2d", "max_unpool3d"),
}
"""Where an index that comes twice leaves open which value is kept; index 0 is no label of a CTC loss."""
_AS_IT_LIES = {"as_strided", "as_strided_copy", "as_strided_scatter"}


def noncontiguous_inputs(setting: Setting) -> Answer:
    """The same values, in memory with gaps between them."""

    def with_gaps(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0] if _is_checked(tensor) else tensor

    if not _has_inputs(setting, _is_checked):
        return Answer(True, "nothing to ask: no input requires a gradient")
    with _Operations() as used:
        found = _gradient_with(setting, with_gaps)
    if used.names & _AS_IT_LIES:
        return Answer(True, "nothing to ask: as_strided reads memory as it lies")
    return found if isinstance(found, Answer) else compared(setting, found, HOLDS)


def expanded_inputs(setting: Setting) -> Answer:
    """Inputs whose rows are one row, expanded (stride 0) or copied."""

    def expanded(tensor: Tensor) -> Tensor:
        dim = next((d for d, size in enumerate(tensor.shape) if size > 1), None)
        if dim is None or not _is_checked(tensor):
            return tensor
        return tensor.narrow(dim, 0, 1).expand(tensor.shape)

    def copied(tensor: Tensor) -> Tensor:
        return expanded(tensor).contiguous()

    def nearly(tensor: Tensor) -> Tensor:
        """Equal rows make ties and singular matrices, at which a gradient is any of several."""
        if not _is_checked(tensor):
            return tensor
        noise = gaussian_like(tensor, setting.subject.generator("equal rows"))
        return copied(tensor) + 1e-12 * noise

    if not _has_inputs(setting, lambda t: _is_checked(t) and any(size > 1 for size in t.shape)):
        return Answer(True, "nothing to ask: no input with rows requires a gradient")
    reference, near = _gradient_with(setting, copied), _gradient_with(setting, nearly)
    if isinstance(reference, Answer) or isinstance(near, Answer):
        return Answer(True, "nothing to ask: equal rows are refused")
    if not compared(setting, near, HOLDS, reference=reference).holds:
        return Answer(True, "nothing to ask: equal rows are a singular point")
    with _Operations() as used:
        found = _gradient_with(setting, expanded)
    if used.names & _AS_IT_LIES:
        return Answer(True, "nothing to ask: as_strided reads memory as it lies")
    return found if isinstance(found, Answer) else compared(setting, found, HOLDS, reference=reference)


def zero_indices(setting: Setting) -> Answer:
    """Every index is 0."""
    return _with_indices(setting, lambda indices: torch.where(indices > 0, 0, indices))


def repeated_indices(setting: Setting) -> Answer:
    """Every second index is the one before it."""

    def repeated(indices: Tensor) -> Tensor:
        flat = indices.flatten().clone()
        flat[1::2] = flat[: 2 * (len(flat) // 2) : 2]
        return flat.view(indices.shape)

    return _with_indices(setting, repeated)


def _with_indices(setting: Setting, change: Change) -> Answer:
    """A gradient with other indices, against finite differences along one direction of all leaves."""
    if not _has_inputs(setting, _is_index):
        return Answer(True, "nothing to ask: no input holds indices")
    if setting.wrong:
        return Answer(True, "not asked: a gradient is wrong with the given indices already")
    subject = setting.subject
    with subject.arguments.swapped(lambda tensor: change(tensor) if _is_index(tensor) else tensor):
        try:
            with _Operations() as used:
                _, gradients = subject.gradient()
        except (RuntimeError, IndexError, ValueError) as error:
            return Answer(True, f"refused: {first_line(error)}")
        if found := used.names & _ORDERED:
            return Answer(True, f"nothing to ask: {found.pop()} defines no result for these indices")
        directions = setting.directions(gradients)
        names = [name for name in setting.smooth_names() if gradients[name] is not None]
        direction = directions.draw(names, change.__name__)
        measured = directions.measure(direction)
        if measured.agrees or measured.jump or not directions.confirmed(direction):
            return Answer(True, "agrees with finite differences")
    off = abs(measured.difference) / max(abs(measured.by_differences), abs(measured.by_backward))
    return Answer(False, f"the gradient differs from finite differences by {off:.1e}")


def _gradient_with(setting: Setting, change: Change) -> Gradients | Answer:
    """The gradients with changed inputs; an answer where the forward refuses them or the backward fails.

    Of an input it is the gradient that arrives at the changed tensor, before the change's own backward adds it up.
    """
    subject = setting.subject
    changed: dict[int, Tensor] = {}

    def noted(tensor: Tensor) -> Tensor:
        other = change(tensor)
        if other is not tensor and other.requires_grad:
            other.retain_grad()
            changed[id(tensor)] = other
        return other

    with subject.arguments.swapped(noted):
        try:
            subject.clear()
            value = subject.scalar(subject.outputs())
        except (RuntimeError, IndexError, ValueError) as error:
            return Answer(True, f"refused: {first_line(error)}")
        try:
            if value.requires_grad:
                value.backward()
        except RuntimeError as error:
            return Answer(False, f"the backward fails: {first_line(error)}")
        gradients = subject.collected()
    for name, leaf in subject.leaves.items():
        if id(leaf.tensor) in changed:
            gradients[name] = changed[id(leaf.tensor)].grad
    return gradients


def _has_inputs(setting: Setting, kind: Callable[[Tensor], bool]) -> bool:
    return any(kind(tensor) for _, tensor in setting.subject.arguments.tensors())


def _is_checked(tensor: Tensor) -> bool:
    return tensor.requires_grad


def _is_index(tensor: Tensor) -> bool:
    integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return integer and tensor.numel() > 1


class _Operations(TorchFunctionMode):
    """Which operations a function calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function_at_work() is None:  # what happens inside of one, its backward answers for
            self.names.add(plain_name(func))
        return func(*args, **(kwargs or {}))
