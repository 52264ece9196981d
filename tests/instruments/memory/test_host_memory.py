"""What is offloaded is not on the device: the records of a simulated GPU's steps."""

from __future__ import annotations

from typing import Any

import pytest
from small_runs import small_config

from bptool.analysis.closed_forms.moments import end_of_forward
from bptool.analysis.machine import Machine
from bptool.analysis.memory.simulation import simulate, simulate_deep
from bptool.analysis.memory.sweeps import block_of
from bptool.gpus import gpu_named
from bptool.instruments.memory.trace import Allocation, MemoryTrace
from bptool.training.workload import transformer_workload

SHAPE = {"model.n_layers": 8, "model.d_model": 64, "model.context_length": 64, "training.micro_batch_size": 4}
A100 = Machine(gpu_named("a100-40gb"))


def record(changes: dict[str, Any]) -> MemoryTrace:
    config = small_config({**SHAPE, **changes})
    return simulate(config, transformer_workload(config), A100)


def kept(trace: MemoryTrace) -> list[Allocation]:
    """What the blocks have made and still hold when the forward ends."""
    moment = end_of_forward(trace)
    return [a for a in trace.live_at(moment.event) if a.born >= moment.since and block_of(a.module) is not None]


@pytest.mark.parametrize("changes", [{}, {"model.dropout": 0.1}, {"precision.mode": "bf16-mixed"}])
def test_blocks_keep_nothing_large_but_the_last_ones_output(changes: dict[str, Any]) -> None:
    """Which the last norm keeps."""
    assert len([a for a in kept(record(changes)) if a.n_bytes >= 4096]) > 8 * 8
    left = [a for a in kept(record({**changes, "activation_checkpoint.policy": "offload"})) if a.n_bytes >= 4096]
    assert [(a.module, a.n_bytes) for a in left] == [("blocks.7", 4 * 64 * 64 * 4)]


def test_the_peak_is_below_that_of_recomputation_which_keeps_each_blocks_input() -> None:
    def peak(policy: str) -> int:
        trace = record({"activation_checkpoint.policy": policy, "optimizer.name": "sgd"})
        return int(trace.live_bytes.max())

    assert peak("offload") < peak("full") < peak("none")


def test_a_deep_model_follows_from_shallow_ones() -> None:
    config = small_config({**SHAPE, "activation_checkpoint.policy": "offload"})
    found = simulate_deep(config, transformer_workload(config), A100)
    assert found.depths
    assert (found.trace.live_bytes == record({"activation_checkpoint.policy": "offload"}).live_bytes).all()
