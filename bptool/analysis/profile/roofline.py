"""Which roof each operation is under: arithmetic, or memory.

The model is Williams, Waterman and Patterson's (2009, "Roofline: an insightful visual performance model"): an operation
takes as long as its FLOPs at the peak rate or its bytes at the memory's bandwidth, whichever is longer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from bptool.analysis.profile.kernel_rates import TYPICAL, AttentionShape, KernelRates, measured_kernel_rates
from bptool.analysis.profile.result import OpCost, Roofline
from bptool.analysis.profile.tally import Cost, Place
from bptool.gpus import Gpu
from bptool.hardware import measured_matmul_rate, measured_memory_bandwidth, measured_operation_overhead

_FORMAT = {"fp32": "float32", "tf32": "float32", "bf16-mixed": "bfloat16", "bf16": "bfloat16", "fp16-mixed": "float16"}
_MODE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16-mixed"}
_LAUNCH_S = 5e-6


@dataclass(frozen=True)
class Rates:
    """What a device can do.

    Attributes:
        device: its name.
        flops_per_s: of matrix products, by the dtype that they are computed in; those of `float32` serve any other.
        step_format: the dtype that the step's matrix products are in.
        bytes_per_s: memory.
        operation_s: what an operation takes of itself, however little it computes.
        runs_ahead: whether that is spent on the host while the device is still at earlier operations.
        causal_share: of the scores of a causal attention, how many its kernel computes at least.
        flops_source, bytes_source, operation_source: how they are known.
        kernels: what is slower than these rates, or faster; None where nothing is known of it.
    """

    device: str
    flops_per_s: Mapping[str, float]
    step_format: str
    bytes_per_s: float
    operation_s: float
    runs_ahead: bool
    causal_share: float
    flops_source: str
    bytes_source: str
    operation_source: str
    kernels: KernelRates | None = None

    def of_products(self, place: Place) -> float:
        """FLOP/s of matrix products in the format of these operations."""
        return self.flops_per_s.get(place.dtype, self.flops_per_s["float32"])

    def joined(self, other: Rates) -> Rates:
        """With the formats that only the other one knows, of the same machine."""
        kernels = self.kernels.joined(other.kernels) if self.kernels and other.kernels else self.kernels
        return replace(self, flops_per_s={**other.flops_per_s, **self.flops_per_s}, kernels=kernels)

    @property
    def roofline(self) -> Roofline:
        """The roofs over the step's matrix products."""
        rate = self.flops_per_s[self.step_format]
        return Roofline(
            device=self.device,
            flops_per_s=rate,
            flops_source=self.flops_source,
            bytes_per_s=self.bytes_per_s,
            bytes_source=self.bytes_source,
            ridge=rate / self.bytes_per_s,
        )


class OperationSeconds(NamedTuple):
    """Like operations by the roofline: their FLOPs at the peak rate, their bytes at the memory's."""

    compute_s: float
    memory_s: float

    @property
    def longer(self) -> float:
        """What they take."""
        return max(self)


def gpu_rates(gpu: Gpu, mode: str) -> Rates:
    """A GPU's, from its data sheet.

    Args:
        mode: `precision.mode`.
    """
    rates, float32 = gpu.flops_per_s, gpu.flops_per_s["tf32" if mode == "tf32" else "fp32"]
    return Rates(
        device=gpu.name,
        flops_per_s={"float32": float32, "bfloat16": rates["bf16"], "float16": rates["bf16"]},
        step_format=_FORMAT[mode],
        bytes_per_s=gpu.bytes_per_s,
        operation_s=_LAUNCH_S,
        runs_ahead=True,
        causal_share=0.5,
        flops_source=f"{gpu.name} data sheet, dense",
        bytes_source=f"{gpu.name} data sheet",
        operation_source=f"{_LAUNCH_S * 1e6:.0f} µs to launch each of its operations, which is assumed",
    )


def cpu_rates(
    mode: str, dtypes: Iterable[str] = (), shape: AttentionShape | None = TYPICAL, *, seconds: float = 0.6
) -> Rates:
    """This CPU's, measured now.

    Args:
        mode: `precision.mode`.
        dtypes: further ones that matrix products are computed in.
        shape: of the step's attention; None: it has none.
        seconds: for which each rate is measured.
    """
    used = {_FORMAT[mode], *dtypes} & _MODE.keys()
    formats = {"float32", *used}
    overhead = measured_operation_overhead(seconds=seconds / 3)
    name = mode.removesuffix("-mixed")
    return Rates(
        device="cpu",
        flops_per_s={dtype: measured_matmul_rate(_MODE[dtype], seconds=seconds) for dtype in sorted(formats)},
        step_format=_FORMAT[mode],
        bytes_per_s=measured_memory_bandwidth(seconds=seconds),
        operation_s=overhead,
        runs_ahead=False,
        # FlashAttentionKernel.cpp of PyTorch takes 512 keys at a time, all of them: half only for very long sequences.
        causal_share=1.0,
        flops_source=f"this machine's measured {name} matmul rate",
        bytes_source="this machine's measured bandwidth: a = b + 3 c over arrays larger than its caches",
        operation_source=f"{overhead * 1e6:.1f} µs for each operation, measured on one that computes next to nothing",
        kernels=measured_kernel_rates(used, shape, seconds=seconds),
    )


def matmul_dtypes(costs: Mapping[Place, Cost]) -> set[str]:
    """The formats of a step's matrix products."""
    return {place.dtype for place, cost in costs.items() if cost.flops}


def by_roofline(place: Place, cost: Cost, rates: Rates) -> OperationSeconds:
    """What like operations take; where an attention is causal, its kernel skips scores."""
    rate = rates.of_products(place)
    flops = cost.flops * rates.causal_share if place.causal else cost.flops
    return OperationSeconds((flops + cost.pointwise_flops) / rate, cost.bytes_moved / rates.bytes_per_s)


def predicted_s(place: Place, cost: Cost, rates: Rates) -> float:
    """Seconds of like operations: by the roofline, or by the rates of their own kind where these are known."""
    kernels = rates.kernels
    roofs = by_roofline(place, cost, rates)
    if kernels is None:
        return roofs.longer
    rate = rates.of_products(place)
    compute_s = cost.flops / (kernels.products_per_s(place) or rate)
    compute_s += cost.pointwise_flops / (kernels.pointwise_per_s(place) or rate)
    return max(compute_s, cost.bytes_moved / (kernels.bytes_per_s(place) or rates.bytes_per_s))


def under_roofs(ops: Sequence[OpCost], costs: Mapping[Place, Cost], rates: Rates) -> list[OpCost]:
    """The table of operations with their bound and predicted seconds.

    Args:
        costs: of the step that the table is of.
    """
    compute: dict[tuple[str, str], float] = defaultdict(float)
    memory: dict[tuple[str, str], float] = defaultdict(float)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for place, cost in costs.items():
        key, found = (place.op, place.kind), by_roofline(place, cost, rates)
        compute[key] += found.compute_s
        memory[key] += found.memory_s
        seconds[key] += predicted_s(place, cost, rates)
    return [_under_roof(op, compute[key], memory[key], seconds[key]) for op in ops for key in [(op.op, op.kind)]]


def _under_roof(op: OpCost, compute_s: float, memory_s: float, expected_s: float) -> OpCost:
    bound = None if expected_s == 0 else "compute" if compute_s >= memory_s else "memory"
    return op.model_copy(update={"bound": bound, "predicted_s": expected_s})
