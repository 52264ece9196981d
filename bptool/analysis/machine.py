"""What a step is simulated for: this CPU, or a GPU that need not be there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
)  # documented for shape propagation; no public path yet

from bptool.gpus import GPUS, Gpu, gpu_named, gpu_reporting
from bptool.hardware import available_memory_bytes
from bptool.instruments.cuda.memory import cublas_workspace_bytes, cuda_scratch
from bptool.instruments.cuda.stand_in import cuda_kernels, float32_statistics, standing_in_for_cuda
from bptool.instruments.memory.cpu_scratch import CpuScratch
from bptool.instruments.memory.ledger import MemoryLedger
from bptool.model.alike import abridging
from bptool.training.postponed_compiler import postpone_compiler

_CPU = torch.device("cpu")
_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format))
_FILL_WITH_RANDOM = torch.ops.aten.normal_.default
_TYPICAL = "a100-80gb"  # its kernels are every later GPU's but for Hopper's cuDNN attention


class FakeTensors(FakeTensorMode):
    """PyTorch's mode, as a training step needs it.

    Args:
        adapt: makes of an operation's result what another device's kernel would give.
    """

    def __init__(self, adapt: Callable[[Any, Any], Any] | None = None) -> None:
        super().__init__()
        self._adapt = adapt

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeTensors:
        """Tensors that are copied deeply, as `nn.TransformerEncoder` does, stay in their mode."""
        return self

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        """What the inherited one does, without its wrapper against compiling, which costs much and has no use here.

        Nor is a tensor without values filled with random ones, which PyTorch takes apart into many operations.
        """
        if func is _FILL_WITH_RANDOM and isinstance(args[0], FakeTensor):
            return args[0]
        result = self.dispatch(func, types, args, kwargs or {})
        return result if self._adapt is None else self._adapt(func, result)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Don't wrap it again."""
        return False

    def _prep_args_for_hash(self, result: list[object], args: Any, state: Any, id_hashed_objects: list[object]) -> None:
        """By what an operation's result is looked up.

        The inherited one takes half of a simulation's time, as it asks each tensor for all that any tensor can be.
        """
        result += (type(args), len(args))
        for arg in (*args, *args.values()) if isinstance(args, dict) else args:
            if type(arg) in _PLAIN:
                result += (type(arg), arg)
            elif isinstance(arg, list | tuple | dict):
                self._prep_args_for_hash(result, arg, state, id_hashed_objects)
            elif isinstance(arg, FakeTensor) and self._is_plain(arg):
                n_bytes = arg.untyped_storage().nbytes()
                result += (arg.dtype, arg.shape, arg.stride(), arg.storage_offset(), n_bytes)
                result += (arg.fake_device, arg.requires_grad, arg.is_inference())
            else:
                super()._prep_args_for_hash(result, [arg], state, id_hashed_objects)

    def _is_plain(self, tensor: FakeTensor) -> bool:
        """Whether there is no more to say about it."""
        of_ours = tensor.fake_mode is self and tensor.constant is None and tensor.layout is torch.strided
        return of_ours and not (tensor.dtype.is_complex or tensor.is_quantized)


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
        postpone_compiler()
        if self.fake:
            with FakeTensors(float32_statistics if self.gpu else None), _or_none(cuda_kernels, self.gpu):
                yield
        else:
            with _or_none(standing_in_for_cuda, self.gpu):
                yield

    @contextmanager
    def simulated(self) -> Iterator[MemoryLedger]:
        """The same, and the ledger that counts them."""
        with self.pretended():
            if self.gpu is None:
                with MemoryLedger(scratch=self.cpu_scratch if self.fake else None) as ledger, self._abridging(ledger):
                    yield ledger
                return
            with (
                MemoryLedger(counts_host=False, scratch=cuda_scratch(self.gpu)) as ledger,
                self._abridging(ledger),
            ):
                ledger.hold(cublas_workspace_bytes(self.gpu), "cuBLAS workspace")
                yield ledger

    def _abridging(self, ledger: MemoryLedger) -> AbstractContextManager[None]:
        """Run no more than the record needs, where there are no values."""
        return abridging(ledger.abridged) if self.fake else nullcontext()


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


def _or_none(
    standing_in: Callable[[Gpu], AbstractContextManager[None]], gpu: Gpu | None
) -> AbstractContextManager[None]:
    return nullcontext() if gpu is None else standing_in(gpu)


def _kernels_of(gpu: Gpu) -> str:
    return f"attention and workspaces as PyTorch {torch.__version__.split('+')[0]} chooses them on {gpu.name}"
