from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from foreign_models import gpt2 as foreign_gpt2
from small_runs import Perceptron, masked_regression, question_of, small_config
from torch import Tensor, nn

from bptool.analysis.machine import Machine, machine_named
from bptool.analysis.profile import answers
from bptool.analysis.profile.admission import Admission
from bptool.analysis.profile.answers import Profiled, profile
from bptool.analysis.profile.assumptions import warnings
from bptool.analysis.profile.conventions import EXECUTED
from bptool.analysis.profile.measuring import Measurement, Plan
from bptool.analysis.profile.result import ProfileResult, Unexplained
from bptool.analysis.profile.roofline import Rates
from bptool.analysis.profile.tally import Tally, tally_of
from bptool.analysis.question import Question, ask
from bptool.config.target import CodeTarget
from bptool.errors import TargetError
from bptool.gpus import GPUS
from bptool.model.accounting import count_parameters, flops_per_token
from bptool.training.workload import Batch, Workload

PLAN = Plan(steps=6, warmup=1, recorded=2)
COUNT = Plan(measure=False)
GIB = 2**30


@pytest.fixture(autouse=True)
def _known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this machine take a second each, and are tested elsewhere."""

    def rates(mode: str, dtypes: Any, shape: Any, *, seconds: float) -> Rates:
        known = {"float32": 1e11, "bfloat16": 2e11, "float16": 1e10}
        step = {"bf16": "bfloat16", "bf16-mixed": "bfloat16", "fp16-mixed": "float16"}.get(mode, "float32")
        return Rates("cpu", known, step, 1e10, 1e-6, False, 1.0, "assumed", "assumed", "assumed")

    monkeypatch.setattr(answers, "cpu_rates", rates)


def question(changes: Mapping[str, object] | None = None, workload: Workload | None = None) -> Question:
    asked = replace(question_of(small_config(changes), workload), machine=Machine(None, 16 * GIB))
    if workload is None:
        return asked
    code = CodeTarget("net", "my_model.py")
    config = asked.config.model_copy(update={"run": asked.config.run.model_copy(update={"workload": str(code)})})
    return replace(asked, code=code, config=config)


def run(changes: Mapping[str, object] | None = None, workload: Workload | None = None, plan: Plan = PLAN) -> Profiled:
    return profile(question(changes, workload), plan)


def flops(result: ProfileResult) -> dict[str, Any]:
    """But the optimizer's: whether gradients are scaled depends on their values."""
    return {**result.flops.model_dump(), "optimizer_flops": None}


class TestMeasured:
    def test_every_part_is_there(self) -> None:
        changes = {"training.gradient_accumulation_steps": 3, "activation_checkpoint.policy": "full"}
        found = run(changes)
        result = found.result
        assert result.time is not None
        assert len(result.time.step.samples_s) == 6
        assert result.units_per_step == 3 * 2 * 16
        phases = ["data", "forward", "recompute", "backward", "clip", "optimizer"]
        assert [one.phase for one in result.unexplained] == phases
        assert result.predicted is not None
        assert [one.phase for one in result.predicted.phases] == phases
        assert all(one.measured_s for one in result.predicted.phases)
        assert result.recorder_overhead is not None
        assert result.finite_differences is not None
        assert [one.phase for one in result.memory] == phases
        assert not result.interrupted
        assert not result.compiled
        assert found.trace is not None
        ProfileResult.model_validate_json(result.model_dump_json())

    def test_flops_of_a_real_step_are_those_of_a_fake_one(self) -> None:
        changes = {"training.gradient_accumulation_steps": 3, "activation_checkpoint.policy": "full"}
        real, fake = run(changes, plan=Plan(steps=1, warmup=0, recorded=1)).result, run(changes, plan=COUNT).result
        assert flops(real) == flops(fake)
        without_times = [
            [module.model_copy(update=dict.fromkeys(TIMES)) for module in result.modules] for result in (real, fake)
        ]
        assert without_times[0] == without_times[1]

    def test_rates_follow_from_the_median_step(self) -> None:
        result = run().result
        assert result.time is not None
        assert result.tokens_per_s == pytest.approx(32 / result.time.step.median_s, rel=1e-9)
        config = small_config()
        per_token = flops_per_token(config.model, 16)
        per_s = result.tokens_per_s
        assert per_s is not None
        assert result.mfu == pytest.approx(per_s * per_token / 1e11)
        done = result.flops.forward_flops + result.flops.dgrad_flops + result.flops.wgrad_flops
        assert result.hfu == pytest.approx((done / 32) * per_s / 1e11)
        headline = [one for one in result.conventions if one.headline]
        assert [one.mfu for one in headline] == [result.mfu]
        assert result.peak_flops_per_s == 1e11

    def test_hfu_counts_what_is_recomputed_and_mfu_does_not(self) -> None:
        result = run({"activation_checkpoint.policy": "full"}).result
        executed = next(one for one in result.conventions if one.name == EXECUTED)
        counted = result.flops.forward_flops + result.flops.dgrad_flops + result.flops.wgrad_flops
        assert executed.flops_per_unit * 32 == counted + result.flops.recompute_flops
        assert result.hfu == executed.mfu

    def test_modules_and_the_unexplained_rest_add_up_to_the_phases(self) -> None:
        """What no operation is charged with is the unexplained rest: nothing is lost or counted twice."""
        result = run({"activation_checkpoint.policy": "full", "training.loss": "plain"}).result
        in_modules = sum(getattr(module, name) for module in result.modules for name in TIMES)
        phases = [one for one in result.unexplained if one.phase in ("forward", "recompute", "backward")]
        assert in_modules == pytest.approx(sum(one.operations_s + one.outside_s for one in phases))

    def test_parameters(self) -> None:
        result = run({"model.tied_embeddings": True}, plan=Plan(steps=1, warmup=0, recorded=1)).result
        total = count_parameters(small_config({"model.tied_embeddings": True}).model).total
        assert (result.parameters_count, result.trainable_parameters_count) == (total, total)

    @pytest.mark.parametrize("mode", ["bf16-mixed", "bf16", "fp16-mixed"])
    def test_precisions(self, mode: str) -> None:
        result = run({"precision.mode": mode}, plan=Plan(steps=1, warmup=0, recorded=1)).result
        assert result.peak_flops_per_s == {"bf16-mixed": 2e11, "bf16": 2e11, "fp16-mixed": 1e10}[mode]
        assert result.mfu

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")  # of torch.compile's own insides, as they are imported
    @pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
    def test_a_compiled_model(self) -> None:
        found = run({"training.compile": True}, plan=Plan(steps=2, warmup=1, recorded=1))
        assert found.result.compiled
        assert found.trace is None
        assert found.result.time is not None
        assert flops(found.result) == flops(run(plan=COUNT).result)
        assert all(op.duration_s is None for op in found.result.ops)
        assert any(one.startswith("compiled: times are of the compiled model") for one in found.result.assumptions)


