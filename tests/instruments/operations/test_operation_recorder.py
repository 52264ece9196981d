"""What is recorded of a step: whose each operation is, what it is for, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recorded_operations import LINEAR, X, flops, linear, recorded, split, trainer_record
from small_runs import small_config
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from bptool.instruments.operations.recorder import OperationRecorder
from bptool.model.early_gradients import computing_gradient


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


def test_nobody_listens_after_it() -> None:
    with OperationRecorder():
        backward = torch.autograd.backward
    assert torch.autograd.backward is not backward
    with computing_gradient("input") as nothing:
        assert nothing is None


def test_inference_mode_is_taken_apart_too() -> None:
    recorder = OperationRecorder()
    with torch.inference_mode(), recorder:
        F.linear(X, torch.ones(16, 16))
    assert flops(recorder.trace().operations) == LINEAR
