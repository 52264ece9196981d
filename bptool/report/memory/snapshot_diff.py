"""An estimate beside a snapshot, as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

from bptool.analysis.memory.snapshot_diff import SizeDifference, SnapshotDiff
from bptool.report.text import aligned, visible
from bptool.units import format_bytes

_SIZES, _SOURCES = 10, 3
"""How many sizes, and how many places for each, are shown."""


def render_diff(diff: SnapshotDiff) -> str:
    """The peaks side by side, then what only the snapshot has, then what only the estimate has."""
    blocks = [aligned(_rows(diff))]
    if not diff.has_history:
        blocks.append(
            "The snapshot has no history, so these are its blocks when it was taken, not at its peak: call\n"
            "torch.cuda.memory._record_memory_history() before the step that it is to show."
        )
    if diff.has_expandable_segments:
        blocks.append(
            "The snapshot's segments are expandable; what the estimate reserves is for segments that are not."
        )
    theirs = [d for d in diff.differences if d.excess_bytes < 0]
    ours = [d for d in diff.differences if d.excess_bytes > 0]
    blocks += [_section("snapshot", theirs)] if theirs else []
    blocks += [_section("estimate", ours)] if ours else []
    if not diff.differences:
        blocks.append("Both hold the same blocks.")
    return "\n\n".join(blocks)


def _rows(diff: SnapshotDiff) -> list[tuple[str, str]]:
    ours, theirs = diff.estimate, diff.snapshot
    return [
        ("peak allocated", _compared(ours.allocated_bytes, theirs.allocated_bytes)),
        ("peak reserved", _compared(ours.reserved_bytes, theirs.reserved_bytes)),
        ("blocks at the peak", f"estimate {ours.blocks_count}, snapshot {theirs.blocks_count}"),
        ("of equal size", f"{_blocks(diff.matched_count)}, {format_bytes(diff.matched_bytes)}"),
        (
            "too little to split off",
            f"estimate {format_bytes(ours.unsplit_bytes)}, snapshot {format_bytes(theirs.unsplit_bytes)}",
        ),
    ]


def _compared(ours: int, theirs: int) -> str:
    words = [f"estimate {format_bytes(ours)}", f"snapshot {format_bytes(theirs)}"]
    if theirs:
        words.append("equal to the byte" if ours == theirs else f"{ours / theirs - 1:+.2%}")
    return ", ".join(words)


def _section(side: str, differences: Sequence[SizeDifference]) -> str:
    count = sum(abs(d.estimate_count - d.snapshot_count) for d in differences)
    n_bytes = sum(abs(d.excess_bytes) for d in differences)
    lines = [f"only in the {side}: {_blocks(count)}, {format_bytes(n_bytes)}"]
    for difference in differences[:_SIZES]:
        lines += _lines(side, difference)
    if left := differences[_SIZES:]:
        sizes = "1 more size" if len(left) == 1 else f"{len(left)} more sizes"
        lines.append(f"  and {sizes}, {format_bytes(sum(abs(d.excess_bytes) for d in left))}")
    return "\n".join(lines)


def _lines(side: str, difference: SizeDifference) -> list[str]:
    here, there, sources = difference.estimate_count, difference.snapshot_count, difference.estimate
    if side == "snapshot":
        here, there, sources = there, here, difference.snapshot
    of = f" ({here} against {there})" if there else ""
    lines = [f"  {here - there} x {format_bytes(difference.size_bytes)}{of}"]
    lines += [f"      {source.blocks_count} x {visible(source.where)}" for source in sources[:_SOURCES]]
    if len(sources) > _SOURCES:
        lines.append(f"      {sum(source.blocks_count for source in sources[_SOURCES:])} x elsewhere")
    return lines


def _blocks(count: int) -> str:
    return "1 block" if count == 1 else f"{count} blocks"
