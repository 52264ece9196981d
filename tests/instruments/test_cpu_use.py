from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bptool.instruments import cpu_use
from bptool.instruments.cpu_use import CpuReading, CpuUse, read_cpu, used_between

TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture(autouse=True)
def _own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_use, "_STAT", tmp_path / "stat")
    monkeypatch.setattr(cpu_use, "_GROUP_STAT", tmp_path / "cpu.stat")


def read() -> CpuReading:
    return read_cpu(lambda: 5.0, lambda: 3.0)


def test_busy_is_all_but_idle_and_waiting(tmp_path: Path) -> None:
    """In ticks; what a host stole from a virtual machine (the eighth) counts, guests are in the user's already."""
    line = f"cpu  {TICKS} {2 * TICKS} {4 * TICKS} 99999 88888 0 0 {8 * TICKS} 777 666"
    (tmp_path / "stat").write_text(f"{line}\ncpu0 1 2 3 4\n")
    assert read() == CpuReading(5, 3, 15, None)


def test_the_control_groups_throttling(tmp_path: Path) -> None:
    (tmp_path / "cpu.stat").write_text("usage_usec 5\nnr_throttled 3\nthrottled_usec 2500000\n")
    assert read().throttled_s == 2.5
    (tmp_path / "cpu.stat").write_text("usage_usec 5\n")
    assert read().throttled_s is None


@pytest.mark.parametrize("text", [None, "", "cpu x"])
def test_where_nobody_tells(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "stat").write_text(text)
    assert read().busy_s is None


def test_what_others_did() -> None:
    """In ten seconds 25 of all cores together, of which 16 were ours; held back for one."""
    before, after = CpuReading(100, 7, 1000, 0.5), CpuReading(110, 23, 1025, 1.5)
    assert used_between(before, after) == CpuUse(others_cores=0.9, throttled=0.1)


def test_ticks_are_coarser_than_clocks() -> None:
    assert used_between(CpuReading(0, 0, 0, 0), CpuReading(1, 1.005, 1, 0)) == CpuUse(0, 0)


def test_what_is_not_known_stays_so() -> None:
    assert used_between(CpuReading(0, 0, None, None), CpuReading(1, 1, 5, 5)) == CpuUse(None, None)
    assert used_between(CpuReading(1, 0, 0, 0), CpuReading(1, 0, 0, 0)) == CpuUse(None, None)


def test_this_process_is_not_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the machine's own files
    before = read_cpu()
    if before.busy_s is None:
        pytest.skip("this system has no /proc/stat")
    while time.process_time() - before.own_s < 0.3:
        pass
    after = read_cpu()
    assert after.busy_s is not None
    assert after.busy_s - before.busy_s >= 0.3 - 2 / TICKS  # ours at least, to a tick at either end
