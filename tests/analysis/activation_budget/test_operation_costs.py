"""Measured by a clock that the test holds, and estimated by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bptool.analysis.activation_budget.operation_costs import Estimated, InCompiled, Measured, total
from bptool.gpus import gpu_named
from bptool.instruments.operations.log import Operation, OperationLog
from bptool.model.grouped import grouped_linear

CPU = torch.device("cpu")


def operations(run: Callable[[], object]) -> list[Operation]:
    log = OperationLog()
    with torch.no_grad(), log:
        run()
    return log.by_phase[""]


def product(n: int = 4) -> Operation:
    x = torch.ones(n, n)
    return operations(lambda: x @ x)[0]


def test_an_estimate_is_the_longer_of_arithmetic_and_traffic() -> None:
    """On a CPU a byte takes as long as 20 FLOPs; on a GPU by its data sheet: rate over bandwidth."""
    assert Estimated(None, "fp32").of(product()) == 20 * 3 * 4 * 4 * 4  # its 128 FLOPs are less
    large = product(512)
    assert Estimated(None, "fp32").of(large) == 2 * 512**3
    gpu = gpu_named("h100")
    assert Estimated(gpu, "bf16").of(product()) == pytest.approx(3 * 4 * 16 * gpu.flops_per_s["bf16"] / gpu.bytes_per_s)


class Clock:
    """Goes on by the next of these seconds at each look."""

    def __init__(self, *seconds: float) -> None:
        self._seconds, self.now, self.looks = itertools.cycle(seconds), 0.0, 0

    def __call__(self) -> float:
        self.now += next(self._seconds)
        self.looks += 1
        return self.now


def test_like_operations_are_measured_once_and_the_shortest_run_counts() -> None:
    clock = Clock(0.003, 0.005, 0.002, 0.007, 0.004)  # the clock is looked at before a run, after it, and then again
    costs = Measured(CPU, Estimated(None, "fp32"), clock=clock)
    shortest = costs.of(product())
    assert shortest == pytest.approx(0.002)
    looks = clock.looks
    assert costs.of(product()) == shortest
    assert clock.looks == looks
    costs.of(product(8))
    assert clock.looks > looks


def test_it_is_the_operation_that_is_run() -> None:
    """A product of 400 times the work takes longer, on any machine, and a view nothing."""
    costs = Measured(CPU, Estimated(None, "fp32"))
    assert costs.of(product(512)) > 4 * costs.of(product(16)) > 0
    x = torch.ones(4, 4)
    assert total(costs, operations(lambda: x.t())) == 0


def test_indices_are_made_up_too() -> None:
    tokens, table = torch.tensor([[1, 2]]), torch.ones(5, 3)
    costs = Measured(CPU, Estimated(None, "fp32"))
    (lookup,) = operations(lambda: F.embedding(tokens, table))
    assert costs.of(lookup) > 0
    assert list(costs._known.values()) != [None]


def test_what_values_decide_is_estimated_at_the_rate_of_the_rest() -> None:
    """How many rows each expert has is a value."""
    rows, experts, ends = torch.ones(8, 4), torch.ones(2, 4, 4), torch.tensor([3, 8], dtype=torch.int32)
    estimated = Estimated(None, "fp32")
    costs = Measured(CPU, estimated)
    seconds = costs.of(product(64))
    grouped = next(one for one in operations(lambda: grouped_linear(rows, experts, ends)) if one.flops)
    expected = estimated.of(grouped) * seconds / estimated.of(product(64))
    assert costs.of(grouped) == pytest.approx(expected)


@torch.library.custom_op("bptool_tests::picky", mutates_args=())
def picky(x: torch.Tensor) -> torch.Tensor:
    if float(x.max()) != 7.0:
        raise ValueError("expected a seven")
    return x.clone()


def test_so_is_what_refuses_made_up_values() -> None:
    costs, sevens = Measured(CPU, Estimated(None, "fp32")), torch.full((4,), 7.0)
    seconds = costs.of(product(64))
    picked = next(one for one in operations(lambda: picky(sevens)) if "picky" in str(one.func))
    estimated = Estimated(None, "fp32")
    assert costs.of(picked) == pytest.approx(estimated.of(picked) * seconds / estimated.of(product(64)))


def test_in_a_compiled_block_what_is_fused_is_free() -> None:
    x = torch.ones(2, 2, 8, 4)
    multiply, attend, sort, scan, *others = (
        operations(run)[-1]
        for run in (
            lambda: x[0, 0] @ x[0, 0].t(),
            lambda: F.scaled_dot_product_attention(x, x, x),
            lambda: x.sort(),
            lambda: x.cumsum(0),
            lambda: x.sin(),
            lambda: F.layer_norm(x, (4,)),
            lambda: x.bfloat16(),
        )
    )
    own = Estimated(None, "fp32")
    costs = InCompiled(own)
    called = (multiply, attend, sort, scan)
    assert [costs.of(one) for one in called] == [own.of(one) for one in called]
    assert all(own.of(one) > 0 for one in others)
    assert [costs.of(one) for one in others] == [0.0, 0.0, 0.0]
    assert costs.of_watching() == 0
    assert "what the compiler fuses" in costs.basis


def test_watching_costs_something_on_a_cpu() -> None:
    assert Measured(CPU, Estimated(None, "fp32")).of_watching() > 0
    assert Estimated(None, "fp32").of_watching() > 0
    assert Estimated(gpu_named("h100"), "bf16").of_watching() == 0
