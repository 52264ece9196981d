from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bptool import hardware
from bptool.errors import DeviceError
from bptool.hardware import (
    acts_as_cuda,
    available_memory_bytes,
    measured_matmul_rate,
    measured_memory_bandwidth,
    measured_operation_overhead,
    peak_rate,
    resolve_device,
    standing_in_for_cuda_tensors,
    tune_cpu_allocator,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class TestDevice:
    @pytest.fixture
    def gpus(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        def have(count: int) -> None:
            monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)

        return have

    def test_auto(self, gpus: Any) -> None:
        gpus(0)
        assert resolve_device("auto") == CPU
        gpus(2)
        assert resolve_device("auto") == CUDA

    def test_by_name(self, gpus: Any) -> None:
        gpus(2)
        assert resolve_device("cpu") == CPU
        assert resolve_device("cuda") == CUDA
        assert resolve_device("cuda:1") == torch.device("cuda:1")

    @pytest.mark.parametrize(
        ("count", "name", "message"),
        [
            (0, "cuda", "training.device = 'cuda', but this machine has no CUDA device"),
            (0, "cuda:0", "training.device = 'cuda:0', but this machine has no CUDA device"),
            (2, "cuda:2", "training.device = 'cuda:2', but this machine has 2 CUDA device(s)"),
            (2, "gpu", "training.device = 'gpu' is no device's name"),
            (2, "", "training.device = '' is no device's name"),
            (2, "cuda:x", "training.device = 'cuda:x' is no device's name"),
            (2, "meta", "training.device = 'meta' is not supported"),
        ],
    )
    def test_what_is_not_there(self, gpus: Any, count: int, name: str, message: str) -> None:
        gpus(count)
        with pytest.raises(DeviceError) as caught:
            resolve_device(name)
        assert caught.value.message == message
        assert "cpu" in caught.value.remedy


def test_a_cpu_tensor_can_stand_in_for_cudas() -> None:
    x = torch.ones(1)
    assert not acts_as_cuda(x)
    with standing_in_for_cuda_tensors():
        assert acts_as_cuda(x)
        with standing_in_for_cuda_tensors():
            pass
        assert acts_as_cuda(x)
    assert not acts_as_cuda(x)


class TestPeakRate:
    @pytest.mark.parametrize(
        ("name", "bf16_tflops"),
        [
            ("NVIDIA H100 80GB HBM3", 989.4),
            ("NVIDIA H100 PCIe", 756),  # another product than the H100 of the SXM board
            ("NVIDIA H100 NVL", 835),
            ("NVIDIA H200", 989.4),
            ("NVIDIA H200 NVL", 835.5),
            ("NVIDIA GH200 480GB", 989.4),
            ("NVIDIA B200", 2250),
            ("NVIDIA A100-SXM4-80GB", 312),
            ("NVIDIA A100 80GB PCIe", 312),
            ("NVIDIA L4", 121),
            ("NVIDIA L40S", 362.05),
            ("NVIDIA GeForce RTX 4090", 165.2),
            ("Tesla V100-SXM2-16GB", 125),
        ],
    )
    def test_known_devices(self, monkeypatch: pytest.MonkeyPatch, name: str, bf16_tflops: float) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        rate = peak_rate(CUDA, "bf16-mixed")
        assert rate.flops_per_s == pytest.approx(bf16_tflops * 1e12)
        assert rate.source == f"{name} data sheet, dense"

    @pytest.mark.parametrize(
        "name",
        [
            "NVIDIA L40",  # not an L4
            "NVIDIA RTX A1000",  # not an A100
            "NVIDIA GB200",  # not a B200
            "NVIDIA GeForce RTX 3090 Ti",
            "NVIDIA GeForce RTX 4090 D",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            "NVIDIA A100-SXM4-80GB MIG 1g.10gb",  # a slice of one
            "NVIDIA H20",
            "AMD Instinct MI300X",
        ],
    )
    def test_an_unknown_device_is_not_taken_for_another(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        rate = peak_rate(CUDA, "bf16")
        assert rate.flops_per_s is None
        assert name in rate.source

    @pytest.mark.parametrize(
        ("mode", "tflops"), [("fp32", 19.5), ("tf32", 156), ("bf16", 312), ("bf16-mixed", 312), ("fp16-mixed", 312)]
    )
    def test_the_rate_is_that_of_the_precision(self, monkeypatch: pytest.MonkeyPatch, mode: str, tflops: float) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-PCIE-40GB")
        assert peak_rate(CUDA, mode).flops_per_s == tflops * 1e12

    def test_a_cpus_is_measured_in_the_precision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []

        def measure(mode: str) -> float:
            asked.append(mode)
            return 5e10

        monkeypatch.setattr(hardware, "measured_matmul_rate", measure)
        rate = peak_rate(CPU, "bf16-mixed")
        assert (rate.flops_per_s, rate.source) == (5e10, "this machine's measured bf16 matmul rate")
        assert asked == ["bf16-mixed"]


class TestMeasuredRate:
    def test_the_best_of_several_by_an_injected_clock(self) -> None:
        """Products of 2 x 32^3 FLOP that take 4, 2 and 3 seconds: the machine can do one in 2."""
        readings = iter([0, 0.1, 1, 5, 5.1, 6, 8, 8.1, 10, 13, 100])
        rate = measured_matmul_rate("fp32", sizes=(32,), seconds=50, clock=lambda: next(readings))
        assert rate == pytest.approx(2 * 32**3 / 2)

    def test_the_best_of_several_sizes(self) -> None:
        """Of a product of 32 that takes 1 s, and one of 64 that takes 4: eight times the FLOPs."""
        readings = iter([0, 1, 2, 3, 30, 100, 101, 102, 106, 130])
        rate = measured_matmul_rate("fp32", sizes=(32, 64), seconds=20, clock=lambda: next(readings))
        assert rate == 2 * 64**3 / 4

    @pytest.mark.parametrize(
        ("mode", "dtype"),
        [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16), ("fp16-mixed", torch.float16)],
    )
    def test_in_the_format_that_the_precision_multiplies_in(
        self, monkeypatch: pytest.MonkeyPatch, mode: str, dtype: torch.dtype
    ) -> None:
        seen: set[torch.dtype] = set()
        matmul = torch.matmul

        def watched(left: torch.Tensor, right: torch.Tensor, **rest: Any) -> torch.Tensor:
            seen.add(left.dtype)
            return matmul(left, right, **rest)

        monkeypatch.setattr(torch, "matmul", watched)
        assert measured_matmul_rate(mode, sizes=(64,), seconds=0.001) > 0
        assert seen == {dtype}


def clock_of(*readings: float) -> Callable[[], float]:
    remaining = iter(readings)
    return lambda: next(remaining)


class TestMeasuredBandwidth:
    def test_two_arrays_are_read_and_one_written(self) -> None:
        """Additions over arrays of 4 KiB that take 4, 2 and 3 seconds, in the middle 3."""
        clock = clock_of(0, 0.1, 1, 5, 5.1, 6, 8, 8.1, 10, 13, 100)
        assert measured_memory_bandwidth(n_bytes=4096, seconds=50, clock=clock) == 3 * 4096 / 3

    def test_part_by_part(self) -> None:
        """Of arrays of 4 KiB, a quarter at a time."""
        clock = clock_of(0, 0.1, 1, 5, 5.1, 6, 8, 8.1, 10, 13, 100)
        assert measured_memory_bandwidth(n_bytes=4096, part_bytes=1024, seconds=50, clock=clock) == 3 * 1024 / 3

    def test_it_is_a_sum_of_arrays_that_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int] = []
        add = torch.add

        def watched(left: torch.Tensor, right: torch.Tensor, **rest: Any) -> torch.Tensor:
            seen.extend(x.nbytes for x in (left, right, rest["out"]))
            return add(left, right, **rest)

        monkeypatch.setattr(torch, "add", watched)
        assert measured_memory_bandwidth(n_bytes=2**20, seconds=0) > 0
        assert set(seen) == {2**20}

    def test_it_runs_once_where_time_is_over_at_once(self) -> None:
        assert measured_memory_bandwidth(n_bytes=4096, seconds=0, clock=clock_of(0, 9, 10, 14, 99)) == 3 * 4096 / 4


