"""Memory snapshots: files as PyTorch writes them, and files that are none."""

from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bptool.errors import DataError, StorageError
from bptool.interop.memory_snapshot import (
    Block,
    Entry,
    Frame,
    Segment,
    Snapshot,
    read_snapshot,
    write_snapshot_file,
)

STACK = [
    {"filename": "/opt/torch/nn/modules/linear.py", "line": 134, "name": "forward"},
    {"filename": "/home/me/model.py", "line": 12, "name": "forward"},
]
FRAMES = (Frame("/opt/torch/nn/modules/linear.py", 134, "forward"), Frame("/home/me/model.py", 12, "forward"))


def segment(**changes: Any) -> dict[str, Any]:
    """2 MiB with one block in use, with every key that PyTorch 2.7 writes."""
    return {
        "device": 0,
        "address": 4096,
        "total_size": 2097152,
        "allocated_size": 512,
        "active_size": 512,
        "requested_size": 500,
        "stream": 0,
        "segment_type": "small",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": STACK,
        "blocks": [
            {"address": 4096, "size": 512, "requested_size": 500, "state": "active_allocated", "frames": STACK},
            {"address": 4608, "size": 2096640, "requested_size": 7, "state": "inactive", "frames": []},
        ],
        **changes,
    }


def entry(action: str, size: int, **changes: Any) -> dict[str, Any]:
    return {"action": action, "addr": 4096, "size": size, "stream": 0, "time_us": 17, "frames": STACK, **changes}


def document(**changes: Any) -> dict[str, Any]:
    history = [entry("segment_alloc", 2097152), entry("alloc", 500)]
    return {"segments": [segment()], "device_traces": [history], "allocator_settings": {"x": 0.5}, **changes}


READ = Snapshot(
    0,
    (Segment(4096, False, False, FRAMES, (Block(4096, 512, 500, True, FRAMES), Block(4608, 2096640, 0, False, ()))),),
    (Entry("segment_alloc", 4096, 2097152, FRAMES), Entry("alloc", 4096, 500, FRAMES)),
)


def written(path: Path, content: Any, protocol: int | None = None) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_pytorch_writes(tmp_path: Path, protocol: int) -> None:
    assert read_snapshot(written(tmp_path / "s.pickle", document(), protocol)) == READ


def test_reads_older_forms(tmp_path: Path) -> None:
    """Blocks without addresses or stacks, and the segments alone."""
    old = segment(blocks=[{"size": 512, "state": "active_allocated"}, {"size": 2096640, "state": "inactive"}])
    del old["frames"], old["is_expandable"], old["device"]
    read = read_snapshot(written(tmp_path / "s.pickle", [old]))
    assert read.history == ()
    assert read.segments == (
        Segment(4096, False, False, (), (Block(4096, 512, 512, True, ()), Block(4608, 2096640, 0, False, ()))),
    )


def test_a_block_that_waits_for_another_stream_is_not_allocated(tmp_path: Path) -> None:
    waiting = {"address": 4096, "size": 2097152, "requested_size": 9, "state": "active_pending_free", "frames": []}
    read = read_snapshot(written(tmp_path / "s.pickle", document(segments=[segment(blocks=[waiting])])))
    assert read.segments[0].blocks == (Block(4096, 2097152, 0, False, ()),)


def test_an_oom_tells_what_was_left(tmp_path: Path) -> None:
    failed = {"action": "oom", "device_free": 300, "size": 1024, "stream": 0, "time_us": 1}
    read = read_snapshot(written(tmp_path / "s.pickle", document(device_traces=[[failed]])))
    assert read.history == (Entry("oom", 300, 1024, ()),)


def test_of_several_devices_the_one_with_the_most_reserved(tmp_path: Path) -> None:
    large = segment(device=1, address=2**40, segment_type="large", blocks=[{"size": 2**30, "state": "inactive"}])
    content = document(segments=[segment(), large], device_traces=[[entry("alloc", 500)], [entry("alloc", 7)], []])
    read = read_snapshot(written(tmp_path / "s.pickle", content))
    assert (read.device, len(read.segments), read.segments[0].n_bytes) == (1, 1, 2**30)
    assert read.segments[0].is_large
    assert [e.n_bytes for e in read.history] == [7]


def test_nothing_was_ever_reserved(tmp_path: Path) -> None:
    read = read_snapshot(written(tmp_path / "s.pickle", {"segments": [], "device_traces": []}))
    assert read == Snapshot(0, (), ())


# ---- files that are none


