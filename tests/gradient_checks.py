"""The check of a function on some inputs, for tests of its verdicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bptool import GradientTarget
from bptool.analysis.gradcheck.check import check_gradients
from bptool.analysis.gradcheck.result import GradcheckResult


def checked(
    function: Callable[..., Any], *inputs: Any, seed: int = 1, double_backward: bool = False
) -> GradcheckResult:
    return check_gradients(GradientTarget(function, inputs, double_backward=double_backward), seed=seed)
