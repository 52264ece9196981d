"""A trainer's step on fake tensors that stand in for CUDA's, and Hugging Face's GPT-2 to run in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from small_runs import CPU, small_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bptool.gpus import gpu_named
from bptool.instruments.cuda.memory import cuda_scratch
from bptool.instruments.cuda.stand_in import standing_in_for_cuda
from bptool.instruments.memory.ledger import MemoryLedger
from bptool.instruments.memory.trace import MemoryTrace
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.workload import Workload

LOOPED_ADAMW = {"optimizer.name": "adamw", "optimizer.implementation": "loop", "training.clip_norm": 0.0}
"""As in a plain script: AdamW over one tensor after the other, and no clipping."""


def simulate_on(
    gpu_name: str, workload: Workload, changes: Mapping[str, object] | None = None, *, steps: int = 2
) -> MemoryTrace:
    """The record of `steps` steps as CUDA's allocator would round it."""
    gpu, config = gpu_named(gpu_name), small_config({**LOOPED_ADAMW, **(changes or {})})
    ledger = MemoryLedger(counts_host=False, scratch=cuda_scratch(gpu))
    with FakeTensorMode(), standing_in_for_cuda(gpu), ledger:
        step = build_step(config, workload, CPU, Announcer([ledger]))
        with ledger.watching(step.model, step.optimizers):
            for number in range(steps):
                with step.announcer.phase("step"):
                    with step.announcer.phase("data"):
                        batch = step.workload.batch(torch.Generator())
                    step(number, [batch])
                del batch
        return ledger.trace().rounded(512)


def peak_bytes(trace: MemoryTrace, step: int = 1) -> int:
    """Most bytes held in a step."""
    return int(trace.live_bytes[trace.peak_event(step)])


@dataclass(frozen=True)
class Operations:
    """Names of the operations that ran, in order."""

    names: list[str]

    def count(self, name: str) -> int:
        return self.names.count(name)


@contextmanager
def operations_on(gpu_name: str) -> Iterator[Operations]:
    """What runs while it is entered, on fake tensors that stand in for that GPU's."""
    seen = Operations([])

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self,
            func: torch._ops.OpOverload,
            types: Iterable[type],
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            if func.namespace == "aten":
                seen.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), standing_in_for_cuda(gpu_named(gpu_name)), Watch():  # type: ignore[no-untyped-call]
        yield seen
