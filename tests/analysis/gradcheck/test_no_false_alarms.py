"""What is right is not called wrong: modules of the field, this package's transformer, and PyTorch's own operations."""

from __future__ import annotations

import sys
import unittest
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import gradient_checks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bptool.analysis.gradcheck.check import check_gradients
from bptool.analysis.gradcheck.result import GradcheckResult
from bptool.analysis.gradcheck.workloads import workload_target
from bptool.config.loading import load_config
from bptool.config.target import resolve_target
from bptool.model.normalization import RMSNorm
from bptool.training.workload import transformer_workload

checked = partial(gradient_checks.checked, seed=2)


def assert_right(result: GradcheckResult) -> None:
    assert result.passed, (result.failures(), [p.detail for p in result.probes if not p.holds])
    assert {tensor.verdict for tensor in result.tensors} == {"right"}


def some(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


def rope(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[-2])[:, None] * 10.0 ** -torch.arange(x.shape[-1] // 2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def top_2_of_experts(x: Tensor, router: Tensor, experts: Tensor) -> Tensor:
    weights, chosen = (x @ router).softmax(-1).topk(2)
    return (torch.einsum("nd,nkde->nke", x, experts[chosen]) * weights[..., None]).sum(1)


MODULES: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "relu network": lambda: (
        nn.Sequential(nn.Linear(10, 200), nn.ReLU(), nn.Linear(200, 50), nn.ReLU(), nn.Linear(50, 3)),
        (some(8, 10),),
    ),
    "top-k": lambda: (lambda x: x.topk(3).values * x.sort().values[..., :3], (some(4, 9),)),
    "top-2 of experts": lambda: (top_2_of_experts, (some(6, 4), some(4, 5), some(5, 4, 3))),
    "embedding with repeated ids": lambda: (nn.Embedding(9, 4), (torch.tensor([[1, 1, 1, 8], [0, 8, 3, 3]]),)),
    "sparse embedding": lambda: (nn.Embedding(5, 4, sparse=True), (torch.tensor([1, 1, 3, 0, 2, 4]),)),
    "dropout": lambda: (nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.4), nn.Linear(8, 2)), (some(3, 5),)),
    "rms norm": lambda: (RMSNorm(6, eps=1e-5), (some(4, 6),)),
    "rope": lambda: (rope, (some(2, 5, 8),)),
    "swiglu": lambda: (SwiGLU(), (some(3, 6),)),
    "batch norm": lambda: (nn.BatchNorm1d(4), (some(7, 4),)),
    "batch norm, evaluating": lambda: (nn.BatchNorm1d(4).eval(), (some(7, 4),)),
    "a convolution and a pool": lambda: (nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2)), (some(2, 2, 8, 8),)),
    "an encoder layer": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (some(2, 5, 8),)),
    "lstm": lambda: (nn.LSTM(3, 4, batch_first=True), (some(2, 5, 3),)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    function, inputs = MODULES[name]()
    result = checked(function, *inputs)
    assert result.passed, (result.failures(), [p.detail for p in result.probes if not p.holds])
    # A bias of keys has no gradient under softmax; it is a part of PyTorch's packed one, so nothing is zero as a whole.
    assert {tensor.verdict for tensor in result.tensors} == {"right"}


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["model.norm=layernorm", "model.position=learned", "model.activation=gelu", "model.dropout=0.2"],
        ["model.activation=relu", "model.attention=eager", "model.n_kv_heads=1", "training.loss=plain"],
        ["model.moe.n_experts=4", "model.moe.d_expert=8", "model.qk_norm=true", "model.logit_softcap=5.0"],
    ],
)
def test_the_built_in_transformer(settings: list[str]) -> None:
    small = ["model.d_model=16", "model.n_heads=2", "model.n_layers=2", "model.vocab_size=19", "model.d_ff=24"]
    batch = ["training.micro_batch_size=2", "training.sequence_length=7"]
    config = load_config(resolve_target(None), [*small, *batch, *settings])
    assert_right(check_gradients(workload_target(transformer_workload(config), seed=0), seed=4))


def operators() -> Iterator[Any]:
    """PyTorch's own table of its operations, with sample inputs for each."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        # Of the module that the table imports for other uses, nothing is needed.
        patch.setitem(sys.modules, "expecttest", SimpleNamespace(TestCase=unittest.TestCase))
        try:
            from torch.testing._internal.common_methods_invocations import op_db
        except ImportError:
            return
    for op in op_db:
        if op.supports_autograd and torch.float64 in op.dtypes:
            yield op


NOT_ASKED = {
    "as_strided_scatter": "PyTorch's own tests expect its gradient to be wrong",
    "max_unpool": "its gradient is undefined for the samples, whose indices come twice",
    "rpow": "its samples are negative numbers to broken powers",
    "normal": "it has no input that requires a gradient",
    "batch_norm": "the samples are running statistics that the operation changes in place",
    "sparse": "its samples are sparse",
}


def wrongly_blamed(step: int) -> tuple[int, list[str]]:
    """How many operations were checked on their first sample, and those that did not pass."""
    n_checked, blamed = 0, []
    for number, op in enumerate(operators()):
        if number % step or any(name in op.name for name in NOT_ASKED):
            continue
        torch.manual_seed(0)
        sample = next(iter(op.sample_inputs("cpu", torch.float64, requires_grad=True)))

        def function(*inputs: Any, op: Any = op, sample: Any = sample) -> Any:
            result = op.gradcheck_wrapper(op.get_op(), *inputs, **sample.kwargs)
            return sample.output_process_fn_grad(result) if sample.output_process_fn_grad else result

        n_checked += 1
        if not checked(function, sample.input, *sample.args).passed:
            blamed.append(f"{op.name}.{op.variant_test_name}")
    return n_checked, blamed


@pytest.mark.filterwarnings("ignore")
def test_a_hundred_of_pytorchs_operations() -> None:
    n_checked, blamed = wrongly_blamed(step=5)
    assert blamed == []
    assert n_checked >= 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_of_pytorchs_operations() -> None:
    n_checked, blamed = wrongly_blamed(step=1)
    assert blamed == []
    assert n_checked >= 500