@pytest.mark.parametrize(
    ("operations_s", "outside_s", "overhead", "said"),
    [
        (0.8, 0.15, 3.0, ""),
        (1.0, 0.05, None, ""),
        (0.4, 0.1, 0.4, "add up to 50% of the step's time: .* stop what else runs here"),
        (0.9, 0.3, 0.6, "add up to 120% of the step's time: .* a larger batch .* makes a step 1.6 times as long"),
    ],
)
def test_operations_that_do_not_add_up_to_the_step(
    operations_s: float, outside_s: float, overhead: float | None, said: str
) -> None:
    """In two phases of a second each."""
    phases = [
        Unexplained(phase=phase, measured_s=1, operations_s=one, outside_s=other, unexplained_s=1 - one - other)
        for phase, one, other in (("forward", operations_s, outside_s), ("backward", operations_s, outside_s))
    ]
    found = warnings(Admission(), Measurement((), (), (), None, (), False), phases, overhead)
    assert [bool(re.search(said, one)) for one in found] == [True] * bool(said)


TIMES = ("forward_s", "dgrad_s", "wgrad_s", "recompute_s")


class TestCountedOnly:
    @staticmethod
    def told(result: ProfileResult) -> str:
        of_time = [result.time, result.mfu, result.hfu, result.tokens_per_s, result.finite_differences]
        assert of_time == [None] * 5
        assert result.unexplained == []
        return " ".join(["assumed:", *result.assumptions, "warned:", *result.warnings])

    def test_as_was_asked(self) -> None:
        found = run(plan=COUNT)
        assert found.trace is None
        assert "assumed: counted, not run, as was asked" in self.told(found.result)
        assert found.result.warnings == []
        assert found.result.units_per_step == 32
        assert found.result.memory
        assert "peak memory is predicted, as memory-estimate does" in self.told(found.result)

    def test_a_gpu_that_is_elsewhere(self) -> None:
        asked = replace(question({"precision.mode": "bf16-mixed"}), machine=machine_named("auto", "h100"))
        result = profile(asked, PLAN).result
        assert "counted, not run: h100 is not here, this machine has no GPU" in self.told(result).split("warned:")[0]
        assert (result.gpu, result.peak_flops_per_s) == ("h100", 989.4e12)
        assert result.roofline is not None
        assert result.roofline.bytes_per_s == GPUS["h100"].bytes_per_s
        assert result.predicted is not None
        assert any("a lower bound" in one for one in result.assumptions)

    @pytest.mark.parametrize("capacity", [1000, 250_000])
    def test_a_step_that_does_not_fit(self, capacity: int) -> None:
        """Its weights, gradients and state alone do not (about 120 kB), or they do and its peak does not."""
        asked = replace(question({"training.micro_batch_size": 64}), machine=Machine(None, capacity))
        result = profile(asked, PLAN).result
        assert "counted, not run: " in self.told(result).split("warned:")[1]
        assert bool(result.memory) == (capacity > 1000)
        assert result.flops.forward_flops > 0

    def test_a_model_far_too_large_for_this_machine(self) -> None:
        asked = ask("llama3-70b", [], command="profile", device="cpu")
        result = profile(replace(asked, machine=Machine(None, 64 * GIB)), PLAN).result
        assert result.parameters_count == 70_553_706_496  # published
        assert len(result.extrapolated_from_layers) == 3
        assert "80 layers follow from" in self.told(result)
        assert result.memory == []
        assert "peak memory is predicted" not in self.told(result)


