"""The check of a function on some inputs, for tests of its verdicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bptool import GradientTarget
from bptool.analysis.gradcheck.check import Examined, check_gradients
from bptool.analysis.gradcheck.mutation.catching import Eye
from bptool.analysis.gradcheck.result import GradcheckResult, TensorCheck


def checked(
    function: Callable[..., Any], *inputs: Any, seed: int = 1, double_backward: bool = False
) -> GradcheckResult:
    return check_gradients(GradientTarget(function, inputs, double_backward=double_backward), seed=seed)


def only(result: GradcheckResult) -> TensorCheck:
    (tensor,) = result.tensors
    return tensor


def random_input(*shape: int, positive: bool = False) -> Tensor:
    drawn = torch.rand(shape) + 0.5 if positive else torch.randn(shape)
    return drawn.requires_grad_()


def eye(examined: Examined) -> Eye:
    """What would tell a changed gradient from the right one, as the whole check does."""
    verdicts = examined.verdicts
    assert verdicts is not None
    return Eye(
        verdicts.directions, verdicts.looks, {t.name: t.detectable_relative_error for t in examined.result.tensors}
    )
