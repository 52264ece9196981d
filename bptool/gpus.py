"""Known GPUs by the names that people type: what each holds, what generation it is, how fast its data sheet says it is.

Capacity is told twice: what is sold, and what CUDA reports (`total_memory` of `torch.cuda.get_device_properties`, also
the "total capacity" of PyTorch's out-of-memory message), which is smaller: the driver, and ECC on GDDR memory, keep a
part. Reports differ by 0.1-0.2 GiB between drivers; the figures here are from public out-of-memory messages of recent
ones, the lower end of what is common.

Memory bandwidth is NVIDIA's own figure: from the data sheets of the data centre products, from the architecture white
papers (Ampere GA102, Ada, Blackwell) of the GeForce ones, and AWS's description of G5 instances for the A10G. Where a
product is sold as a module and as a PCIe card, it is the module's, which is the faster (A100 80 GB: 2.039, its card
1.935 TB/s).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from bptool.errors import UsageError, nearest
from bptool.units import GIB, MIB


@dataclass(frozen=True)
class Range:
    """Bytes that are only roughly known: rarely less than `low`, usually `expected`, rarely more than `high`."""

    low: int
    expected: int
    high: int
    source: str


@dataclass(frozen=True)
class Gpu:
    """One product.

    Attributes:
        name: what a user types.
        words: whole words of `torch.cuda.get_device_name()`; "H100 PCIe" is another product than "H100".
        sold_bytes: capacity as sold; the makers' GB are GiB here.
        total_bytes: what CUDA reports, as far as public reports tell.
        capability: compute capability.
        multiprocessors: number of streaming multiprocessors.
        context: memory of a process outside of PyTorch's allocator.
        flops_per_s: dense matrix rates: `bf16` (fp16 alike) and `tf32` on the tensor cores, `fp32` outside them, as the
            data sheet states them without sparsity.
        bytes_per_s: memory bandwidth, as the data sheet states it.
    """

    name: str
    words: str
    sold_bytes: int
    total_bytes: int
    capability: tuple[int, int]
    multiprocessors: int
    context: Range
    flops_per_s: Mapping[str, float]
    bytes_per_s: float


def _context(expected_mib: int) -> Range:
    """The context, the kernels that are loaded (lazily, since CUDA 11.7) and the libraries' own buffers.

    PyTorch's maintainers name 300 to 400 MB for a first operation (issues 107667 and 109888) and over 1 GB where all
    kernels are loaded at once, as Hugging Face's guide to training memory saw on a V100 (1.3 GiB). It grows with the
    number of multiprocessors; the figures of single GPUs are estimates, but for the T4's: 135 and 143 MiB with PyTorch
    2.11, after first uses of cuBLAS and cuDNN (torch-preflight, August 2026).
    """
    source = "estimated from public reports of PyTorch processes: CUDA's context, loaded kernels, cuBLAS and cuDNN"
    return Range(expected_mib * MIB // 2, expected_mib * MIB, expected_mib * MIB * 5 // 2, source)


class _Row(NamedTuple):
    """A line of the table, as it is written; rates are in TFLOP/s and TB/s (10^12)."""

    name: str
    words: str
    sold_gib: int
    total_gib: float
    capability: tuple[int, int]
    multiprocessors: int
    context_mib: int
    bf16: float
    tf32: float
    fp32: float
    bandwidth: float


_TABLE = (
    _Row("b200", "B200", 180, 178.35, (10, 0), 148, 700, 2250, 1125, 75, 8),
    _Row("gh200", "GH200", 96, 94.5, (9, 0), 132, 550, 989.4, 494.7, 66.9, 4),
    _Row("h200-nvl", "H200 NVL", 141, 139.7, (9, 0), 132, 550, 835.5, 417.5, 60, 4.8),
    _Row("h200", "H200", 141, 139.7, (9, 0), 132, 550, 989.4, 494.7, 66.9, 4.8),
    _Row("h100", "H100", 80, 79.1, (9, 0), 132, 550, 989.4, 494.7, 66.9, 3.35),
    _Row("h100-pcie", "H100 PCIe", 80, 79.1, (9, 0), 114, 550, 756, 378, 51.2, 2),
    _Row("h100-nvl", "H100 NVL", 94, 93.0, (9, 0), 132, 550, 835, 417.5, 60, 3.9),
    _Row("a100-40gb", "A100", 40, 39.38, (8, 0), 108, 480, 312, 156, 19.5, 1.555),
    _Row("a100-80gb", "A100", 80, 79.14, (8, 0), 108, 480, 312, 156, 19.5, 2.039),
    _Row("a800-80gb", "A800", 80, 79.14, (8, 0), 108, 480, 312, 156, 19.5, 2.039),
    _Row("l40s", "L40S", 48, 44.3, (8, 9), 142, 450, 362.05, 183, 91.6, 0.864),
    _Row("l4", "L4", 24, 21.95, (8, 9), 58, 300, 121, 60, 30.3, 0.3),
    _Row("a10g", "A10G", 24, 21.98, (8, 6), 80, 350, 70, 35, 35, 0.6),
    _Row("rtx5090", "RTX 5090", 32, 31.35, (12, 0), 170, 550, 209.5, 104.8, 104.8, 1.792),
    _Row("rtx4090", "RTX 4090", 24, 23.52, (8, 9), 128, 450, 165.2, 82.6, 82.6, 1.008),
    _Row("rtx3090", "RTX 3090", 24, 23.56, (8, 6), 82, 400, 71, 35.6, 35.6, 0.936),
    # What follows has no bf16 or tf32 units: fp16's rate, and fp32's.
    _Row("t4", "T4", 16, 14.56, (7, 5), 40, 140, 65, 8.1, 8.1, 0.32),
    _Row("v100-16gb", "V100", 16, 15.77, (7, 0), 80, 400, 125, 15.7, 15.7, 0.9),
    _Row("v100-32gb", "V100", 32, 31.73, (7, 0), 80, 400, 125, 15.7, 15.7, 0.9),
)


def _gpu(row: _Row) -> Gpu:
    rates = {"bf16": row.bf16 * 1e12, "tf32": row.tf32 * 1e12, "fp32": row.fp32 * 1e12}
    return Gpu(
        name=row.name,
        words=row.words,
        sold_bytes=row.sold_gib * GIB,
        total_bytes=int(row.total_gib * GIB),
        capability=row.capability,
        multiprocessors=row.multiprocessors,
        context=_context(row.context_mib),
        flops_per_s=MappingProxyType(rates),
        bytes_per_s=row.bandwidth * 1e12,
    )


_VARIANTS = {"NVL", "Laptop", "Max-Q", "Ti", "D", "SUPER", "MIG"}
GPUS: Mapping[str, Gpu] = MappingProxyType({row.name: _gpu(row) for row in _TABLE})


def gpu_reporting(device_name: str) -> Gpu | None:
    """The GPU whose `torch.cuda.get_device_name()` this is; None where it is unknown.

    Where products differ in memory alone it is the smallest. The longest match wins; a word that makes it another
    product (or a slice of one) must be in the match.
    """
    other_product = _VARIANTS & set(device_name.split())
    matches = [
        gpu
        for gpu in GPUS.values()
        if re.search(rf"\b{gpu.words}\b", device_name) and other_product <= set(gpu.words.split())
    ]
    return max(matches, key=lambda gpu: len(gpu.words), default=None)


def gpu_named(name: str) -> Gpu:
    """The GPU that `name` means; case, blanks and underscores do not matter.

    Raises:
        UsageError: there is none in the table, or the name is of several that hold different amounts.
    """
    written = name.strip().lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-")
    gpu = GPUS.get(written) or GPUS.get(written.replace("-", ""))
    if gpu is not None:
        return gpu
    versions = [known for known in GPUS if known.startswith(f"{written}-")]
    hint = f": {' or '.join(versions)}?" if versions else nearest(written, GPUS)
    raise UsageError(f"--gpu '{name}' is not a GPU that bptool knows{hint}", f"choose one of {', '.join(GPUS)}")