class TestInterrupted:
    @staticmethod
    def after(number: int) -> Profiled:
        def done(steps: int, total: int) -> None:
            if steps == number:
                os.kill(os.getpid(), signal.SIGINT)

        return profile(question(), PLAN, done)

    def test_what_was_gathered_is_the_answer(self) -> None:
        result = self.after(3).result
        assert result.interrupted
        assert result.time is not None
        assert len(result.time.step.samples_s) == 2
        assert result.finite_differences is None
        assert result.warnings[0].startswith("interrupted")

    def test_while_the_figures_are_made_of_what_was_gathered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """All of them are there."""

        def interrupted(trace: Any, model: Any, micro_batches: int, ran: int) -> Tally:
            os.kill(os.getpid(), signal.SIGINT)
            return tally_of(trace, model, micro_batches, ran)

        monkeypatch.setattr(answers, "tally_of", interrupted)
        before = signal.getsignal(signal.SIGINT)
        result = run().result
        assert signal.getsignal(signal.SIGINT) is before
        assert result.interrupted
        assert result.time is not None
        assert len(result.time.step.samples_s) == PLAN.steps
        assert result.finite_differences is not None

    def test_before_the_first_step(self) -> None:
        found = self.after(1)
        assert found.result.warnings == [found.result.warnings[0]]  # that it was interrupted, and no doubt of times
        assert found.result.interrupted
        assert (found.result.time, found.trace) == (None, None)
        assert flops(found.result) == flops(run(plan=COUNT).result)


class TestAnyModel:
    def test_a_users(self) -> None:
        result = run(workload=masked_regression()).result
        assert (result.unit, result.parameters_count) == ("rows", 32)
        assert result.mfu
        assert [one.name for one in result.conventions if one.headline] == ["model FLOPs, counted"]
        # 6 rows: 2 x 6 x (3 x 5 + 5 x 2) forward; the first layer owes no gradient of its input.
        assert (result.flops.forward_flops, result.flops.dgrad_flops, result.flops.wgrad_flops) == (300, 120, 300)

    def test_one_of_transformers(self) -> None:
        result = run(workload=foreign_gpt2(), plan=Plan(steps=1, warmup=0, recorded=1)).result
        assert result.flops.forward_flops > 0
        assert any(module.name == "transformer.h.0.attn.c_attn" and module.forward_s for module in result.modules)

    def test_one_that_reads_values_is_counted_in_a_real_step(self) -> None:
        result = run(workload=READING).result
        assert (result.flops.forward_flops, result.flops.dgrad_flops) == (300, 120)
        assert result.memory == []
        assert any("memory is not predicted" in one for one in result.assumptions)

    def test_and_cannot_be_counted_without_one(self) -> None:
        with pytest.raises(TargetError, match=r"my_model.py:net does not run on fake tensors") as caught:
            run(workload=READING, plan=COUNT)
        assert "--count" in caught.value.remedy


def _reading(model: nn.Module, batch: Batch) -> Tensor:
    error_N2 = model(batch["x"]) - batch["y"]
    mean = error_N2.square().mean()
    result: Tensor = mean / 2 if mean.item() > 1 else mean
    return result


READING = Workload(Perceptron, masked_regression().batch, _reading)


def test_a_gpu_of_this_machine_that_is_not_known_has_no_roofline() -> None:
    asked = replace(question(), machine=replace(machine_named("auto", "a100-80gb"), known=False))
    result = profile(asked, COUNT).result
    assert (result.roofline, result.predicted, result.peak_flops_per_s) == (None, None, None)
    assert all(op.bound is None for op in result.ops)


def test_random_numbers_of_the_caller_are_not_what_matters() -> None:
    """Seeded by the run, so that two profiles do the same work."""
    torch.manual_seed(1)
    first = flops(run(plan=COUNT).result)
    torch.manual_seed(2)
    assert flops(run(plan=COUNT).result) == first


@pytest.mark.parametrize("clip_norm", [0, 1])
def test_a_counted_clip_is_told_where_there_is_one(clip_norm: float) -> None:
    found = profile(question({"training.clip_norm": clip_norm}), COUNT).result
    assert any("the clip is counted with" in sentence for sentence in found.assumptions) == bool(clip_norm)
