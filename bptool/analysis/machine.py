"""What a step is simulated for: this CPU, or a GPU that need not be there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode  # documented for shape propagation; no public path yet

from bptool.gpus import GPUS, Gpu, gpu_named, gpu_reporting
from bptool.hardware import available_memory_bytes
from bptool.instruments.cpu_scratch import CpuScratch
from bptool.instruments.cuda_memory import cublas_workspace_bytes, cuda_scratch
from bptool.instruments.cuda_stand_in import standing_in_for_cuda
from bptool.instruments.memory_ledger import MemoryLedger

_CPU = torch.device("cpu")
_TYPICAL = "a100-80gb"  # its kernels are every later GPU's but for Hopper's cuDNN attention


class FakeTensors(FakeTensorMode):
    """PyTorch's mode, as a training step needs it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeTensors:
        """Tensors that are copied deeply, as `nn.TransformerEncoder` does, stay in their mode."""
        return self

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; PyTorch's wrapper against that costs a fifth of the time."""
        return False


@dataclass(frozen=True)
class Machine:
    """A device with a memory.

    Attributes:
        gpu: the GPU; None for a CPU.
        capacity_bytes: what there is in all; None where that is not known.
        assumptions: what is taken for granted about it, in sentences.
        known: whether the GPU is the one that is here, or was named; else it stands in for it.
        cpu_scratch: what this CPU's kernels take for themselves.
        fake: whether the step's tensors are without values; a model that reads them can only be run in earnest.
    """

    gpu: Gpu | None = None
    capacity_bytes: int | None = None
    assumptions: tuple[str, ...] = ()
    fake: bool = True
    known: bool = True
    cpu_scratch: CpuScratch = field(default_factory=CpuScratch, compare=False)

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return "cuda" if self.gpu else "cpu"

    @contextmanager
    def pretended(self) -> Iterator[None]:
        """Fake tensors that behave as this device's."""
        with (
            FakeTensors() if self.fake else nullcontext(),
            standing_in_for_cuda(self.gpu) if self.gpu else nullcontext(),
        ):
            yield

    @contextmanager
    def simulated(self) -> Iterator[MemoryLedger]:
        """The same, and the ledger that counts them."""
        with self.pretended():
            if self.gpu is None:
                with MemoryLedger(scratch=self.cpu_scratch if self.fake else None) as ledger:
                    yield ledger
                return
            with MemoryLedger(counts_host=False, scratch=cuda_scratch(self.gpu)) as ledger:
                ledger.hold(cublas_workspace_bytes(self.gpu), "cuBLAS workspace")
                yield ledger


THIS_CPU = Machine()
"""Whatever memory it has."""


def machine_named(device: str, gpu: str | None) -> Machine:
    """The machine that `--device` and `--gpu` mean.

    Args:
        device: `auto`, `cpu` or `cuda`; `auto` is a GPU where one is named or there.

    Raises:
        UsageError: the GPU is not known.
    """
    there = torch.cuda.is_available()
    if gpu is not None:
        known = gpu_named(gpu)
        return Machine(known, known.total_bytes, (_kernels_of(known),))
    if device == "cpu" or (device == "auto" and not there):
        return Machine(None, available_memory_bytes(_CPU))
    if there:
        name = torch.cuda.get_device_name()
        found = gpu_reporting(name) or GPUS[_TYPICAL]
        total = int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
        about = f"{_kernels_of(found)}, for the {name} of this machine"
        return Machine(found, total, (about,), known=gpu_reporting(name) is not None)
    typical = GPUS[_TYPICAL]
    unnamed = f"no GPU was named: kernels as on {typical.name}, and no capacity; name one with --gpu"
    return Machine(typical, None, (unnamed,))


def _kernels_of(gpu: Gpu) -> str:
    return f"attention and workspaces as PyTorch {torch.__version__.split('+')[0]} chooses them on {gpu.name}"
