"""Forward-mode automatic differentiation along a direction: a second oracle, where every operation has it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bptool.analysis.gradcheck.subject import Subject


def forward_slope(subject: Subject, direction: Mapping[str, Tensor]) -> float | None:
    """L's slope along a direction by forward mode, None where no tangent arrives: there is no path, or none that
    forward mode follows. An operation without forward mode raises what it likes.
    """
    with forward_ad.dual_level(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the first use of some decompositions warns
        duals = {
            name: forward_ad.make_dual(subject.leaves[name].tensor.detach(), v.contiguous())
            for name, v in direction.items()
        }
        result = subject.scalar(subject.outputs_with(duals))
        tangent = forward_ad.unpack_dual(result).tangent
    return None if tangent is None else float(tangent.item())