class Runs:
    """Unpickled as it asks to be, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_nothing_in_a_file_is_executed(tmp_path: Path, protocol: int) -> None:
    ran = tmp_path / "ran"
    path = written(tmp_path / "s.pickle", document(allocator_settings=Runs(ran)), protocol)
    with pytest.raises(DataError, match=r"which could run code"):
        read_snapshot(path)
    assert not ran.exists()
    pickle.loads(path.read_bytes())  # it would have
    assert ran.exists()


@pytest.mark.parametrize("content", [OrderedDict(), torch.zeros(2), torch.float32, len, {"segments": {1, 2}}])
def test_other_pickles_are_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(DataError, match="is not a memory snapshot") as raised:
        read_snapshot(written(tmp_path / "s.pickle", content))
    assert "s.pickle" in raised.value.message
    assert "_dump_snapshot" in raised.value.remedy


@pytest.mark.parametrize("content", [b"", b"not a pickle\n", b"\x80", b"\x80\x04.", b"PK\x03\x04rest", b"{}", b"\x00"])
def test_what_is_no_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.pickle"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is not a memory snapshot: ."):
        read_snapshot(path)


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    whole = pickle.dumps(document())
    path = tmp_path / "s.pickle"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"is not a memory snapshot: ."):
            read_snapshot(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (3, "the file is a int, not a dict"),
        ({"segments": []}, "the file has no 'device_traces'"),
        (document(segments={}), "the file has 'segments' of type dict, not list"),
        (document(segments=[5]), r"segments\[0\] is a int, not a dict"),
        (document(segments=[segment(address="0x0")]), r"segments\[0\] has 'address' of type str, not int"),
        (document(segments=[segment(blocks=[{"size": 1}])]), r"segments\[0\].blocks\[0\] has no 'state'"),
        (document(device_traces=[[], None]), r"device_traces\[1\] is a NoneType, not a list"),
        (document(device_traces=[[{}]]), r"device_traces\[0\]\[0\] has no 'action'"),
        (
            document(device_traces=[[entry("alloc", 1, frames=[{"line": 1}])]]),
            r"device_traces\[0\]\[0\].frames\[0\] has no 'filename'",
        ),
    ],
)
def test_the_place_of_a_mistake_is_named(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_snapshot(written(tmp_path / "s.pickle", content))


def test_missing_and_unreadable(tmp_path: Path) -> None:
    (tmp_path / "snapshot.pickle").touch()
    with pytest.raises(DataError, match=r"does not exist, did you mean 'snapshot\.pickle'\?"):
        read_snapshot(tmp_path / "snapshots.pickle")
    with pytest.raises(StorageError, match="cannot be read"):
        read_snapshot(tmp_path)
    with pytest.raises(StorageError, match="could not be written"):
        write_snapshot_file(tmp_path / "nowhere" / "s.pickle", READ)


# ---- writing

names = st.text(max_size=5)
stacks = st.lists(st.builds(Frame, names, st.integers(0, 9), names), max_size=2).map(tuple)


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    address = next_address = draw(st.integers(0, 2**47))
    blocks = []
    for n_bytes, asked, stack in draw(
        st.lists(st.tuples(st.integers(1, 2**36), st.integers(0, 1), stacks), min_size=1)
    ):
        blocks.append(Block(next_address, n_bytes, n_bytes * asked, bool(asked), stack))
        next_address += n_bytes
    return Segment(address, draw(st.booleans()), draw(st.booleans()), draw(stacks), tuple(blocks))


actions = st.sampled_from(["alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "oom"])
entries = st.builds(Entry, actions, st.integers(0, 2**48), st.integers(0, 2**40), stacks)


@given(st.builds(Snapshot, st.just(0), st.lists(segments()).map(tuple), st.lists(entries).map(tuple)))
def test_reads_what_it_writes(tmp_path_factory: pytest.TempPathFactory, snapshot: Snapshot) -> None:
    path = tmp_path_factory.getbasetemp() / "s.pickle"
    write_snapshot_file(path, snapshot)
    assert read_snapshot(path) == snapshot


def test_a_written_file_has_the_keys_of_pytorchs(tmp_path: Path) -> None:
    write_snapshot_file(tmp_path / "s.pickle", READ)
    assert [path.name for path in tmp_path.iterdir()] == ["s.pickle"]
    read = pickle.loads((tmp_path / "s.pickle").read_bytes())
    theirs = document()
    assert read.keys() >= theirs.keys()
    for ours, other in [(read["segments"][0], segment()), (read["device_traces"][0][0], entry("alloc", 1))]:
        assert ours.keys() == other.keys()
        assert {key: type(value) for key, value in ours.items()} == {key: type(value) for key, value in other.items()}
    assert read["segments"][0]["blocks"] == [*segment()["blocks"][:1], {**segment()["blocks"][1], "requested_size": 0}]
    assert "category" not in read["device_traces"][0][0]  # the viewer's legend of categories fails


def test_another_devices_number_is_kept(tmp_path: Path) -> None:
    write_snapshot_file(tmp_path / "s.pickle", READ._replace(device=2))
    assert read_snapshot(tmp_path / "s.pickle") == READ._replace(device=2)


def test_equal_stacks_lie_in_the_file_once(tmp_path: Path) -> None:
    write_snapshot_file(tmp_path / "s.pickle", READ._replace(history=READ.history * 100))
    assert (tmp_path / "s.pickle").read_bytes().count(b"linear.py") == 1


def test_the_viewer_knows_every_opcode(tmp_path: Path) -> None:
    """Those of `unpickle` in torch/utils/viz/MemoryViz.js, by their names in Python's pickletools."""
    known = "APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPUT BINUNICODE DICT EMPTY_DICT EMPTY_LIST"
    known += " EMPTY_TUPLE FRAME LIST LONG1 LONG_BINGET LONG_BINPUT MARK MEMOIZE NEWFALSE NEWTRUE NONE PROTO SETITEM"
    known += " SETITEMS SHORT_BINUNICODE STOP TUPLE TUPLE1 TUPLE2 TUPLE3"
    far = Block(2**46, 2**34, 2**33, True, (Frame("f" * 300, 70000, "café"),) * 300)
    history = tuple(Entry("alloc", 2**46 + i, i, ()) for i in range(3000))
    write_snapshot_file(tmp_path / "s.pickle", Snapshot(1, (Segment(2**46, True, False, (), (far,)),), history))
    opcodes = [(op.name, value) for op, value, _ in pickletools.genops((tmp_path / "s.pickle").read_bytes())]
    assert {name for name, _ in opcodes} <= set(known.split())
    assert opcodes[0] == ("PROTO", 4)
