"""The ledger on fake tensors against the real allocator's own events, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from allocator_events import measured_peak, predicted
from small_runs import question_of, small_config
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from bptool.analysis.memory.fit import predict_peak
from bptool.analysis.memory.simulation import STEADY
from bptool.config.schema import Config
from bptool.instruments.memory.ledger import MemoryLedger
from bptool.instruments.memory.peak import highest_sum, noted_allocations
from bptool.training.workload import transformer_workload

SHAPE = {
    "model.n_layers": 1,
    "model.d_model": 64,
    "model.d_ff": 128,
    "model.context_length": 32,
    "model.vocab_size": 128,
}


def of_shape(changes: dict[str, Any]) -> Config:
    return small_config({**SHAPE, **changes})


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer.name": "muon", "model.bias": True}, {"model.attention": "eager", "training.loss": "plain"}],
    ids=str,
)
def test_the_prediction_is_the_allocators_peak(changes: dict[str, Any]) -> None:
    """As the commands predict it; `analysis/test_exact_on_cpu.py` has many more settings."""
    config = of_shape(changes)
    workload = transformer_workload(config)
    assert measured_peak(config, workload) == predict_peak(question_of(config, workload)).peak_bytes


class TestWithoutScratch:
    """What a ledger that is told of no kernel's scratch leaves out."""

    @pytest.mark.parametrize("mode", ["bf16", "bf16-mixed"])
    def test_a_bf16_product(self, mode: str) -> None:
        """oneDNN packs what it multiplies, inside the operation."""
        config = of_shape({"precision.mode": mode})
        workload = transformer_workload(config)
        measured = measured_peak(config, workload)
        without = predicted(config, workload, MemoryLedger())
        assert 0 < measured - int(without.live_bytes[without.peak_event(STEADY)]) < 0.1 * measured


def live(ledger: MemoryLedger) -> int:
    return int(ledger.trace().live_bytes[-1])


class TestLedger:
    """By hand, on fake tensors."""

    def test_live_bytes_follow_the_storages(self) -> None:
        with FakeTensorMode(), MemoryLedger() as ledger:
            x = torch.empty(10, dtype=torch.float64)
            assert live(ledger) == 80
            view = x.view(2, 5)[0]
            assert live(ledger) == 80
            y = x.neg()
            assert live(ledger) == 160
            del x
            assert live(ledger) == 160  # the view holds the storage
            del view
            assert live(ledger) == 80
            y.neg_()
            assert live(ledger) == 80
            del y
            assert live(ledger) == 0

    def test_the_peaks_of_phases(self) -> None:
        """Each phase's own, the innermost alone, and what was there when it began."""
        with FakeTensorMode(), MemoryLedger() as ledger:
            with ledger.phase("step"):
                x = torch.empty(100, dtype=torch.uint8)
                with ledger.phase("forward"):
                    y = torch.empty(50, dtype=torch.uint8)
                with ledger.phase("backward"):
                    del y
                    with ledger.phase("recompute"):
                        z = torch.empty(300, dtype=torch.uint8)
                        del z
                    w = torch.empty(70, dtype=torch.uint8)
            del w
            with ledger.phase("step"), ledger.phase("forward"):
                pass
            del x
        trace = ledger.trace()

        def peaks(step: int) -> dict[str, int]:
            return {name: int(trace.live_bytes[trace.peak_event(step, name)]) for name in trace.phases_of(step)}

        # A phase ends within the one around it, so that one holds at least what the other left.
        assert peaks(0) == {"step": 170, "forward": 150, "backward": 170, "recompute": 400}
        assert peaks(1) == {"step": 100, "forward": 100}
        assert trace.live_bytes[trace.peak_event(0)] == 400


