from __future__ import annotations

import re

import pytest

from bptool.errors import UsageError
from bptool.gpus import GPUS, gpu_named, gpu_reporting
from bptool.units import GIB, MIB


@pytest.mark.parametrize("typed", ["h100-pcie", "H100 PCIe", "h100_pcie", "NVIDIA H100 PCIe", " h100-pcie "])
def test_a_name_is_found_as_people_write_it(typed: str) -> None:
    assert gpu_named(typed).name == "h100-pcie"


def test_a_dash_in_a_geforce_does_not_matter() -> None:
    assert gpu_named("RTX 4090") is gpu_named("rtx-4090") is gpu_named("rtx4090")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("h1000", "'h1000' is not a GPU that bptool knows, did you mean 'h100'?"),
        ("a100", "'a100' is not a GPU that bptool knows: a100-40gb or a100-80gb?"),
        ("v100", "'v100' is not a GPU that bptool knows: v100-16gb or v100-32gb?"),
        ("abacus", "'abacus' is not a GPU that bptool knows"),
        ("", "'' is not a GPU that bptool knows"),
    ],
)
def test_an_unknown_name(typed: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said) + "$") as caught:
        gpu_named(typed)
    assert "a100-40gb" in caught.value.remedy
    assert "mi300x" not in caught.value.remedy


# Total capacities in PyTorch's out-of-memory messages, from public reports of these GPUs, several drivers each.
REPORTED_GIB = {
    "h100": (79.10, 79.11, 79.18, 79.19, 79.21),
    "a100-80gb": (79.14, 79.15, 79.25, 79.32, 79.33),
    "a100-40gb": (39.38, 39.39, 39.42, 39.56),
    "rtx4090": (23.52, 23.62, 23.64, 23.65),
    "rtx3090": (23.57, 23.68, 23.69, 23.70),
    "rtx5090": (31.36, 31.37, 31.47),
    "v100-16gb": (15.77, 15.78),
    "t4": (14.56, 14.58, 14.74, 14.75, 14.76),
    "a10g": (21.98, 22.04, 22.20),
}


@pytest.mark.parametrize("name", REPORTED_GIB)
def test_capacity_is_at_the_lower_end_of_what_is_reported(name: str) -> None:
    total = gpu_named(name).total_bytes / GIB
    reported = REPORTED_GIB[name]
    assert min(reported) - 0.05 <= total <= min(reported) + 0.01
    assert max(reported) - total < 0.3


def test_a_context_that_was_measured_is_expected() -> None:
    """A T4's, in two sessions, when cuBLAS and cuDNN had been used (torch-preflight's `measured_cuda.json`)."""
    for measured in (141_426_688, 149_815_296):
        assert GPUS["t4"].context.expected == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("name", GPUS)
def test_each_is_possible(name: str) -> None:
    gpu = GPUS[name]
    assert 0.9 * gpu.sold_bytes < gpu.total_bytes < gpu.sold_bytes
    assert 64 * MIB < gpu.context.low < gpu.context.expected < gpu.context.high < 2 * GIB
    assert gpu.context.source
    assert gpu.flops_per_s["bf16"] > gpu.flops_per_s["fp32"]
    reported = gpu_reporting(f"NVIDIA {gpu.words}")
    assert reported is not None
    assert reported.words == gpu.words


# Width of the memory's bus in bits, and bits a second on each of its wires (10^9), of NVIDIA's board specifications.
BUSES = {
    "t4": (256, 10),
    "l4": (192, 12.5),
    "a10g": (384, 12.5),
    "l40s": (384, 18),
    "rtx3090": (384, 19.5),
    "rtx4090": (384, 21),
    "rtx5090": (512, 28),
    "v100-16gb": (4096, 1.757),
    "a100-40gb": (5120, 2.43),
    "a100-80gb": (5120, 3.186),
    "h100-pcie": (5120, 3.2),
    "h100": (5120, 5.234),
    "h100-nvl": (6144, 5.1),
    "h200": (6144, 6.25),
    "b200": (8192, 8),
}


@pytest.mark.parametrize("name", BUSES)
def test_bandwidth_is_what_the_bus_carries(name: str) -> None:
    width, gigabits = BUSES[name]
    assert gpu_named(name).bytes_per_s == pytest.approx(width / 8 * gigabits * 1e9, rel=0.025)


def test_like_memory_like_bandwidth() -> None:
    same = [("a800-80gb", "a100-80gb"), ("v100-32gb", "v100-16gb"), ("h200-nvl", "h200")]
    assert all(gpu_named(left).bytes_per_s == gpu_named(right).bytes_per_s for left, right in same)
