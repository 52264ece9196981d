"""What is recorded of a step: whose each operation is, what it is for, and when."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recorded_operations import flops, recorded, split
from small_runs import run_steps, small_config, transformer_step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from bptool.instruments.operations.recorder import OperationRecorder
from bptool.instruments.operations.trace import OperationTrace
from bptool.model.early_gradients import computing_gradient

X = torch.randn(5, 16)
LINEAR = 2 * 5 * 16 * 16
"""FLOPs of a 16 x 16 layer on `X`."""


def linear(trained: bool = True) -> nn.Linear:
    return nn.Linear(16, 16).requires_grad_(trained)


class Lora(nn.Module):
    """A frozen layer and what is trained in its place (Hu et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = linear(trained=False)
        self.down = nn.Linear(16, 4, bias=False)
        self.up = nn.Linear(4, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + 2 * self.up(self.down(x))
        return result


class TestTwoGradients:
    """Each layer's FLOPs by hand."""

    def test_a_first_layer_owes_no_gradient_of_its_input(self) -> None:
        trace = recorded(nn.Sequential(linear(), nn.ReLU(), linear()), X)
        assert split(trace, "0") == (LINEAR, 0, LINEAR, 0)
        assert split(trace, "2") == (LINEAR, LINEAR, LINEAR, 0)

    def test_a_square_layer_is_no_riddle(self) -> None:
        """Rows, inputs and outputs are as many, so that shapes tell nothing."""
        trace = recorded(nn.Sequential(linear(), linear()), torch.randn(16, 16))
        assert split(trace, "1") == (8192, 8192, 8192, 0)

    def test_frozen_layers(self) -> None:
        trace = recorded(nn.Sequential(linear(False), linear(), linear(False)), X)
        assert split(trace, "0") == (LINEAR, 0, 0, 0)
        assert split(trace, "1") == (LINEAR, 0, LINEAR, 0)
        assert split(trace, "2") == (LINEAR, LINEAR, 0, 0)
        assert {"1", "2"} <= trace.differentiated
        assert "0" not in trace.differentiated

    def test_an_adapter(self) -> None:
        trace = recorded(nn.Sequential(linear(), Lora()), X)
        assert split(trace, "1.base") == (LINEAR, LINEAR, 0, 0)
        assert split(trace, "1.down") == split(trace, "1.up") == (640, 640, 640, 0)

    def test_a_tied_weight(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(10, 16)

            def forward(self, ids: Tensor) -> Tensor:
                x: Tensor = self.table(ids)
                return x @ self.table.weight.T

        trace = recorded(Tied(), torch.randint(10, (3, 4)))
        assert split(trace, "") == (3840, 3840, 3840, 0)
        sums = [o for o in trace.operations if o.op == "add"]
        assert [(o.kind, o.module) for o in sums] == [("wgrad", "table")]
        lookups = [o for o in trace.operations if o.op == "embedding_dense_backward"]
        assert [(o.kind, o.module) for o in lookups] == [("wgrad", "table")]

    @pytest.mark.parametrize("stored", ["cast", "sliced", "transposed", "normed", "offset"])
    def test_a_weight_that_is_worked_on_first(self, stored: str) -> None:
        class Worked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(16, 16))
                self.scale = nn.Parameter(torch.ones(1))

            def forward(self, x: Tensor) -> Tensor:
                worked = {
                    "cast": self.weight.double().float(),
                    "sliced": self.weight[:, :16].clone(),
                    "transposed": self.weight.T.contiguous().T,
                    "normed": self.scale * self.weight / 3,
                    "offset": 1 + self.weight,
                }
                return F.linear(x, worked[stored])

        assert split(recorded(nn.Sequential(linear(), Worked()), X), "1") == (LINEAR, LINEAR, LINEAR, 0)

    def test_weight_norm(self) -> None:
        trace = recorded(nn.Sequential(linear(), weight_norm(linear())), X)
        assert split(trace, "1") == (LINEAR, LINEAR, LINEAR, 0)

    def test_an_input_that_is_scaled_is_no_parameter(self) -> None:
        """`x * w` has a parameter for its only source, as a graph without constants shows it."""

        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(16))

            def forward(self, x: Tensor) -> Tensor:
                return x * self.scale

        assert split(recorded(nn.Sequential(Scaled(), linear()), X), "1") == (LINEAR, LINEAR, LINEAR, 0)

    def test_a_wanted_gradient_of_the_batch(self) -> None:
        trace = recorded(linear(), X.clone().requires_grad_())
        assert split(trace) == (LINEAR, LINEAR, LINEAR, 0)

    def test_a_function_of_the_users(self) -> None:
        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
                ctx.save_for_backward(x, weight)
                return x @ weight

            @staticmethod
            def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
                x, weight = ctx.saved_tensors
                both = slope * 1.0  # of use for both gradients
                return both @ weight.T, x.T @ both

        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(16, 16))

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = Product.apply(x, self.weight)  # type: ignore[no-untyped-call]
                return y

        trace = recorded(nn.Sequential(linear(), Layer()), X)
        assert split(trace, "1") == (LINEAR, LINEAR, LINEAR, 0)

    def test_biases_and_norms(self) -> None:
        """They have no FLOPs, but time: the sums for their gradients are the parameters'."""
        trace = recorded(nn.Sequential(linear(), nn.LayerNorm(16), linear()), torch.randn(2, 3, 16))
        sums = [(o.module, o.kind) for o in trace.operations if o.op == "sum" and o.phase == "backward"]
        assert sums == [("2", "wgrad"), ("0", "wgrad")]
        norm = [o for o in trace.operations if o.op == "native_layer_norm_backward"]
        assert [o.kind for o in norm] == ["dgrad", "wgrad"]

    def test_gradients_that_meet(self) -> None:
        """Of a weight that is used three times, and of an input that goes two ways."""

        class Thrice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = linear()

            def forward(self, x: Tensor) -> Tensor:
                for _ in range(3):
                    x = self.layer(x)
                return x + x.exp()

        trace = recorded(nn.Sequential(linear(), Thrice()), X)
        sums = [(o.kind, o.module) for o in trace.operations if o.op == "add" and o.phase == "backward"]
        assert sums == [("dgrad", "1"), *[("wgrad", "1.layer")] * 4]

    def test_storages_that_come_again(self) -> None:
        """What is freed within a backward makes room for another tensor, perhaps of the same identity."""

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
                ctx.save_for_backward(x, weight)
                return x @ weight

            @staticmethod
            def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
                x, weight = ctx.saved_tensors
                for _ in range(9):
                    of_weight = x.T @ (slope * 2)
                return (slope * 3) @ weight.T, of_weight

        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(16, 16))

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = Function.apply(x, self.weight)  # type: ignore[no-untyped-call]
                return y

        trace = recorded(nn.Sequential(linear(), Layer()), X)
        assert [o.kind for o in trace.operations if o.op == "mul" and o.phase == "backward"][-2:] == ["wgrad", "dgrad"]

    def test_autocast_casts_a_weight_for_all_its_uses(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            trace = recorded(nn.Sequential(linear(), linear()), X)
        assert split(trace, "1") == (LINEAR, LINEAR, LINEAR, 0)
        assert {o.dtype for o in trace.operations if o.flops} == {"bfloat16"}
        casts = {o.kind for o in trace.operations if o.op == "_to_copy" and o.phase == "backward" and o.module == "1"}
        assert "wgrad" in casts


class TestKernelsThatMakeBothGradients:
    """One operation is recorded as two, each with its share."""

    def test_a_convolution(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4, padding=1, stride=2))
        trace = recorded(model, torch.randn(2, 3, 10, 10))
        first, second = 2 * 2 * 64 * (3 * 8 * 9), 2 * 2 * 16 * (2 * 8 * 9)
        assert split(trace, "0") == (first, 0, first, 0)
        assert split(trace, "1") == (second, second, second, 0)

    def test_an_lstm(self) -> None:
        """Each of its gates' products owes both gradients."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(6, 6)
                self.lstm = nn.LSTM(6, 7, num_layers=2, bidirectional=True)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.lstm(self.first(x))[0]
                return y

        gates = 2 * 3 * 2 * sum(4 * 7 * (inputs + 7) for inputs in (6, 6, 14, 14))
        assert split(recorded(Model(), torch.randn(3, 2, 6)), "lstm") == (gates, gates, gates, 0)

    def test_shares_add_up(self) -> None:
        trace = recorded(nn.Sequential(linear(), nn.LayerNorm(16), linear()), X)
        dgrad, wgrad = (o for o in trace.operations if o.op == "native_layer_norm_backward")
        moved = 4 * (5 * 16 * 2 + 2 * 5 + 2 * 16 + 5 * 16 + 2 * 16)  # slope, x, mean, rstd, weight, bias; three results
        assert dgrad.bytes_moved + wgrad.bytes_moved == moved
        assert dgrad.bytes_moved > wgrad.bytes_moved > 0


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


class TestModules:
    def test_a_shared_module_goes_by_the_name_of_the_call(self) -> None:
        shared = linear()
        trace = recorded(nn.Sequential(linear(), Holder(shared), Holder(shared), shared), X)
        for name in ("1.inner", "2.inner", "3"):
            assert split(trace, name) == (LINEAR, LINEAR, LINEAR, 0)
            assert trace.calls[name] == 1
            assert trace.types[name] == "Linear"

    def test_a_reused_module_is_counted_once_a_call(self) -> None:
        layer = linear()

        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.layer(self.layer(x))
                return y

        trace = recorded(Twice(), X)
        assert split(trace, "layer") == (2 * LINEAR, LINEAR, 2 * LINEAR, 0)
        assert trace.calls == {"": 1, "layer": 2}

    def test_modules_that_are_never_called(self) -> None:
        model = nn.Sequential(linear())
        model.register_module("spare", Holder(linear()))
        trace = recorded(Holder(model[0]), X)
        assert split(trace, "inner") == (LINEAR, 0, LINEAR, 0)
        trace = recorded(model[:1], X)
        assert trace.calls == {"": 1, "0": 1}


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = linear()
        self.blocks = nn.ModuleList(nn.Sequential(linear(), nn.GELU(), Lora()) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class TestRecomputation:
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_users_own_is_found_without_being_announced(self, reentrant: bool) -> None:
        """PyTorch's checkpoint runs forwards again within the backward; only the other kind stops early."""
        trace = recorded(Checkpointed(reentrant), X)
        for block in ("blocks.0", "blocks.1"):
            assert split(trace, f"{block}.0") == (LINEAR, LINEAR, LINEAR, LINEAR)
            assert split(trace, f"{block}.2.down") == (640, 640, 640, 640)
            assert split(trace, f"{block}.2.up") == (640, 640, 640, 640 if reentrant else 0)
        assert trace.calls["blocks.0.0"] == 1

    def test_what_a_block_does_itself_is_the_blocks(self) -> None:
        """The block is not called again: its forward is run from within the backward of whatever needs it first."""
        config = small_config({"activation_checkpoint.policy": "full", "training.loss": "plain"})
        trace = trainer_record(config)
        adds = [o.module for o in trace.operations if o.phase == "recompute" and o.op == "add"]
        assert adds.count("blocks.0") == adds.count("blocks.1") == 1
        assert {o.kind for o in trace.operations if o.phase == "recompute"} == {"recompute"}


