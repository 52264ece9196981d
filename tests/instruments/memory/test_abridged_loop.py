"""The record of the fused loss from a few of its chunks against the record of them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bptool.analysis.machine import THIS_CPU, Machine
from bptool.gpus import GPUS
from bptool.instruments.memory.trace import MemoryTrace
from bptool.model import loss
from bptool.model.alike import abridging, alike
from bptool.model.loss import linear_cross_entropy

MACHINES = {"cpu": THIS_CPU, "gpu": Machine(GPUS["h100"])}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[64, 61, 24, 8])
def tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Eight chunks, eight of which the last is shorter, three, and one; products in five parts or fewer."""
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: 8)
    monkeypatch.setattr(loss, "_PRODUCT_ROWS", 20)
    return int(request.param)


def record(machine: Machine, take: Any) -> tuple[MemoryTrace, int]:
    """Of what `take` does on fake tensors, and how many products it was seen to do."""
    with machine.simulated() as ledger, Products() as products:
        take()
    return ledger.trace(), products.count


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_it_is_the_full_record(
    machine: str, softcap: float, dtype: torch.dtype, wanted: tuple[bool, bool], tokens: int
) -> None:
    def take() -> None:
        x = torch.empty(tokens, 16, dtype=dtype, requires_grad=wanted[0])
        weight = torch.empty(90, 16, dtype=dtype, requires_grad=wanted[1])
        found = linear_cross_entropy(x, weight, torch.empty(tokens, dtype=torch.int64), softcap)
        if any(wanted):
            found.backward()

    def take_all() -> None:
        with abridging(iter):
            take()

    short, n_short = record(MACHINES[machine], take)
    full, n_full = record(MACHINES[machine], take_all)
    assert short == full
    assert len(full.events) > 20
    assert n_short < n_full if tokens > 24 else n_short <= n_full


class TestALoop:
    """Of our own, with rounds that keep to the rules and rounds that don't."""

    @staticmethod
    def both(loop: Any) -> tuple[MemoryTrace, MemoryTrace, list[int]]:
        """The record, the full record, and the rounds that were run for the first."""
        run: list[int] = []

        def noted(numbers: Sequence[int]) -> Iterator[int]:
            for number in alike(numbers):
                run.append(number)
                yield number

        def full() -> None:
            with abridging(iter):
                loop(iter(range(6)))

        short, _ = record(THIS_CPU, lambda: loop(noted(range(6))))
        return short, record(THIS_CPU, full)[0], run

    def test_alike(self) -> None:
        def loop(numbers: Iterator[int]) -> None:
            total = torch.zeros(3)
            for number in numbers:
                total += torch.ones(3 if number < 5 else 1).mul(2).sum()

        short, full, rounds = self.both(loop)
        assert short == full
        assert rounds == [0, 1, 5]

    def test_nested(self) -> None:
        def loop(numbers: Iterator[int]) -> None:
            total = torch.zeros(3)
            for _ in numbers:
                for _ in alike(range(5)):
                    total += torch.ones(3).mul(2)

        short, full, rounds = self.both(loop)
        assert short == full
        assert rounds == [0, 1, 5]

    def test_a_round_that_keeps_what_it_makes(self) -> None:
        def loop(numbers: Iterator[int]) -> None:
            kept = [torch.ones(3) for _ in numbers]
            del kept

        short, full, rounds = self.both(loop)
        assert short == full
        assert rounds == list(range(6))

    def test_a_round_that_releases_what_the_one_before_made(self) -> None:
        def loop(numbers: Iterator[int]) -> None:
            for _ in numbers:
                last: Tensor = torch.ones(3)
            del last

        short, full, rounds = self.both(loop)
        assert short == full
        assert rounds == list(range(6))

    def test_rounds_that_grow(self) -> None:
        def loop(numbers: Iterator[int]) -> None:
            total = torch.zeros(1)
            for number in numbers:
                total += torch.ones(3 + number).sum()

        short, full, rounds = self.both(loop)
        assert short == full
        assert rounds == list(range(6))


def test_with_values_every_round_is_run() -> None:
    real = Machine(fake=False)
    with real.simulated():
        assert list(alike(range(9))) == list(range(9))
    assert list(alike(range(9))) == list(range(9))
    with THIS_CPU.simulated():
        assert len(list(alike(range(9)))) < 9