class TestSums:
    """Autograd adds gradients that meet in place of the first, where it alone holds it; fake ones it does not."""

    @pytest.mark.parametrize(
        ("function", "tensors"),
        [
            (lambda x: x.neg() + x.neg(), 2),
            (lambda x: x.neg() + x.t().neg().t(), 3),  # a view's base holds its storage too
        ],
        ids=["first", "view"],
    )
    def test_what_a_backward_needs_for_a_sum(self, function: Callable[[Tensor], Tensor], tensors: int) -> None:
        """Each branch's gradient, and a third tensor for the sum only where the first is held by somebody else."""
        with FakeTensorMode(), MemoryLedger() as ledger:
            loss = self._forward(function)
            begin = len(ledger.trace().events)
            loss.backward()
        live_bytes = ledger.trace().live_bytes
        with_values = self._forward(function)
        with noted_allocations() as changes:
            with_values.backward()
        rise = int(live_bytes[begin:].max() - live_bytes[begin - 1])
        assert rise == highest_sum(changes)
        assert rise // 8000 == tensors

    def test_a_formula_is_not_autograd(self) -> None:
        """`a * b + c * d` makes a third tensor, and then lets go of the first two."""
        with FakeTensorMode(), MemoryLedger() as ledger, torch.no_grad():
            x = torch.empty(100, dtype=torch.uint8)
            y = x * x + x * x
            del x, y
        assert int(ledger.trace().live_bytes.max()) == 400

    @staticmethod
    def _forward(function: Callable[[Tensor], Tensor]) -> Tensor:
        x = torch.ones(40, 50, requires_grad=True)
        return function(x.neg()).sum()


class TestNumbers:
    """Python numbers that autograd keeps until the node has run."""

    @pytest.mark.parametrize(
        ("function", "kept"),
        [
            (lambda x: x * 2.0, 8),
            (lambda x: 2 * x, 8),
            (lambda x: x / 3, 8),
            (lambda x: x * True, 1),
            (lambda x: x * 2j, 16),
            (lambda x: x + 1.0, 0),
            (lambda x: x**2, 0),
            (lambda x: x.detach() * 2.0, 0),
        ],
    )
    def test_which_are_kept(self, function: Callable[[Tensor], Tensor], kept: int) -> None:
        with noted_allocations() as changes:
            x = torch.ones(4, requires_grad=True)
            y = function(x)
        with FakeTensorMode(), MemoryLedger() as ledger:
            x = torch.ones(4, requires_grad=True)
            z = function(x)
        assert live(ledger) - x.nbytes - z.nbytes == kept
        assert sum(changes) == 16 + y.nbytes + kept

    def test_they_go_when_the_node_has_run(self) -> None:
        """Not those of nodes that wait; the others with the backward's end."""
        lives = []
        with FakeTensorMode(), MemoryLedger() as ledger:
            x = torch.ones(4, requires_grad=True)
            y = x * 2.0
            y.register_hook(lambda gradient: lives.append(live(ledger)))
            z = y.exp() * 3.0
            unused = y * 4.0
            with ledger.phase("backward"):
                z.sum().backward()
                lives.append(live(ledger))
            lives.append(live(ledger))
        held = x.nbytes + y.nbytes + z.nbytes + unused.nbytes
        assert lives[0] >= held + 8
        assert x.grad is not None
        assert lives[-1] == held + x.grad.nbytes


class TestValues:
    """Fake tensors have none."""

    def test_a_model_that_is_drawn_until_it_fits(self) -> None:
        with FakeTensorMode(), MemoryLedger():
            for bound in (2.0, 0.001):  # it has two ways
                torch.nn.init.trunc_normal_(torch.empty(3, 4), a=-bound, b=bound)

    def test_a_constant_is_known(self) -> None:
        with FakeTensorMode(), MemoryLedger():
            assert torch.tensor(5).item() == 5

    def test_a_step_must_not_depend_on_one(self) -> None:
        with FakeTensorMode(), MemoryLedger() as ledger, ledger.phase("forward"):
            x = torch.ones(3).sum()
            with pytest.raises(DataDependentOutputException):
                x.item()


def test_fake_tensors_take_no_memory() -> None:
    """The prediction of a model of 10 GB allocates next to nothing."""
    config = small_config({"model.d_model": 8192, "model.d_ff": 32768, "model.n_heads": 64, "model.n_layers": 1})
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        prediction = predict_peak(question_of(config))
    assert prediction.peak_bytes > 10e9
    assert profiler.profiler is not None
    events: Any = profiler.profiler.kineto_results
    allocated = [event.nbytes() for event in events.events() if event.name() == "[memory]"]
    assert sum(n for n in allocated if n > 0) < 2**20


def test_a_models_own_numbers_are_read_and_others_are_not_known() -> None:
    """While a model is made, `torch.tensor(3).item()` is 3 without values too; of what is computed nothing is known."""
    with FakeTensorMode(), MemoryLedger():
        assert torch.tensor(3).item() == 3
        assert torch.linspace(0.5, 1, 4)[2].item() == 0
