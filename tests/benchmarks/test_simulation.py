"""Seconds that it takes to simulate a step's memory, of the ledger and of PyTorch's own tracker."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

import pytest
import torch
from small_runs import CPU, run_steps
from torch.distributed._tools.mem_tracker import MemTracker

from bptool.analysis.machine import FakeTensors
from bptool.config.loading import load_config
from bptool.config.schema import Config
from bptool.config.target import resolve_target
from bptool.instruments.memory.cpu_scratch import CpuScratch
from bptool.instruments.memory.ledger import MemoryLedger
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.step import TrainStep
from bptool.training.workload import transformer_workload

pytestmark = pytest.mark.benchmark
Watch = Callable[[TrainStep, ExitStack], object]


def _nothing(step: TrainStep, stack: ExitStack) -> None:
    """Fake tensors alone, which both others pay for as well."""


def _ledger(step: TrainStep, stack: ExitStack) -> None:
    ledger = MemoryLedger()
    _enter_ledger(ledger, step, stack)


def _ledger_with_scratch(step: TrainStep, stack: ExitStack) -> None:
    _enter_ledger(MemoryLedger(scratch=CpuScratch()), step, stack)


def _enter_ledger(ledger: MemoryLedger, step: TrainStep, stack: ExitStack) -> None:
    step.announcer.instruments.append(ledger)
    contexts: tuple[AbstractContextManager[object], ...] = (ledger, ledger.watching(step.model, step.optimizers))
    for context in contexts:
        stack.enter_context(context)


def _tracker(step: TrainStep, stack: ExitStack) -> None:
    tracker = MemTracker()
    tracker.track_external(step.model, *step.optimizers.state().values())
    stack.enter_context(tracker)


def _step_s(config: Config, watch: Watch, repeats: int = 5) -> float:
    """Median processor time of a step that has been run before."""
    seconds = []
    for _ in range(repeats):
        with FakeTensors():
            workload = replace(transformer_workload(config), weight=lambda batch: 1)
            step = build_step(config, workload, CPU, Announcer())
            run_steps(step, 1)
            with ExitStack() as stack:
                watch(step, stack)
                start = time.process_time()
                run_steps(step, 1)
                seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def test_simulation() -> None:
    """Aim: the ledger's own share at most a quarter of the tracker's. Fake tensors' share is PyTorch's."""
    torch.set_num_threads(1)
    watches = {
        "fake tensors alone": _nothing,
        "memory ledger": _ledger,
        "memory ledger, scratch": _ledger_with_scratch,
        "PyTorch's MemTracker": _tracker,
    }
    for preset, n_layers in (("gpt2", 12), ("llama3-405b", 4)):
        config = load_config(resolve_target(preset), [f"model.n_layers={n_layers}", "training.device=cpu"])
        print(f"\none step of {preset} with {n_layers} layers")
        alone = 0.0
        for name, watch in watches.items():
            step_s = _step_s(config, watch)
            alone = alone or step_s
            print(f"  {name:<26}{step_s:>8.3f} s{step_s - alone:>10.3f} s of its own")
