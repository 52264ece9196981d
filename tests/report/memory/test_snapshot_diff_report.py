from __future__ import annotations

from bptool.analysis.memory.snapshot_diff import Side, SizeDifference, SnapshotDiff, Source
from bptool.report.memory.snapshot_diff import render_diff
from bptool.units import GIB, MIB


def side(allocated_bytes: int, reserved_bytes: int, count: int) -> Side:
    return Side(allocated_bytes=allocated_bytes, unsplit_bytes=MIB, reserved_bytes=reserved_bytes, blocks_count=count)


def sources(*counts: int, where: str) -> tuple[Source, ...]:
    return tuple(Source(where=f"{where}{i}", blocks_count=n) for i, n in enumerate(counts))


def difference(size: int, ours: tuple[int, ...], theirs: tuple[int, ...]) -> SizeDifference:
    return SizeDifference(
        size_bytes=size,
        estimate_count=sum(ours),
        snapshot_count=sum(theirs),
        estimate=sources(*ours, where="module"),
        snapshot=sources(*theirs, where="line"),
    )


def compared(*differences: SizeDifference, has_history: bool = True) -> SnapshotDiff:
    return SnapshotDiff(
        estimate=side(3 * GIB, 4 * GIB, 7),
        snapshot=side(4 * GIB, 4 * GIB, 9),
        has_history=has_history,
        has_expandable_segments=False,
        matched_count=1,
        matched_bytes=GIB,
        differences=differences,
    )


def test_both_sides() -> None:
    shown = render_diff(compared(difference(2 * MIB, (1,), (4, 3, 2, 1)), difference(512, (3, 2), ())))
    assert (
        shown
        == """\
  peak allocated           estimate 3.00 GiB, snapshot 4.00 GiB, -25.00%
  peak reserved            estimate 4.00 GiB, snapshot 4.00 GiB, equal to the byte
  blocks at the peak       estimate 7, snapshot 9
  of equal size            1 block, 1.00 GiB
  too little to split off  estimate 1.00 MiB, snapshot 1.00 MiB

only in the snapshot: 9 blocks, 18.00 MiB
  9 x 2.00 MiB (10 against 1)
      4 x line0
      3 x line1
      2 x line2
      1 x elsewhere

only in the estimate: 5 blocks, 2.50 KiB
  5 x 512 B
      3 x module0
      2 x module1"""
    )


def test_no_difference() -> None:
    shown = render_diff(compared())
    assert shown.endswith("\n\nBoth hold the same blocks.")
    assert "only in" not in shown


def test_a_snapshot_without_a_history_is_told() -> None:
    assert "_record_memory_history()" in render_diff(compared(has_history=False))
    assert "_record_memory_history()" not in render_diff(compared())


def test_expandable_segments_are_told() -> None:
    shown = render_diff(compared().model_copy(update={"has_expandable_segments": True}))
    assert "segments are expandable" in shown
    assert "expandable" not in render_diff(compared())


def test_many_sizes_are_summed_up() -> None:
    many = [difference(512 * n, (), (1,)) for n in range(14, 0, -1)]
    shown = render_diff(compared(*many))
    assert shown.endswith("and 4 more sizes, 5.00 KiB")
    assert shown.count(" x line0") == 10


def test_an_empty_snapshot_has_no_ratio() -> None:
    nothing = compared().model_copy(update={"snapshot": side(0, 0, 0)})
    assert "peak allocated           estimate 3.00 GiB, snapshot 0 B\n" in render_diff(nothing)


def test_what_a_file_says_does_not_steer_the_terminal() -> None:
    evil = Source(where="\x1b[2Jx.py:1 f", blocks_count=1)
    shown = render_diff(compared(difference(512, (), (1,)).model_copy(update={"snapshot": (evil,)})))
    assert "\x1b" not in shown
    assert "\\x1b[2Jx.py:1 f" in shown
