"""CUDA's autocast on CPU tensors, against PyTorch's own lists of cases for its CUDA tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from bptool.instruments.cuda import autocast as cuda_autocast
from bptool.instruments.cuda.autocast import autocasting_as_cuda
from bptool.instruments.dispatch import aten_names, has_kernel

HALF = torch.float16


@pytest.fixture
def pytorchs_cases(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What PyTorch runs on a GPU. Its test helpers need a package that we don't have; these lists don't."""
    helpers = ModuleType("helpers")
    helpers.TEST_WITH_ROCM, helpers.TestCase = False, object  # type: ignore[attr-defined]
    name = "torch.testing._internal.autocast_test_lists"
    monkeypatch.setitem(sys.modules, "torch.testing._internal.common_utils", helpers)
    monkeypatch.delitem(sys.modules, name, raising=False)
    lists = importlib.import_module(name).AutocastTestLists(torch.device("cpu"))
    monkeypatch.delitem(sys.modules, name)
    return lists


@pytest.fixture
def cuda() -> Iterator[None]:
    with autocasting_as_cuda():
        yield


def dtypes(result: Any) -> set[torch.dtype]:
    return {leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}


def run(module: Any, case: tuple[Any, ...]) -> set[torch.dtype]:
    """The dtypes of the results of one of PyTorch's cases: name, arguments, and perhaps keywords."""
    name, args, *rest = case
    kwargs = next((extra for extra in rest if isinstance(extra, dict)), {})
    owner = module if hasattr(module, name) else args[0]
    with torch.autocast("cpu", HALF):
        function = getattr(owner, name)
        return dtypes(function(*(args if owner is module else args[1:]), **kwargs))


# No CPU has a kernel of the first two; the case of the third is not well formed, and below.
LEFT_OUT = ("cudnn", "_thnn_fused", "einsum")


@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
@pytest.mark.parametrize(
    ("module", "cases", "expected"),
    [
        (torch, "torch_fp16", HALF),
        (torch, "torch_fp32", torch.float32),
        (torch, "torch_need_autocast_promote", torch.float32),
        (torch._C._nn, "nn_fp16", HALF),
        (torch._C._nn, "nn_fp32", torch.float32),
        (vars(torch._C)["_linalg"], "linalg_fp16", HALF),
        (torch.Tensor, "methods_fp16", HALF),
        (torch.Tensor, "methods_fp32", torch.float32),
    ],
)
def test_pytorchs_cases_for_cuda(
    pytorchs_cases: Any, cuda: None, module: Any, cases: str, expected: torch.dtype
) -> None:
    checked = 0
    for case in getattr(pytorchs_cases, cases):
        if not case[0].startswith(LEFT_OUT):
            assert run(module, case) == {expected}, case[0]
            checked += 1
    assert checked


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_dtype_that_is_given_is_kept(cuda: None, dtype: torch.dtype) -> None:
    x = torch.rand(3, dtype=HALF)
    with torch.autocast("cpu", HALF):
        assert x.softmax(-1, dtype=dtype).dtype == x.sum(dtype=dtype).dtype == dtype


def test_float64_is_left_alone(cuda: None) -> None:
    x = torch.rand(3, 3, dtype=torch.float64)
    with torch.autocast("cpu", HALF):
        results = [x.softmax(-1), x.sum(), x.exp(), x.norm(), torch.dot(x[0], x[1]), torch.mv(x, x[0])]
    assert dtypes(results) == {torch.float64}


def test_einsum(cuda: None) -> None:
    with torch.autocast("cpu", HALF):
        assert torch.einsum("ij,jk->ik", torch.rand(2, 3), torch.rand(3, 4)).dtype == HALF


def test_a_probability_loss_is_refused(cuda: None) -> None:
    with torch.autocast("cpu", HALF), pytest.raises(RuntimeError, match="CUDA's autocast refuses binary_cross_entropy"):
        nn.functional.binary_cross_entropy(torch.rand(3), torch.rand(3))


def test_the_lists_hold_what_this_pytorch_registers_for_cuda() -> None:
    lists = [cuda_autocast.LOWER_PRECISION, cuda_autocast.FLOAT32, cuda_autocast.FLOAT32_RESULT, cuda_autocast.REFUSED]
    ours = [*cuda_autocast.WIDEST, *cuda_autocast.FLOAT32_NORM, *(name for names in lists for name in names)]
    assert len(ours) == len(set(ours))
    registered = {name for name in aten_names() if has_kernel(name, "AutocastCUDA")}
    assert registered - {"_cudnn_rnn"} <= set(ours)  # which a build for CUDA has, and no CPU tensor can reach


def test_what_only_a_cpu_casts_is_left_alone(cuda: None) -> None:
    assert not has_kernel("avg_pool3d", "AutocastCUDA")
    with FakeTensorMode(), torch.autocast("cpu", HALF):
        x = torch.rand(2, 1, 4, 4, 4, dtype=HALF)
        assert nn.functional.avg_pool3d(x, 2).dtype == HALF


def test_it_ends_with_the_context() -> None:
    x = torch.rand(2, 3, dtype=torch.bfloat16)

    def softmax_dtype() -> torch.dtype:
        with torch.autocast("cpu", torch.bfloat16):
            return x.softmax(-1).dtype

    before = softmax_dtype()
    with autocasting_as_cuda():
        assert softmax_dtype() == torch.float32
    assert softmax_dtype() == before == torch.bfloat16


class TestCache:
    """A parameter is cast once in an autocast region, and again in the next; `mv` is CUDA's list's alone."""

    def test_a_parameters_cast_is_kept_until_the_region_ends(self, cuda: None) -> None:
        weight, x = nn.Parameter(torch.rand(3, 3)), torch.rand(3)
        with torch.autocast("cpu", HALF):
            first, second = (torch.mv(weight, x).grad_fn for _ in range(2))
        with torch.autocast("cpu", HALF):
            third = torch.mv(weight, x).grad_fn
        kept = [node.next_functions[0][0] for node in (first, second, third)]  # type: ignore[union-attr]
        assert kept[0] is kept[1]
        assert kept[0] is not kept[2]

    def test_anything_else_is_cast_each_time(self, cuda: None) -> None:
        matrix, x = nn.Parameter(torch.rand(3, 3)) * 1, torch.rand(3)
        with torch.autocast("cpu", HALF):
            first, second = (torch.mv(matrix, x).grad_fn.next_functions[0][0] for _ in range(2))  # type: ignore[union-attr]
        assert first is not second


def test_fake_tensors_are_cast_alike(cuda: None) -> None:
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        hidden = nn.Linear(4, 4)(torch.rand(2, 4))
        assert hidden.dtype == torch.bfloat16
        assert nn.functional.cross_entropy(hidden, torch.zeros(2, dtype=torch.long)).dtype == torch.float32
