"""Forward-mode automatic differentiation along a direction: a second oracle, where every operation has it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from bptool.analysis.gradcheck.nodes import nodes_from
from bptool.analysis.gradcheck.subject import Subject
from bptool.training.postponed_compiler import postpone_compiler


def has_own_jvp(value: Tensor) -> bool:
    """Whether a function that somebody wrote, with a forward-mode derivative, is in the value's graph."""
    functions: list[Any] = [getattr(node, "_forward_cls", Function) for node in nodes_from([value.grad_fn])]
    return any(function.jvp is not Function.jvp for function in functions)


def forward_slope(subject: Subject, direction: Mapping[str, Tensor]) -> float | None:
    """L's slope along a direction by forward mode, None where no tangent arrives: there is no path, or none that
    forward mode follows. An operation without forward mode raises what it likes.
    """
    postpone_compiler()  # forward mode would load it, for a second or two
    with forward_ad.dual_level(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the first use of some decompositions warns
        duals = {
            name: forward_ad.make_dual(subject.leaves[name].tensor.detach(), v.contiguous())
            for name, v in direction.items()
        }
        result = subject.scalar(subject.outputs_with(duals))
        tangent = forward_ad.unpack_dual(result).tangent
    return None if tangent is None else float(tangent.item())
