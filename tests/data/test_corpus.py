"""Corpora: which files count, in what order, and what is said when nothing does."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import pytest

from bptool.data.corpus import read_corpus
from bptool.errors import DataError, StorageError


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_file_keeps_its_line_ends(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "Grüße\r\n".encode()})
    corpus = read_corpus(str(tmp_path / "a.txt"))
    assert corpus.documents == ("Grüße\r\n",)
    assert corpus.n_bytes == 9
    assert corpus.description == "a.txt, 9 B"


def test_folder_reads_text_and_counts_what_it_skips(tmp_path: Path) -> None:
    root = tmp_path / "books"
    readable = {"a.txt": b"A", "deep/er/b.md": b"B", "no-suffix": b"C"}
    binary = {"x.png": b"\x89PNG\0", "late-nul": b"x" * 10_000 + b"\0"}
    hidden = {".hidden": b"H", ".git/config": b"G", "deep/.cache/z": b"Z"}
    write(root, {**readable, **binary, **hidden, "latin1.txt": "é".encode("latin-1"), "empty.txt": b""})
    (root / "dangling").symlink_to(root / "nowhere")
    (root / "loop").symlink_to(root)
    corpus = read_corpus(str(root))
    assert sorted(corpus.documents) == ["A", "B", "C"]
    assert corpus.skipped == {"binary": 2, "not UTF-8": 1, "unreadable": 1}
    assert corpus.description == "books, 3 files, 4 skipped (2 binary, 1 not UTF-8, 1 unreadable), 3 B"


def test_documents_are_ordered_by_the_hash_of_their_relative_names(tmp_path: Path) -> None:
    names = [f"{folder}/{name}.txt" for folder in "abc" for name in range(5)]
    expected = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert expected != sorted(names)
    for root, order in ((tmp_path / "one", names), (tmp_path / "other", names[::-1])):
        write(root, {name: name.encode() for name in order})
        assert list(read_corpus(str(root)).documents) == expected


def test_standard_library() -> None:
    corpus = read_corpus("python-stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    assert (root / "argparse.py").read_bytes().decode() in corpus.documents
    assert (root / "json" / "decoder.py").read_bytes().decode() in corpus.documents
    assert (root / "idlelib" / "browser.py").read_bytes().decode() not in corpus.documents
    assert not corpus.skipped
    assert corpus.n_bytes > 5e6
    assert corpus.description.startswith("Python 3.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"MZ\0\0", "is binary; a text is UTF-8"),
        ("é".encode("latin-1"), "is not UTF-8; a text is UTF-8"),
    ],
)
def test_file_that_is_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path, {"a.txt": content})
    with pytest.raises(DataError, match=rf"a\.txt' {message}"):
        read_corpus(str(tmp_path / "a.txt"))


def test_missing_source_and_empty_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'python-stdlib'"):
        read_corpus("python-stdlb")
    with pytest.raises(DataError, match="is empty"):
        read_corpus("")


def test_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file with any text"):
        read_corpus(str(tmp_path))
    write(tmp_path, {"train.bin": b"\0\0", "val.bin": b"\0\0"})
    with pytest.raises(DataError, match="holds only 2 binary") as caught:
        read_corpus(str(tmp_path))
    assert f"data.source={tmp_path / 'train.bin'}" in caught.value.remedy


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a.txt": b"A"})

    def closed(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", closed)  # the tests may run as root, who may read anything
    with pytest.raises(StorageError, match=r"a\.txt' cannot be read: Permission denied"):
        read_corpus(str(tmp_path / "a.txt"))
    with pytest.raises(StorageError, match="holds only 1 unreadable"):
        read_corpus(str(tmp_path))


def test_closed_folder_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", closed)
    with pytest.raises(StorageError, match="holds only 1 unreadable"):
        read_corpus(str(tmp_path))


def test_interpreter_without_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="no readable source of its standard library") as caught:
        read_corpus("python-stdlib")
    assert "data.source=" in caught.value.remedy