def trainer_record(config: Any, micro_batches: int = 1, fake: bool = False) -> OperationTrace:
    recorder = OperationRecorder()
    with FakeTensorMode() if fake else nullcontext():
        step = transformer_step(config, recorder)
        with recorder, recorder.watching(step.model):
            run_steps(step, 2, micro_batches)
    return recorder.traces()[-1]


class TestStep:
    def test_fake_tensors_tell_the_same(self) -> None:
        """But for what a CPU's fake backward must allocate anew where the real one adds in place."""
        config = small_config({"activation_checkpoint.policy": "every_k", "training.gradient_accumulation_steps": 2})

        def costs(fake: bool) -> list[tuple[Any, ...]]:
            operations = trainer_record(config, 2, fake).operations
            return [(o.phase, o.kind, o.micro_batch, o.module, o.op, o.shapes, o.flops) for o in operations if o.flops]

        assert costs(fake=True) == costs(fake=False)

    def test_steps_and_micro_batches_are_told_apart(self) -> None:
        recorder = OperationRecorder()
        step = transformer_step(small_config(), recorder)
        with recorder, recorder.watching(step.model):
            run_steps(step, 3, 2)
        traces = recorder.traces()
        assert len(traces) == 3
        assert sum((trace.operations for trace in traces), ()) == recorder.trace().operations
        of = {i: flops(o for o in traces[2].operations if o.micro_batch == i) for i in (0, 1)}
        assert of[0] == of[1] > 0
        assert traces[2].calls["blocks.1.attention"] == 2
        assert {o.micro_batch for o in traces[2].operations if o.phase == "optimizer"} == {0}

    def test_the_fused_losss_gradients_are_made_in_the_forward(self) -> None:
        config = small_config({"training.loss": "fused"})
        trace = trainer_record(config)
        tokens, width, words = 32, 16, 32
        each = 2 * tokens * width * words
        assert split(trace, "loss") == (each, each, each, 0)
        assert {o.phase for o in trace.operations if o.module == "loss" and o.flops} == {"forward"}

    def test_every_operation_of_a_step_is_the_optimizers_after_the_backward(self) -> None:
        trace = trainer_record(small_config())
        assert {o.kind for o in trace.operations if o.phase in ("clip", "optimizer")} == {"optimizer"}

    def test_nodes_link_forward_and_backward(self) -> None:
        trace = recorded(nn.Sequential(linear(), nn.GELU(), linear()), X)
        forward = {o.node: o.op for o in trace.operations if o.phase == "forward" and o.node is not None}
        back = {o.op: forward.get(o.node) for o in trace.operations if o.phase == "backward" and o.node is not None}
        assert back["gelu_backward"] == "gelu"
        assert back["mm"] == "addmm"


