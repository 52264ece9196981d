"""The recorder over whole steps of the trainer, and its clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded_operations import X, flops, linear, recorded, split, trainer_record
from small_runs import run_steps, small_config, transformer_step
from torch import nn

from bptool.instruments.operations.recorder import OperationRecorder
from bptool.instruments.operations.trace import OperationTrace


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
