from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_runs import CPU, Perceptron, random_batches, run_steps, small_config, transformer_step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bptool.config.schema import PrecisionSettings
from bptool.errors import DeviceError
from bptool.training.assembly import build_model
from bptool.training.precision import LossScale, Precision
from bptool.training.workload import Workload, transformer_workload

MODES = ["fp32", "bf16-mixed", "bf16", "fp16-mixed"]


@pytest.fixture(autouse=True)
def _matmul_precision_restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def multiplied_in(mode: str) -> set[torch.dtype]:
    """The formats that the linear layers of a step's forward give their results in."""
    step = transformer_step(small_config({"precision.mode": mode}))
    seen: set[torch.dtype] = set()
    for module in step.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    step.accumulate(random_batches(step, 0), [1])
    return seen


@pytest.mark.parametrize(
    ("mode", "weights", "products"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("fp16-mixed", torch.float32, torch.float16),
    ],
)
def test_the_formats_of_weights_state_and_products(mode: str, weights: torch.dtype, products: torch.dtype) -> None:
    step = transformer_step(small_config({"precision.mode": mode}))
    run_steps(step, 1)
    assert {parameter.dtype for parameter in step.model.parameters()} == {weights}
    assert {value.dtype for key, value in step.optimizers.state().items() if not key.endswith("/step")} == {weights}
    assert multiplied_in(mode) == {products}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns(mode: str) -> None:
    """One batch again and again: its loss must fall well below that of a uniform guess, ln 32 = 3.47."""
    changes = {"precision.mode": mode, "optimizer.lr": 1e-2, "schedule.name": "constant", "schedule.warmup_steps": 0}
    step = transformer_step(small_config(changes))
    batches = random_batches(step, 0)
    losses = [step(number, batches).loss for number in range(40)]
    assert losses[0] == pytest.approx(3.47, abs=0.1)
    assert losses[-1] < 1.5


class Made(TorchDispatchMode):
    """The floating formats of everything that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.dtypes |= {tensor.dtype for tensor in tensors if tensor.is_floating_point() and not tensor.is_meta}
        return result


@pytest.mark.parametrize("own_model", [False, True])
def test_bf16_weights_never_exist_in_fp32(own_model: bool) -> None:
    workload = transformer_workload(small_config())
    if own_model:
        workload = Workload(model=Perceptron, batch=workload.batch, loss=workload.loss)
    with Made() as made:
        build_model(workload, CPU, torch.bfloat16)
    assert made.dtypes == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_tf32_needs_a_gpu() -> None:
    with pytest.raises(
        DeviceError, match=r"precision\.mode = 'tf32' needs a CUDA device; this run's is 'cpu'"
    ) as caught:
        Precision(PrecisionSettings(mode="tf32"), CPU)
    assert "precision.mode=fp32" in caught.value.remedy


def test_tf32_does_not_leak_into_the_next_run() -> None:
    Precision(PrecisionSettings(mode="tf32"), torch.device("cuda"))
    assert torch.get_float32_matmul_precision() == "high"
    Precision(PrecisionSettings(mode="fp32"), CPU)
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_loss_scale_step_by_step() -> None:
    scale = LossScale(value=8.0, growth_interval=2)
    values = []
    for finite in (True, True, True, False, True, True, False, False, False, False, False):
        scale.update(finite=finite)
        values.append(scale.value)
    assert values == [8, 16, 16, 8, 8, 16, 8, 4, 2, 1, 0.5]
    assert scale.exhausted
    assert not LossScale(value=1.0).exhausted