def test_the_overhead_is_that_of_one_operation() -> None:
    """Batches of 100 that take 4, 2 and 3 seconds, in the middle 3."""
    clock = clock_of(0, 0.1, 1, 5, 5.1, 6, 8, 8.1, 10, 13, 100)
    assert measured_operation_overhead(seconds=50, clock=clock) == 3 / 100
    assert measured_operation_overhead(seconds=0) > 0


class TestAvailableMemory:
    @pytest.fixture(autouse=True)
    def _own_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hardware, "_MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(hardware, "_CONTROL_GROUP", tmp_path)

    @staticmethod
    def machine(folder: Path, available_kib: int) -> None:
        (folder / "meminfo").write_text(
            f"MemTotal:       99999999 kB\nMemFree:          111111 kB\nMemAvailable:   {available_kib} kB\n"
        )

    @staticmethod
    def group(folder: Path, limit: str, used: int, inactive_file: int) -> None:
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 12345\nfile 999\ninactive_file {inactive_file}\nactive_file 7\n")

    def test_what_the_kernel_says(self, tmp_path: Path) -> None:
        self.machine(tmp_path, 2048)
        assert available_memory_bytes(CPU) == 2048 * 1024

    def test_what_the_control_group_leaves(self, tmp_path: Path) -> None:
        """Cached files count as used, and give way."""
        self.machine(tmp_path, 2**20)
        self.group(tmp_path, "1000000", 700_000, 150_000)
        assert available_memory_bytes(CPU) == 1_000_000 - 700_000 + 150_000

    def test_the_smaller_of_both(self, tmp_path: Path) -> None:
        self.machine(tmp_path, 100)
        self.group(tmp_path, "1000000000", 700_000, 0)
        assert available_memory_bytes(CPU) == 102_400

    def test_a_group_without_a_limit(self, tmp_path: Path) -> None:
        self.machine(tmp_path, 100)
        self.group(tmp_path, "max", 10**12, 0)
        assert available_memory_bytes(CPU) == 102_400

    def test_without_proc(self) -> None:
        assert available_memory_bytes(CPU) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def test_nothing_is_known(self, tmp_path: Path) -> None:
        (tmp_path / "meminfo").write_text("MemTotal: 5 kB\n")
        assert available_memory_bytes(CPU) == sys.maxsize

    def test_a_gpus_free_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
        assert available_memory_bytes(CUDA) == 123


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def refuse(name: None) -> None:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    tune_cpu_allocator()


def test_the_thresholds_of_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    """M_MMAP_MAX (-4) 0 keeps large blocks on the heap, and M_TRIM_THRESHOLD (-1) keeps the heap."""
    calls: dict[int, int] = {}

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> None:
            calls[parameter] = value

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    tune_cpu_allocator()
    assert calls == {-4: 0, -1: 2**31 - 1}