def test_nobody_listens_after_it() -> None:
    with OperationRecorder():
        backward = torch.autograd.backward
    assert torch.autograd.backward is not backward
    with computing_gradient("input") as nothing:
        assert nothing is None


class TestTimes:
    """On a clock that advances by one with each look at it."""

    @pytest.fixture
    def trace(self) -> OperationTrace:
        ticks = iter(range(1000))
        recorder = OperationRecorder(lambda: float(next(ticks)))
        with recorder, recorder.phase("step"), recorder.phase("forward"):  # 0, 1
            torch.neg(X)  # 2 to 3, noted at 4
            with recorder.phase("recompute"):  # 5
                torch.neg(X)  # 6 to 7, noted at 8
            torch.neg(X)  # after 9: 10 to 11, noted at 12
        return recorder.trace()

    def test_starts_and_durations(self, trace: OperationTrace) -> None:
        assert [(o.start_s, o.duration_s) for o in trace.operations] == [(2.0, 1.0), (6.0, 1.0), (10.0, 1.0)]

    def test_time_between_operations_is_its_phases(self, trace: OperationTrace) -> None:
        """The forward's: 1 to 2, then 4 to 5 and 9 to 10. The recorder's own, 3 to 4, is nobody's."""
        assert [o.outside_s for o in trace.operations] == [1.0, 1.0, 2.0]

    def test_without_a_clock(self) -> None:
        assert {(o.start_s, o.duration_s, o.outside_s) for o in recorded(linear(), X).operations} == {(0.0, 0.0, 0.0)}


def test_inference_mode_is_taken_apart_too() -> None:
    recorder = OperationRecorder()
    with torch.inference_mode(), recorder:
        F.linear(X, torch.ones(16, 16))
    assert flops(recorder.trace().operations) == LINEAR
