from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from small_runs import masked_regression, question_of, small_config
from torch import Tensor, nn

from bptool.analysis.profile.measuring import Measurement, Plan, measure, stoppable
from bptool.analysis.profile.prediction import PHASES
from bptool.analysis.profile.timing import phase_times
from bptool.training.workload import Batch, Workload

PLAN = Plan(steps=6, warmup=1, recorded=2)


def measured(
    changes: Mapping[str, object] | None = None, workload: Workload | None = None, plan: Plan = PLAN
) -> Measurement:
    with stoppable() as stop:
        return measure(question_of(small_config(changes), workload), plan, stop)


def test_timed_and_recorded_steps_are_those_of_the_plan() -> None:
    found = measured({"training.gradient_accumulation_steps": 3})
    assert (len(found.timed), len(found.recorded), len(found.traces)) == (6, 2, 2)
    assert {step.units for step in (*found.timed, *found.recorded)} == {3 * 2 * 16}
    assert not found.interrupted
    for trace in found.traces:
        assert {operation.micro_batch for operation in trace.operations} == {0, 1, 2}
        assert all(operation.duration_s > 0 for operation in trace.operations)
    assert found.forward_s
    assert found.forward_s > 0


def test_phases_lie_inside_the_step() -> None:
    found = measured({"activation_checkpoint.policy": "full"})
    for step in (*found.timed, *found.recorded):
        assert step.seconds.keys() == {"step", *PHASES}
        assert sum(step.seconds[name] for name in PHASES) <= step.seconds["step"]


def test_a_record_leaves_nothing_behind() -> None:
    """Hooks would slow down the timed steps that follow."""
    models: list[nn.Module] = []
    workload = masked_regression()

    def model() -> nn.Module:
        models.append(workload.model())
        return models[-1]

    measured(workload=replace(workload, model=model))
    (only,) = models
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in only.modules())


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("warmup", [0, 2])
def test_as_many_are_recorded_as_the_plan_says(steps: int, warmup: int) -> None:
    found = measured(workload=masked_regression(), plan=Plan(steps=steps, warmup=warmup, recorded=3))
    assert (len(found.timed), len(found.recorded), len(found.traces)) == (steps, 3, 3)


def test_no_recorded_steps() -> None:
    found = measured(plan=replace(PLAN, recorded=0))
    assert (found.recorded, found.traces) == ((), ())


@pytest.mark.parametrize("mode", ["fp32", "bf16-mixed", "bf16", "fp16-mixed"])
def test_every_precision_of_a_cpu(mode: str) -> None:
    found = measured({"precision.mode": mode}, plan=Plan(steps=2, warmup=0, recorded=1))
    assert phase_times(found.timed).backward_over_forward > 0
    dtypes = {operation.dtype for operation in found.traces[0].operations if operation.flops}
    assert dtypes & {{"fp32": "float32", "bf16": "bfloat16", "bf16-mixed": "bfloat16", "fp16-mixed": "float16"}[mode]}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own insides, as they are imported
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_is_timed_and_not_recorded() -> None:
    found = measured({"training.compile": True}, plan=Plan(steps=2, warmup=1, recorded=2))
    assert (len(found.timed), found.recorded, found.traces) == (2, (), ())
    assert found.forward_s


class TestInterrupted:
    @staticmethod
    def after(number: int, plan: Plan = PLAN) -> Measurement:
        def done(steps: int, total: int) -> None:
            if steps == number:
                os.kill(os.getpid(), signal.SIGINT)

        with stoppable() as stop:
            return measure(question_of(small_config()), plan, stop, done)

    def test_what_was_gathered_is_kept(self, capfd: pytest.CaptureFixture[str]) -> None:
        found = self.after(5)
        assert (len(found.timed), found.interrupted, found.forward_s) == (4, True, None)
        assert len(found.traces) == len(found.recorded) == 1  # the other one was due after the sixth
        assert any("4 steps were timed" in warning for warning in found.warnings)

    def test_before_the_first_timed_step(self) -> None:
        found = self.after(1)
        assert (found.timed, found.recorded, found.interrupted) == ((), (), True)

    def test_ctrl_c_is_what_it_was_afterwards(self) -> None:
        before = signal.getsignal(signal.SIGINT)
        self.after(1)
        assert signal.getsignal(signal.SIGINT) is before


def test_steps_that_update_nothing_are_told() -> None:
    workload = masked_regression()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return workload.loss(model, batch) * torch.nan

    found = measured(workload=replace(workload, loss=loss))
    assert any(warning.startswith("6 of 6 timed steps updated nothing") for warning in found.warnings)
    assert phase_times(found.timed).optimizer.median_s == 0
