from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from measured_grids import header_of

from bptool.analysis.compare.entries import Entry, GradientComparison, Header, Prediction, RowRun, TimedPhases
from bptool.analysis.compare.journal import FORMAT_VERSION, Journal, read
from bptool.errors import RunInUse, StorageError, UsageError

ROWS = [{"precision.mode": "fp32"}, {"precision.mode": "bf16-mixed"}]
STEP = TimedPhases(step_s=0.5, forward_s=0.1, recompute_s=0.0, backward_s=0.3, units=64)
ENTRIES: list[Entry] = [
    Prediction(row=0, status="ok", peak_bytes=123, category_bytes={"weights": 4}),
    Prediction(row=1, status="unsupported", reason="no tf32 on «this» CPU"),
    GradientComparison(row=0, status="ok", reference="float64", relative_error=1e-7, layers={"embedding": 2e-7}),
    RowRun(row=0, round=0, status="ok", peak_bytes=5, steps=[STEP], losses=[2.5, 2.25]),
]


@pytest.fixture
def header() -> Header:
    return header_of(ROWS)


def written(path: Path, header: Header, entries: list[Entry]) -> bytes:
    with Journal.create(path, header) as journal:
        for entry in entries:
            journal.append(entry)
        assert journal.entries == entries
    return path.read_bytes()


def test_what_was_appended_is_read_again(tmp_path: Path, header: Header) -> None:
    path = tmp_path / "grid.jsonl"
    written(path, header, ENTRIES)
    assert read(path) == (header, ENTRIES)
    with Journal.resume(path, header) as journal:
        assert (journal.header, journal.entries) == (header, ENTRIES)
        journal.append(ENTRIES[0])
    assert read(path) == (header, [*ENTRIES, ENTRIES[0]])


@given(st.lists(st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, -0.0]), max_size=5))
def test_figures_keep_every_bit_and_lines_are_json(losses: list[float]) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grid.jsonl"
        written(path, header_of(ROWS), [RowRun(row=1, round=0, status="ok", losses=losses)])
        (entry,) = read(path)[1]
        assert isinstance(entry, RowRun)
        assert list(map(repr, entry.losses)) == list(map(repr, losses))
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=refuse)


def test_cut_anywhere_it_resumes_with_what_was_whole(tmp_path: Path, header: Header) -> None:
    whole = written(tmp_path / "grid.jsonl", header, ENTRIES)
    first = whole.index(b"\n") + 1
    path = tmp_path / "cut.jsonl"
    for length in range(first, len(whole), 7):
        path.write_bytes(whole[:length])
        expected = ENTRIES[: whole[:length].count(b"\n") - 1]
        assert read(path)[1] == expected
        with Journal.resume(path, header) as journal:
            assert journal.entries == expected
            journal.append(ENTRIES[-1])
        assert read(path)[1] == [*expected, ENTRIES[-1]]


@pytest.mark.parametrize("length", [0, 1, 30])
def test_a_file_without_a_whole_header_is_no_grid(length: int, tmp_path: Path, header: Header) -> None:
    path = tmp_path / "grid.jsonl"
    path.write_bytes(written(tmp_path / "whole.jsonl", header, [])[:length])
    with pytest.raises(UsageError, match="line 1") as caught:
        Journal.resume(path, header)
    assert "--force" in caught.value.remedy


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path, header: Header) -> None:
    path = tmp_path / "grid.jsonl"
    before = written(path, header, ENTRIES)
    with pytest.raises(UsageError, match="exists") as caught:
        Journal.create(path, header)
    assert "--resume" in caught.value.remedy
    assert "--force" in caught.value.remedy
    assert path.read_bytes() == before
    Journal.create(path, header, force=True).close()
    assert read(path) == (header, [])


def test_what_is_not_there_cannot_be_resumed_or_read(tmp_path: Path, header: Header) -> None:
    with pytest.raises(UsageError, match="no grid at"):
        Journal.resume(tmp_path / "none.jsonl", header)
    with pytest.raises(UsageError, match="there is no file"):
        read(tmp_path / "none.jsonl")


