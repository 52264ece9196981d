"""A snapshot's peak, rebuilt from its end and its history."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from memory_records import record, records

from bptool.analysis.memory.caching_allocator import replay
from bptool.analysis.memory.estimate_snapshot import snapshot_of
from bptool.analysis.memory.snapshot_peak import LiveBlock, peak_of
from bptool.instruments.memory.trace import MemoryTrace
from bptool.interop.memory_snapshot import Block, Entry, Frame, Segment, Snapshot
from bptool.units import MIB

HERE = (Frame("train.py", 3, "step"),)


def plain(address: int, *blocks: tuple[int, int], expandable: bool = False) -> Segment:
    """A segment of blocks, each its bytes and what was asked for (0: free)."""
    laid, at = [], address
    for n_bytes, requested in blocks:
        laid.append(Block(at, n_bytes, requested, requested > 0, ()))
        at += n_bytes
    return Segment(address, True, expandable, (), tuple(laid))


def test_without_a_history_it_is_the_end() -> None:
    peak = peak_of(Snapshot(0, (plain(0, (20 * MIB, 19 * MIB + 5)), plain(40 * MIB, (2 * MIB, 0))), ()))
    assert (peak.allocated_bytes, peak.reserved_bytes) == (20 * MIB, 22 * MIB)
    assert peak.blocks == [LiveBlock(19 * MIB + 5, 20 * MIB, ())]
    assert peak_of(Snapshot(0, (), ())).allocated_bytes == 0


def test_what_went_during_the_recording_was_there_before() -> None:
    """6 MiB go, 3 MiB come in their place: the peak is before all that."""
    history = (
        Entry("free_requested", 0, 6 * MIB - 1, HERE),
        Entry("free_completed", 0, 6 * MIB - 1, HERE),
        Entry("alloc", 0, 3 * MIB, HERE),
    )
    peak = peak_of(Snapshot(0, (plain(0, (3 * MIB, 3 * MIB), (4 * MIB, 0), (13 * MIB, 13 * MIB)),), history))
    assert (peak.allocated_bytes, peak.reserved_bytes) == (19 * MIB, 20 * MIB)
    assert sorted(peak.blocks) == [LiveBlock(6 * MIB - 1, 6 * MIB, ()), LiveBlock(13 * MIB, 13 * MIB, ())]


def test_the_rest_of_a_block_counts_where_it_is_too_little_to_split() -> None:
    """Of 4 MiB between two blocks, 3 MiB leave 1 MiB, which goes with them; 3 MiB - 512 leave a block."""
    end = (plain(0, (8 * MIB, 8 * MIB), (4 * MIB, 0), (8 * MIB, 8 * MIB)),)
    for asked, given_bytes in ((3 * MIB, 4 * MIB), (3 * MIB - 512, 3 * MIB - 512)):
        history = (Entry("alloc", 8 * MIB, asked, HERE), Entry("free_requested", 8 * MIB, asked, ()))
        peak = peak_of(Snapshot(0, end, history))
        assert peak.allocated_bytes == 16 * MIB + given_bytes
        assert LiveBlock(asked, given_bytes, HERE) in peak.blocks
        expanding = peak_of(
            Snapshot(0, (plain(0, *((b.n_bytes, b.requested_bytes) for b in end[0].blocks), expandable=True),), history)
        )
        assert expanding.allocated_bytes == 16 * MIB + asked


def test_segments_that_came_and_went() -> None:
    history = (
        Entry("segment_alloc", 0, 20 * MIB, ()),
        Entry("alloc", 0, 19 * MIB, HERE),
        Entry("free_requested", 0, 19 * MIB, ()),
        Entry("segment_free", 0, 20 * MIB, ()),
        Entry("segment_map", 64 * MIB, 2 * MIB, ()),
        Entry("alloc", 64 * MIB, 512, HERE),
    )
    peak = peak_of(Snapshot(0, (plain(64 * MIB, (512, 512), (2 * MIB - 512, 0), expandable=True),), history))
    assert (peak.allocated_bytes, peak.reserved_bytes) == (20 * MIB, 20 * MIB)
    assert peak.blocks == [LiveBlock(19 * MIB, 20 * MIB, HERE)]


def test_the_first_of_equal_peaks() -> None:
    history = (Entry("alloc", 0, 512, HERE), Entry("free_requested", 0, 512, ()), Entry("alloc", 0, 511, ()))
    peak = peak_of(Snapshot(0, (plain(0, (512, 511), (20 * MIB - 512, 0)),), history))
    assert peak.blocks == [LiveBlock(512, 512, HERE)]


def test_a_recording_may_leave_out_either_half_of_a_release() -> None:
    for half in ("free_requested", "free_completed"):
        moves = [(address, action) for address in (0, 512, 1024) for action in ("alloc", half)]
        history = tuple(Entry(action, address, 512, HERE) for address, action in moves)
        assert peak_of(Snapshot(0, (plain(0, (20 * MIB, 0)),), history)).allocated_bytes == 512
        assert peak_of(Snapshot(0, (plain(0, (20 * MIB, 0)),), history[1::2])).allocated_bytes == 3 * 512


def test_a_recording_without_releases_reuses_addresses() -> None:
    history = (Entry("alloc", 0, 512, ()), Entry("alloc", 0, 1024, HERE))
    peak = peak_of(Snapshot(0, (plain(0, (1024, 1024), (19 * MIB, 0)),), history))
    assert (peak.allocated_bytes, len(peak.blocks)) == (1024, 1)


@given(records(st.integers(1, MIB)), st.data())
def test_a_part_of_the_history_has_the_peak_of_that_part(trace: MemoryTrace, data: st.DataObject) -> None:
    """Small blocks, so that what is asked for tells the block: the recording may begin anywhere."""
    done = replay(trace)
    snapshot = snapshot_of(trace, done)
    begin = data.draw(st.integers(0, len(trace.events)))
    kept = 0
    for event in reversed(trace.events[begin:]):
        kept += 1 if event.delta > 0 else 2
    position = len(snapshot.history) - kept - sum(e.action == "segment_alloc" for e in snapshot.history)
    levels = [0, *done.allocated_bytes.tolist()][begin:]
    entries = [e for e in snapshot.history if e.action != "segment_alloc"][position:]
    assert peak_of(snapshot._replace(history=tuple(entries))).allocated_bytes == max(levels)


def test_nonsense_is_no_crash() -> None:
    """A block freed twice, another's release, addresses outside of all segments."""
    history = tuple(
        Entry(action, address, 700, ())
        for action in ("free_requested", "alloc", "segment_free")
        for address in (5, 5, 9)
    )
    assert peak_of(Snapshot(0, (plain(0, (512, 512)),), history)).allocated_bytes > 0


def test_a_record_of_nothing() -> None:
    trace = record([])
    assert peak_of(snapshot_of(trace, replay(trace))).blocks == []
