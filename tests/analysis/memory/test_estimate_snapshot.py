"""Snapshots written from a record, as PyTorch's own tools read them (torch/cuda/_memory_viz.py)."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from memory_records import CAPACITIES, record, records
from small_runs import small_config
from torch.cuda import _memory_viz as viewer

from bptool.analysis.memory.caching_allocator import Replay, replay
from bptool.analysis.memory.estimate_snapshot import write_snapshot
from bptool.analysis.memory.simulation import STEADY, simulate
from bptool.analysis.memory.snapshot_peak import peak_of
from bptool.instruments.memory.trace import Allocation, MemoryTrace
from bptool.interop.memory_snapshot import read_snapshot
from bptool.training.workload import transformer_workload
from bptool.units import MIB


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snapshots") / "s.pickle"


@pytest.fixture(scope="module")
def step() -> MemoryTrace:
    config = small_config({"model.vocab_size": 4096, "model.d_model": 512, "training.micro_batch_size": 32})
    return simulate(config, transformer_workload(config))


def load(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        loaded = pickle.load(file)
    assert isinstance(loaded, dict)
    return loaded


def flame_bytes(text: str, *, without: str = "\0", starts: str = "") -> int:
    """Sum of a flame graph's lines: each is the frames, a blank, and bytes."""
    lines = [line for line in text.splitlines() if without not in line and line.startswith(starts)]
    return sum(int(line.rpartition(" ")[2]) for line in lines)


def check_totals(snapshot: dict[str, Any], trace: MemoryTrace, done: Replay) -> None:
    """PyTorch's tools count what the replay counted."""
    end = done.refusal
    allocated = end.allocated_bytes if end else int(done.allocated_bytes[-1:].sum())
    reserved = end.reserved_bytes if end else int(done.reserved_bytes[-1:].sum())
    assert sum(segment["allocated_size"] for segment in snapshot["segments"]) == allocated
    requested = sum(allocation.n_bytes for allocation in trace.live_at(len(done.allocated_bytes) - 1))
    summary = viewer.segsum(snapshot)  # fails by itself where blocks do not fill their segment
    assert f"segments: {len(done.segments)}\n" in summary
    assert f"total_reserved: {viewer.Bytes(reserved)!r}\n" in summary
    assert f"total_allocated: {viewer.Bytes(requested)!r}\n" in summary
    flames = viewer.memory(snapshot, format_flamegraph=str)
    assert flame_bytes(flames) == reserved
    assert flame_bytes(flames, without="<gaps>") == requested


@given(records(), CAPACITIES)
def test_pytorchs_totals_are_the_replays(path: Path, trace: MemoryTrace, capacity: int | None) -> None:
    done = write_snapshot(trace, path, capacity)
    check_totals(load(path), trace, done)
    text = viewer.trace(load(path))
    kinds = [action.kind for action in done.actions]
    assert text.count("= cudaMalloc(") == kinds.count("segment_alloc")
    assert text.count("cudaFree(") == kinds.count("segment_free")
    assert text.count("del ") == text.count("# free completed for ") == kinds.count("free")
    assert text.count("raise OutOfMemoryError") == (done.refusal is not None)


@given(records(), CAPACITIES)
def test_the_peaks_can_be_read_back(path: Path, trace: MemoryTrace, capacity: int | None) -> None:
    """The reader rebuilds them from addresses and what was asked for, the way it does for anybody's file."""
    done = write_snapshot(trace, path, capacity)
    peak = peak_of(read_snapshot(path))
    assert (peak.allocated_bytes, peak.reserved_bytes) == (done.peak_allocated_bytes, done.peak_reserved_bytes)
    assert sum(block.n_bytes for block in peak.blocks) == peak.allocated_bytes


def test_a_step_of_the_trainer(path: Path, step: MemoryTrace) -> None:
    done = write_snapshot(step, path)
    check_totals(load(path), step, done)
    assert done.peak_allocated_bytes >= int(step.rounded(512).live_bytes.max())
    peak = peak_of(read_snapshot(path))
    assert sorted(block.requested_bytes for block in peak.blocks) == sorted(
        a.n_bytes for a in step.live_at(step.peak_event(STEADY)) if a.n_bytes
    )


def test_every_plot_accepts_it(path: Path, step: MemoryTrace, capsys: pytest.CaptureFixture[str]) -> None:
    write_snapshot(step, path)
    assert "<html>" in viewer.trace_plot(load(path))
    assert "<html>" in viewer.trace_plot(load(path), plot_segments=True, filter_freed=True)
    assert "<html>" in viewer.segment_plot(load(path))
    before, after = load(path)["segments"][:-1], load(path)["segments"]
    flames = viewer.compare(before, after, format_flamegraph=str)
    assert capsys.readouterr().out == f"only_before = []\nonly_after = [{after[-1]['address']}]\n"
    assert flame_bytes(flames, starts="only_after;") == after[-1]["total_size"]


def test_stacks_tell_what_the_record_knows(path: Path) -> None:
    known = Allocation(3 * MIB, "activations", "blocks.0.mlp", "aten.mm", "float32[8, 98304]", "forward", 0)
    write_snapshot(record([known, Allocation(512, "temporaries", "", "", "", "", 0)]), path)
    lines = viewer.memory(load(path), format_flamegraph=str).splitlines()
    stack = "category:0:activations;phase:0:forward;module:0:blocks.0.mlp;op:0:aten.mm;tensor:0:float32[8, 98304]"
    assert f"stream_0;active_allocated;{stack} {3 * MIB}" in lines
    assert "stream_0;active_allocated;category:0:temporaries 512" in lines
    segment = viewer.segments(load(path), format_flamegraph=str)
    assert f"{stack} {3 * MIB}" in segment


def test_the_last_action_is_the_refusal(path: Path) -> None:
    done = write_snapshot(record([2 * MIB, 20 * MIB]), path, 32 * MIB)
    assert done.refusal is not None
    last = load(path)["device_traces"][0][-1]
    assert (last["action"], last["size"], last["device_free"]) == ("oom", 20 * MIB, 12 * MIB)
    assert replay(record([2 * MIB, 20 * MIB]), 40 * MIB).refusal is None
