"""What `bptool gradcheck` checks besides a Workload: any module or function, on sample inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GradientTarget:
    """A module, a function or an `autograd.Function`'s `apply`, and inputs that it takes.

    The module's parameters that require a gradient are checked, and the inputs that do. Everything is converted to
    float64; the module itself is copied, and left as it is.

    Attributes:
        function: returns any nest of tensors, at least one of them floating point or complex.
        inputs: a tuple or list of positional arguments, a dict of keyword arguments, or one tensor; any nests.
        double_backward: whether a second derivative is claimed to be right (a gradient penalty needs it); where it
            is, a wrong one fails the check.
    """

    function: Callable[..., Any]
    inputs: Any = ()
    double_backward: bool = False
