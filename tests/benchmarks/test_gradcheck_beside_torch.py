"""The check of gradients beside PyTorch's own, in its slow and its fast mode: caught, false alarms, time; and what a
model of 3 million parameters costs, in forward-and-backward passes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from broken_backwards import BUGS, Block, ids_and_targets
from torch import Tensor
from torch.autograd import gradcheck

from bptool import GradientTarget
from bptool.analysis.gradcheck.answers import Wanted, answer
from bptool.analysis.gradcheck.check import check_gradients

pytestmark = pytest.mark.benchmark

WIDTH = 8
RIGHT: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "relu": (F.relu, (40, 40)),
    "top-k": (lambda x: x.topk(3).values, (30, 30)),
    "layer norm": (lambda x: F.layer_norm(x, x.shape[-1:]), (20, 20)),
    "softmax": (lambda x: x.softmax(-1), (20, 20)),
    "dropout, reseeded by PyTorch's caller": (lambda x: F.dropout(x, 0.3), (20, 20)),
    "key bias under softmax": (lambda x: (x[:1] + torch.zeros(9, 1, dtype=x.dtype)).softmax(0), (4, 4)),
}


@dataclass
class Tally:
    caught: int = 0
    seconds: list[float] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)


def _ours(function: Callable[..., Any], *inputs: Any) -> bool:
    return check_gradients(GradientTarget(function, inputs), seed=0).passed


def _theirs(fast: bool) -> Callable[..., bool]:
    def passes(function: Callable[..., Any], *inputs: Any) -> bool:
        """PyTorch looks at inputs alone, so a module's parameters are made inputs."""
        if isinstance(function, torch.nn.Module):
            names = [name for name, _ in function.named_parameters()]
            module, fixed = function, inputs
            values = tuple(p.detach().clone().requires_grad_() for p in module.parameters())

            def of_parameters(*given: Tensor) -> Any:
                torch.manual_seed(0)  # without it dropout would differ from call to call
                return torch.func.functional_call(module, dict(zip(names, given, strict=True)), fixed)

            return gradcheck(of_parameters, values, fast_mode=fast, raise_exception=False)
        return gradcheck(function, inputs, fast_mode=fast, raise_exception=False)

    return passes


CHECKS: dict[str, Callable[..., bool]] = {
    "bptool": _ours,
    "torch, slow mode": _theirs(fast=False),
    "torch, fast mode": _theirs(fast=True),
}


def test_beside_pytorch() -> None:
    torch.set_num_threads(1)
    print(f"\n{len(BUGS)} bugs in a transformer block {WIDTH} wide; {1 + len(RIGHT)} right functions")
    print(f"  {'':<20}{'caught':>8}{'false alarms':>14}{'s a block':>12}  missed")
    for name, passes in CHECKS.items():
        tally, missed = Tally(), []
        for bug in BUGS:
            torch.manual_seed(0)
            block, batch = Block(WIDTH, bug), ids_and_targets(0)
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                caught = not passes(block, *batch)
            tally.seconds.append(time.perf_counter() - start)
            tally.caught += caught
            missed += [] if caught else [bug]
        torch.manual_seed(0)
        right = {"the block": (Block(WIDTH), ids_and_targets(0))}
        for label, (function, shape) in RIGHT.items():
            x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            right[label] = (function, (x,))  # type: ignore[assignment]
        tally.alarms = [label for label, (function, inputs) in right.items() if not passes(function, *inputs)]
        mean = sum(tally.seconds) / len(tally.seconds)
        print(f"  {name:<20}{tally.caught:>5}/{len(BUGS)}{len(tally.alarms):>14}{mean:>12.2f}  {'; '.join(missed)}")
        print("".join(f"    alarm: {label}\n" for label in tally.alarms), end="")


def test_three_million_parameters() -> None:
    """Aim: no more than 60 passes of the model in float64, the identities of its training step included."""
    torch.set_num_threads(1)
    settings = ["model.d_model=256", "model.n_layers=4", "model.context_length=64", "training.device=cpu"]
    print("\na transformer of 3 million parameters")
    for more in ([], ["model.norm=layernorm", "model.bias=true", "model.position=learned", "model.activation=gelu"]):
        for seed in range(3):
            start = time.process_time()
            result = answer(None, [*settings, *more], Wanted(), seed=seed)
            cpu_s, cost = time.process_time() - start, result.cost
            seen = max(tensor.detectable_relative_error or 0.0 for tensor in result.tensors)
            share = 1 - cost.identities_s / cost.check_s
            print(
                f"  {cost.passes:5.1f} passes ({share:.0%} without the identities), {cost.check_s:.1f} s,"
                f" {cpu_s:.1f} s of CPU, {result.checked_count:,} numbers; would have caught {seen:.0e}"
            )
            assert result.passed
