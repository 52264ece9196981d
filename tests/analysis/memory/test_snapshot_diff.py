"""An estimate against snapshots: of itself, and worked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from memory_records import record, records
from small_runs import small_config

from bptool.analysis.memory.caching_allocator import replay
from bptool.analysis.memory.estimate_snapshot import snapshot_of
from bptool.analysis.memory.simulation import STEADY, simulate
from bptool.analysis.memory.snapshot_diff import Side, SizeDifference, Source, diff
from bptool.instruments.memory.trace import Allocation, MemoryTrace
from bptool.interop.memory_snapshot import Block, Frame, Frames, Segment, Snapshot
from bptool.training.workload import transformer_workload
from bptool.units import MIB

TORCH_FILE = str(Path(torch.__file__).parent / "nn" / "modules" / "linear.py")


def holding(*blocks: tuple[int, Frames]) -> Snapshot:
    """A device that holds blocks of so many bytes, each in a segment of its own."""
    segments = []
    for number, (requested, frames) in enumerate(blocks):
        address = number * 2**40
        block = Block(address, -(-requested // 512) * 512, requested, True, frames)
        segments.append(Segment(address, True, False, (), (block,)))
    return Snapshot(0, tuple(segments), ())


def source_of(*frames: tuple[str, int, str]) -> str:
    """What a block with this stack is said to come from."""
    found = diff(record([0]), 0, holding((512, tuple(Frame(*frame) for frame in frames))))
    return found.differences[0].snapshot[0].where


def test_by_hand() -> None:
    trace = record(
        [
            Allocation(1000, "activations", "blocks.0.mlp", "aten.mm", "", "forward", 0),
            Allocation(1024, "activations", "blocks.11.mlp", "aten.mm", "", "forward", 0),
            Allocation(1024, "parameters", "head", "", "", "", 0),
            4 * MIB,
            19 * MIB,
            20 * MIB,
            ~5,
        ]
    )
    here = (Frame("/home/me/train.py", 7, "step"),)
    theirs = holding((700, here), (4 * MIB - 1, here), (3 * MIB, here), (3 * MIB, ()), (3 * MIB, here))
    found = diff(trace, 4, theirs)
    assert found.estimate == Side(
        allocated_bytes=24 * MIB + 3 * 1024,
        unsplit_bytes=MIB,  # 19 MiB have a segment of 20, of which 1 MiB is too little to be a block
        reserved_bytes=(2 + 20 + 20 + 20) * MIB,
        blocks_count=5,
    )
    assert found.snapshot == Side(
        allocated_bytes=13 * MIB + 1024, unsplit_bytes=0, reserved_bytes=13 * MIB + 1024, blocks_count=5
    )
    assert (found.matched_count, found.matched_bytes, found.has_history) == (2, 4 * MIB + 1024, False)
    assert found.differences == (
        SizeDifference(
            size_bytes=19 * MIB,
            estimate_count=1,
            snapshot_count=0,
            estimate=(Source(where="temporaries", blocks_count=1),),
            snapshot=(),
        ),
        SizeDifference(
            size_bytes=3 * MIB,
            estimate_count=0,
            snapshot_count=3,
            estimate=(),
            snapshot=(
                Source(where="me/train.py:7 step", blocks_count=2),
                Source(where="no stack recorded", blocks_count=1),
            ),
        ),
        SizeDifference(
            size_bytes=1024,
            estimate_count=3,
            snapshot_count=1,
            estimate=(
                Source(where="activations: blocks.*.mlp aten.mm", blocks_count=2),
                Source(where="parameters: head", blocks_count=1),
            ),
            snapshot=(Source(where="me/train.py:7 step", blocks_count=1),),
        ),
    )
    assert [difference.excess_bytes for difference in found.differences] == [19 * MIB, -9 * MIB, 2048]


def test_what_was_asked_for_is_matched_and_not_what_was_given() -> None:
    """19 MiB in a block of 20, because that was free."""
    block = Block(0, 20 * MIB, 19 * MIB - 1, True, ())
    found = diff(record([19 * MIB]), 0, Snapshot(0, (Segment(0, True, False, (), (block,)),), ()))
    assert found.differences == ()
    assert found.estimate == found.snapshot


def test_expandable_segments_are_noticed() -> None:
    snapshot = holding((512, ()), (1024, ()))
    assert not diff(record([0]), 0, snapshot).has_expandable_segments
    first, second = snapshot.segments
    expandable = snapshot._replace(segments=(first, second._replace(is_expandable=True)))
    assert diff(record([0]), 0, expandable).has_expandable_segments


def test_the_most_frequent_source_is_first() -> None:
    names = ["a", "b", "b", "c", "c", "c"]
    trace = record([Allocation(512, "inputs", name, "", "", "", 0) for name in names])
    found = diff(trace, 5, holding(*((1024, (Frame("x.py", 1, name),)) for name in names)))
    for difference, sources in zip(found.differences, ("snapshot", "estimate"), strict=True):
        assert [source.blocks_count for source in getattr(difference, sources)] == [3, 2, 1]


def test_a_step_equals_its_own_snapshot() -> None:
    config = small_config()
    trace = simulate(config, transformer_workload(config))
    done = replay(trace)
    found = diff(trace, int(done.allocated_bytes.argmax()), snapshot_of(trace, done))
    assert found.differences == ()
    assert found.estimate == found.snapshot
    assert found.matched_bytes == found.estimate.allocated_bytes == int(trace.rounded(512).live_bytes.max())
    assert found.matched_count == len([a for a in trace.live_at(trace.peak_event(STEADY)) if a.n_bytes])
    assert found.has_history


@given(records(), records())
def test_every_byte_is_matched_or_told(ours: MemoryTrace, theirs: MemoryTrace) -> None:
    event = len(ours.events) - 1
    if event < 0:
        return
    found = diff(ours, event, snapshot_of(theirs, replay(theirs)))
    more = {True: 0, False: 0}
    for difference in found.differences:
        assert difference.excess_bytes != 0
        assert sum(source.blocks_count for source in difference.estimate) == difference.estimate_count
        assert sum(source.blocks_count for source in difference.snapshot) == difference.snapshot_count
        more[difference.excess_bytes > 0] += abs(difference.excess_bytes)
    assert found.estimate.allocated_bytes == found.matched_bytes + found.estimate.unsplit_bytes + more[True]
    assert found.snapshot.allocated_bytes == found.matched_bytes + found.snapshot.unsplit_bytes + more[False]
    sizes = [abs(difference.excess_bytes) for difference in found.differences]
    assert sizes == sorted(sizes, reverse=True)


USER = ("/home/me/model.py", 12, "forward")


@pytest.mark.parametrize(
    ("filename", "is_the_users"),
    [
        pytest.param(TORCH_FILE, False, id="this torch"),
        ("/another/lib/python3.9/site-packages/torch/nn/modules/linear.py", False),
        ("/opt/pytorch/torch/_tensor.py", False),
        ("C:\\lib\\site-packages\\torch\\nn\\functional.py", False),
        ("/home/me/torch/my_own.py", True),
        ("/home/me/torchtune/model.py", True),
        ("/site-packages/transformers/modeling_utils.py", True),
        ("<ipython-input-3-0123>", True),
        ("<stdin>", True),
        ("<frozen runpy>", False),
        ("<eval_with_key>.4", False),
        ("??", False),
        ("", False),
        ("CUDACachingAllocator.cpp", False),
    ],
)
def test_the_innermost_line_that_is_not_pytorchs(filename: str, is_the_users: bool) -> None:
    found = source_of((filename, 3, "inner"), USER, ("/home/me/train.py", 1, "<module>"))
    assert found.endswith(":3 inner" if is_the_users else "me/model.py:12 forward")


def test_where_no_line_is_the_users_the_operation_is_named() -> None:
    autograd = [("??", 0, "torch::unwind::unwind()"), ("??", 0, "at::_ops::bmm::call(at::Tensor const&)")]
    assert source_of(*autograd, ("??", 0, "at::_ops::mm::call()")) == "aten.bmm"
    assert source_of((TORCH_FILE, 3, "forward"), ("??", 0, "main")) == "modules/linear.py:3 forward"


def test_layers_are_one_source_and_other_numbers_are_not() -> None:
    names = ["blocks.0.mlp", "blocks.12.mlp", "h.3", "conv2.1x1"]
    trace = record([Allocation(512, "gradients", name, "aten.mm", "", "", 0) for name in names])
    found = diff(trace, 3, holding())
    assert [(source.where, source.blocks_count) for source in found.differences[0].estimate] == [
        ("gradients: blocks.*.mlp aten.mm", 2),
        ("gradients: h.* aten.mm", 1),
        ("gradients: conv2.1x1 aten.mm", 1),
    ]
