from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from small_runs import CPU, run_steps, small_config

from bptool.analysis.machine import Machine, machine_named
from bptool.analysis.memory.caching_allocator import replay
from bptool.analysis.memory.simulation import STEADY, simulate
from bptool.analysis.memory.whole_first_step import with_whole_first_step
from bptool.config.loading import load_config
from bptool.config.schema import Config
from bptool.config.target import resolve_target
from bptool.instruments.memory.trace import MemoryTrace
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.workload import transformer_workload

H100 = machine_named("cuda", "h100")
LARGE = {"model.d_model": 256, "model.d_ff": 1024, "model.vocab_size": 4096, "model.n_layers": 3}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"training.loss": "plain", "precision.mode": "bf16-mixed", "training.micro_batch_size": 8},
    {"optimizer.implementation": "foreach", "training.gradient_accumulation_steps": 1},
    {"optimizer.implementation": "loop", "activation_checkpoint.policy": "full"},
    {"optimizer.name": "adafactor", "optimizer.implementation": "auto"},
    {"optimizer.name": "muon", "optimizer.implementation": "auto", "precision.mode": "bf16"},
    {"optimizer.name": "sgd", "optimizer.implementation": "auto", "training.clip_norm": 0.0},
    {"model.attention": "eager", "model.dropout": 0.1, "precision.mode": "fp16-mixed"},
]


def simulated_in_full(config: Config, machine: Machine) -> MemoryTrace:
    """Two steps, each run from its beginning to its end."""
    with machine.simulated() as ledger:
        step = build_step(config, transformer_workload(config), CPU, Announcer([ledger]))
        with ledger.watching(step.model, step.optimizers):
            run_steps(step, 2, config.training.gradient_accumulation_steps)
        return ledger.trace()


def config_of(changes: Mapping[str, Any]) -> Config:
    return small_config({**LARGE, "training.gradient_accumulation_steps": 2, **changes})


@pytest.mark.parametrize("changes", SETTINGS)
def test_the_allocator_reserves_what_two_whole_steps_make_it_reserve(changes: dict[str, Any]) -> None:
    config = config_of(changes)
    ours = replay(with_whole_first_step(simulate(config, transformer_workload(config), H100)))
    whole = replay(simulated_in_full(config, H100))
    assert ours.peak_reserved_bytes == whole.peak_reserved_bytes
    assert ours.peak_allocated_bytes == whole.peak_allocated_bytes


def test_it_matters() -> None:
    """Else the copies would be for nothing: GPT-2's optimizer state falls into what its logits have left free."""
    words = ["model.n_layers=3", "training.loss=plain", "training.micro_batch_size=8", "precision.mode=bf16-mixed"]
    config = load_config(resolve_target("gpt2"), words)
    trace = simulate(config, transformer_workload(config), H100)
    assert replay(trace).peak_reserved_bytes > 1.05 * replay(with_whole_first_step(trace)).peak_reserved_bytes


@pytest.mark.parametrize("changes", SETTINGS[:4])
def test_the_second_step_is_as_it_was(changes: dict[str, Any]) -> None:
    config = config_of(changes)
    trace = simulate(config, transformer_workload(config), H100)
    both, n_own = with_whole_first_step(trace), len(trace.allocations)
    own = [event for event in both.events if event.allocation is None or event.allocation < n_own]
    second = [trace.events[number] for number in trace.events_of(STEADY).tolist()]
    assert own[-len(second) :] == second
    assert both.live_bytes[-1] == trace.live_bytes[-1]