@pytest.mark.parametrize("force", [False, True])
def test_two_cannot_write_one_file(force: bool, tmp_path: Path, header: Header) -> None:
    path = tmp_path / "grid.jsonl"
    with Journal.create(path, header) as journal:
        journal.append(ENTRIES[0])
        with pytest.raises(RunInUse, match="another process"):
            Journal.create(path, header, force=True) if force else Journal.resume(path, header)
    assert read(path)[1] == ENTRIES[:1]
    Journal.resume(path, header).close()


@pytest.mark.parametrize(
    ("number", "line", "why"),
    [
        (3, "{", "no JSON"),
        (3, "[]", "list"),
        (3, '{"kind": "riddle", "row": 0}', "riddle"),
        (3, '{"kind": "run", "row": 0, "status": "ok"}', "round"),
        (4, '{"kind": "run", "row": 2, "round": 0, "status": "ok"}', "row = 2"),
        (1, '{"kind": "run"}', "header"),
        (1, '{"kind": "header", "format_version": 1}', "bptool_version"),
    ],
)
def test_a_damaged_line_is_named(number: int, line: str, why: str, tmp_path: Path, header: Header) -> None:
    path = tmp_path / "grid.jsonl"
    lines = written(path, header, ENTRIES).decode().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")
    for look in (lambda: read(path), lambda: Journal.resume(path, header)):
        with pytest.raises(UsageError, match=f"line {number}: .*{why}") as caught:
            look()
        assert caught.value.remedy


def test_other_peoples_files_are_refused(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\xff")
    with pytest.raises(UsageError, match="line 1"):
        read(picture)
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path)


def test_a_newer_format_is_refused_in_words(tmp_path: Path, header: Header) -> None:
    path = tmp_path / "grid.jsonl"
    newer = {"kind": "header", "format_version": FORMAT_VERSION + 1, "bptool_version": "9.8", "colour": "red"}
    path.write_text(json.dumps(newer) + "\n")
    with pytest.raises(UsageError, match=f"format is {FORMAT_VERSION + 1}") as caught:
        read(path)
    assert "9.8" in caught.value.remedy


@pytest.mark.parametrize(
    "changes",
    [
        {"overrides": ["model.n_layers=3"]},
        {"rows": [{"precision.mode": "fp32"}]},
        {"steps": 5},
        {"rounds": 7},
        {"device_name": "another CPU"},
        {"torch_version": "2.11"},
    ],
)
def test_another_grid_is_not_resumed(changes: dict[str, Any], tmp_path: Path, header: Header) -> None:
    path = tmp_path / "grid.jsonl"
    before = written(path, header, ENTRIES)
    ((key, value),) = changes.items()
    with pytest.raises(UsageError, match="another grid") as caught:
        Journal.resume(path, header.model_copy(update=changes))
    assert f"{key}: {getattr(header, key)} there, {value} now" in caught.value.message
    assert path.read_bytes() == before


def test_its_time_limit_may_differ(tmp_path: Path, header: Header) -> None:
    path = tmp_path / "grid.jsonl"
    written(path, header, ENTRIES)
    with Journal.resume(path, header.model_copy(update={"time_limit_s": 1.0})) as journal:
        assert journal.header == header


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "grid.jsonl", os.write
    with Journal.create(path, header) as journal:
        journal.append(ENTRIES[0])
        before = path.read_bytes()

        def write_a_part(descriptor: int, content: bytes) -> int:
            if len(content) < 40:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, content[:30])

        with monkeypatch.context() as full:
            full.setattr(os, "write", write_a_part)
            with pytest.raises(StorageError, match="No space left") as caught:
                journal.append(ENTRIES[1])
        assert "--resume" in caught.value.remedy
        assert path.read_bytes() == before
        assert journal.entries == ENTRIES[:1]
        journal.append(ENTRIES[2])
    assert read(path)[1] == [ENTRIES[0], ENTRIES[2]]


def test_a_folder_that_is_not_there(tmp_path: Path, header: Header) -> None:
    with pytest.raises(StorageError, match="could not be written"):
        Journal.create(tmp_path / "none" / "grid.jsonl", header)
