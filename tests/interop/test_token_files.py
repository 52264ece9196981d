"""Token files against bytes packed by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from bptool.errors import DataError, StorageError
from bptool.interop.token_files import (
    LLMC_GPT2,
    LLMC_LLAMA3,
    NANOGPT,
    TokenFormat,
    read_token_file,
    write_token_file,
)

IDS = [0, 1, 258, 50256]


def packed(ids: list[int], code: str, *header: int) -> bytes:
    """A file's bytes by `struct`: 256 int32 of header, if any, then the ids."""
    head = struct.pack("<256i", *header, *[0] * (256 - len(header))) if header else b""
    return head + struct.pack(f"<{len(ids)}{code}", *ids)


FILES = [
    pytest.param(NANOGPT, packed(IDS, "H"), id="nanogpt"),
    pytest.param(LLMC_GPT2, packed(IDS, "H", 20240520, 1, 4), id="llmc-gpt2"),
    pytest.param(LLMC_LLAMA3, packed(IDS, "I", 20240801, 7, 4), id="llmc-llama3"),
]


@pytest.mark.parametrize(("token_format", "content"), FILES)
def test_reads_what_others_write(tmp_path: Path, token_format: TokenFormat, content: bytes) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(content)
    opened = read_token_file(path, vocab_size=50257)
    assert opened.tokens.tolist() == IDS
    assert opened.format is token_format


@pytest.mark.parametrize(("token_format", "content"), FILES)
def test_writes_what_others_read(tmp_path: Path, token_format: TokenFormat, content: bytes) -> None:
    write_token_file(tmp_path / "train.bin", np.array(IDS), token_format)
    assert (tmp_path / "train.bin").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["train.bin"]


def test_ids_are_mapped_and_read_only(tmp_path: Path) -> None:
    write_token_file(tmp_path / "train.bin", np.array(IDS), NANOGPT)
    tokens = read_token_file(tmp_path / "train.bin", vocab_size=50257).tokens
    assert isinstance(tokens, np.memmap)
    assert not tokens.flags.writeable


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "is empty (0 bytes)", id="empty"),
        pytest.param(b"abc", "has 3 bytes, an odd number", id="odd"),
        pytest.param(packed([], "H", 20240520, 1, 0), "1024 bytes; its header says 0 ids", id="no-ids"),
        pytest.param(packed(IDS, "H", 20240520, 1, 4)[:1000], "1000 bytes, and its header alone", id="header-cut"),
        pytest.param(packed(IDS, "H", 20240520, 1, 5), "1032 bytes; its header says 5 ids, so 1034", id="cut-short"),
        pytest.param(packed(IDS, "H", 20240520, 1, 3), "1032 bytes; its header says 3 ids, so 1030", id="too-long"),
        pytest.param(packed(IDS, "I", 20240801, 7, 3), "1040 bytes; its header says 3 ids, so 1036", id="llama"),
        pytest.param(packed(IDS, "H", 20240520, 1, -4), "its header says -4 ids", id="negative"),
        pytest.param(packed(IDS, "H", 20240520, 7, 4), "has version 7; magic 20240520", id="version"),
        pytest.param(packed(IDS, "H", 20240522, 1, 4), "no token file but an llm.c evaluation file", id="eval"),
    ],
)
def test_damaged_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_token_file(path, vocab_size=50257)
    assert message in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize("position", [0, 2**22 - 1, 2**22, 2**22 + 9])
def test_first_id_beyond_the_vocabulary_is_named(tmp_path: Path, position: int) -> None:
    ids = np.zeros(2**22 + 11, np.uint16)  # more than one chunk of the check
    ids[position], ids[-1] = 300, 511
    write_token_file(tmp_path / "train.bin", ids, NANOGPT)
    with pytest.raises(DataError) as caught:
        read_token_file(tmp_path / "train.bin", vocab_size=300)
    assert f"position {position} holds id 300, and model.vocab_size = 300 allows 0..299" in caught.value.message
    assert "model.vocab_size=512" in caught.value.remedy
    assert len(read_token_file(tmp_path / "train.bin", vocab_size=512).tokens) == len(ids)


def test_largest_id_of_gpt2_is_the_last_that_fits(tmp_path: Path) -> None:
    write_token_file(tmp_path / "train.bin", np.array([0, 50257]), NANOGPT)
    with pytest.raises(DataError, match=r"position 1 holds id 50257, and model\.vocab_size = 50257"):
        read_token_file(tmp_path / "train.bin", vocab_size=50257)
    assert read_token_file(tmp_path / "train.bin", vocab_size=50258).tokens.tolist() == [0, 50257]


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match=r"trian\.bin' does not exist, did you mean 'train\.bin'\?"):
        read_token_file(tmp_path / "trian.bin", vocab_size=10)


def test_unreadable_file_is_the_machines_fault(tmp_path: Path) -> None:
    (tmp_path / "train.bin").mkdir()
    with pytest.raises(StorageError, match="cannot be read"):
        read_token_file(tmp_path / "train.bin", vocab_size=10)


@pytest.mark.parametrize("bad", [-1, 65536])
def test_writer_refuses_ids_that_do_not_fit(tmp_path: Path, bad: int) -> None:
    with pytest.raises(DataError, match=r"nanoGPT uint16 holds 0\.\.65535"):
        write_token_file(tmp_path / "train.bin", np.array([0, bad]), NANOGPT)
    assert not list(tmp_path.iterdir())


def test_writer_says_that_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="could not be written"):
        write_token_file(tmp_path / "nowhere" / "train.bin", np.array(IDS), NANOGPT)


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(b"old!")

    def full_disk(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        write_token_file(path, np.array(IDS), NANOGPT)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("train.bin", b"old!")]
