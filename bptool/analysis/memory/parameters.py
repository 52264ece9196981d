"""Sums over a model's parameters, of which nothing but their sizes is known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bptool.training.assembly import build_model
from bptool.training.workload import Workload


def sum_of_parameters(workload: Workload, size: Callable[[nn.Parameter], int], dtype: torch.dtype) -> int:
    """The sum of each parameter's `size`, the parameters being in `dtype` unless the model chooses another.

    Like blocks have like parameters: a deep model's sum follows from two shallow ones'.
    """
    rest = (workload.n_layers - workload.head) % workload.period
    low = workload.head + workload.period + rest
    high = low + workload.period
    if workload.of_depth is None or workload.n_layers <= high:
        return sum(map(size, build_model(workload, torch.device("meta"), dtype).parameters()))
    shallow, deeper = (sum_of_parameters(workload.of_depth(n), size, dtype) for n in (low, high))
    return shallow + (workload.n_layers - low) // workload.period * (deeper - shallow)
