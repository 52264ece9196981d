from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from small_runs import (
    CPU,
    Perceptron,
    copies,
    masked_regression,
    random_batches,
    run_steps,
    same_bits,
    small_config,
    transformer_step,
)
from torch import nn

from bptool.errors import DeviceError, ResumeError
from bptool.training.assembly import build_model, build_step, capture, load_model, restore
from bptool.training.checkpoint import Checkpoint
from bptool.training.instrument import Announcer
from bptool.training.workload import Workload, transformer_workload


class TestBuild:
    def test_weights_are_a_function_of_the_seed(self) -> None:
        def weights(seed: int) -> dict[str, torch.Tensor]:
            config = small_config({"run.seed": seed})
            torch.rand(seed + 7)  # whatever was drawn before
            own = build_step(config, masked_regression(), CPU, Announcer())
            return {**transformer_step(config).model.state_dict(), **own.model.state_dict()}

        assert same_bits(weights(1), weights(1))
        assert not same_bits(weights(1), weights(2))

    def test_a_model_on_meta_takes_no_memory(self) -> None:
        model = build_model(transformer_workload(small_config()), torch.device("meta"), torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}

    def test_the_default_dtype_is_put_back_after_an_error_too(self) -> None:
        def fail() -> nn.Module:
            raise ZeroDivisionError

        workload = Workload(fail, lambda generator: None, lambda model, batch: torch.zeros(()))
        with pytest.raises(ZeroDivisionError):
            build_model(workload, CPU, torch.bfloat16)
        assert torch.get_default_dtype() == torch.float32


class TestRestore:
    def test_the_weights_of_another_model_are_named(self) -> None:
        small, wide = transformer_step(small_config()), transformer_step(small_config({"model.d_ff": 64}))
        before = copies(wide.model.state_dict())
        with pytest.raises(ResumeError) as caught:
            restore(wide, capture(small, 12, {}))
        lines = caught.value.message.splitlines()
        assert lines[0] == "the checkpoint of step 12 is of another model (6 tensors differ):"
        assert lines[1] == ("  blocks.0.feed_forward.down.weight: (16, 32) in the checkpoint, (16, 64) in the model")
        assert len(lines) == 6  # five of them, and no more
        assert same_bits(wide.model.state_dict(), before)

    def test_names_that_one_of_them_has_not(self) -> None:
        model = Perceptron()
        state = copies(model.state_dict())
        state["third.bias"] = state.pop("second.bias")
        with pytest.raises(ResumeError) as caught:
            load_model(model, Checkpoint(3, state, {}, {}))
        assert caught.value.message.splitlines()[1:] == [
            "  second.bias: missing in the checkpoint, (2,) in the model",
            "  third.bias: (2,) in the checkpoint, missing in the model",
        ]


class TestCompile:
    def test_without_a_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        with pytest.raises(DeviceError, match=r"training\.compile needs a C\+\+ compiler") as caught:
            transformer_step(small_config({"training.compile": True}))
        assert "training.compile=false" in caught.value.remedy

    @pytest.mark.filterwarnings("ignore")  # of torch.compile's own insides, as they are imported
    def test_the_compiler_that_cxx_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "own-compiler").write_text("#!/bin/sh\n")
        (tmp_path / "own-compiler").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("CXX", "own-compiler")
        transformer_step(small_config({"training.compile": True}))

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform != "linux", reason="needs a C++ compiler")
    @pytest.mark.filterwarnings("ignore")  # of torch.compile's own insides
    def test_a_compiled_step_is_the_eager_one_under_the_same_names(self) -> None:
        changes = {"model.d_model": 32, "activation_checkpoint.policy": "every_k"}
        eager = transformer_step(small_config(changes))
        compiled = transformer_step(small_config({**changes, "training.compile": True}))
        assert list(compiled.model.state_dict()) == list(eager.model.state_dict())
        assert same_bits(compiled.model.state_dict(), eager.model.state_dict())
        for step in (eager, compiled):
            step.accumulate(random_batches(step, 0), [1])
        for (name, left), right in zip(compiled.model.named_parameters(), eager.model.parameters(), strict=True):
            torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-6, msg=name)
        for step in (eager, compiled):
            step.optimizers.zero_grad()
        losses = [[outcome.loss for outcome in run_steps(step, 3)] for step in (eager, compiled)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        restore(transformer_step(small_config(changes)), capture(compiled, 3, {}))
