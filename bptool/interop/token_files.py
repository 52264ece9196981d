"""Files of token ids: nanoGPT's headerless ones and llm.c's with a header; all little-endian.

    nanoGPT         uint16 ids and nothing else                     data/*/prepare.py in karpathy/nanoGPT
    llm.c, GPT-2    header (magic 20240520, version 1), uint16 ids  dev/data/data_common.py in karpathy/llm.c
    llm.c, Llama 3  header (magic 20240801, version 7), uint32 ids  the same file

The header is 256 int32: magic, version, number of ids, then zeros. Ids are memory-mapped, never loaded whole.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from bptool.errors import DataError, StorageError, nearest
from bptool.files import replacing

Tokens = npt.NDArray[np.unsignedinteger]
"""One-dimensional token ids: uint8, uint16 or uint32."""

HEADER_BYTES = 256 * 4
_CHUNK_TOKENS = 2**22
_OTHER_LLMC_FILES = {20240522: "evaluation file", 20240326: "weights file", 20240328: "tokenizer file"}


@dataclass(frozen=True)
class TokenFormat:
    """How ids lie in a file; `magic` and `version` are 0 where there is no header."""

    name: str
    dtype: str
    magic: int = 0
    version: int = 0

    @property
    def header_bytes(self) -> int:
        """Bytes before the first id."""
        return HEADER_BYTES if self.magic else 0


NANOGPT = TokenFormat("nanoGPT uint16", "<u2")
LLMC_GPT2 = TokenFormat("llm.c GPT-2 uint16", "<u2", magic=20240520, version=1)
LLMC_LLAMA3 = TokenFormat("llm.c Llama-3 uint32", "<u4", magic=20240801, version=7)
_HEADED = {token_format.magic: token_format for token_format in (LLMC_GPT2, LLMC_LLAMA3)}


@dataclass(frozen=True, eq=False)
class TokenFile:
    """An open token file: its ids, mapped read-only, and the format that was recognised."""

    tokens: Tokens
    format: TokenFormat


def read_token_file(path: Path, *, vocab_size: int) -> TokenFile:
    """Map the ids of `path`, all of them checked to be below `vocab_size`.

    Raises:
        DataError: missing, empty, cut short, of another kind, or with an id beyond the vocabulary.
        StorageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            token_format, count = _recognise(path, file)
        tokens: Tokens = np.memmap(path, token_format.dtype, "r", offset=token_format.header_bytes, shape=count)
        _check_ids(path, tokens, vocab_size)
    except FileNotFoundError:
        siblings = (entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else ()
        raise DataError(f"token file '{path}' does not exist{nearest(path.name, siblings)}") from None
    except OSError as error:
        raise StorageError(f"token file '{path}' cannot be read: {error.strerror or error}") from error
    return TokenFile(tokens, token_format)


def write_token_file(path: Path, tokens: npt.NDArray[np.integer], token_format: TokenFormat) -> None:
    """Write ids; `path` is whole, or what it was.

    Raises:
        DataError: an id that the format's dtype or a number of ids that its header cannot hold.
        StorageError: it cannot be written.
    """
    largest = np.iinfo(token_format.dtype).max
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) <= largest:
        raise DataError(f"ids span {tokens.min()}..{tokens.max()}; {token_format.name} holds 0..{largest}")
    if token_format.magic and len(tokens) >= 2**31:
        raise DataError(f"{len(tokens)} ids; the header of {token_format.name} counts to {2**31 - 1}")
    with replacing(path) as temporary, temporary.open("wb") as file:
        _write(file, tokens, token_format)


def _write(file: BinaryIO, tokens: npt.NDArray[np.integer], token_format: TokenFormat) -> None:
    if token_format.magic:
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = token_format.magic, token_format.version, len(tokens)
        file.write(header.tobytes())
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        file.write(tokens[start : start + _CHUNK_TOKENS].astype(token_format.dtype).tobytes())


def _recognise(path: Path, file: BinaryIO) -> tuple[TokenFormat, int]:
    """The format of an open file and the number of its ids."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise DataError(f"token file '{path}' is empty (0 bytes)")
    head = np.frombuffer(file.read(12).ljust(12, b"\0"), "<i4")
    magic, version, announced = (int(field) for field in head)
    if magic in _OTHER_LLMC_FILES:
        raise DataError(f"'{path}' is no token file but an llm.c {_OTHER_LLMC_FILES[magic]} (magic {magic})")
    if magic not in _HEADED:
        return NANOGPT, _headerless_count(path, size)
    token_format = _HEADED[magic]
    _check_header(path, token_format, version, announced, size)
    return token_format, announced


def _headerless_count(path: Path, size: int) -> int:
    if size % 2:
        raise DataError(
            f"token file '{path}' has {size} bytes, an odd number; without a header its ids are uint16",
            "check that the file is complete, and that it holds token ids",
        )
    return size // 2


def _check_header(path: Path, token_format: TokenFormat, version: int, announced: int, size: int) -> None:
    if size < HEADER_BYTES:
        raise DataError(
            f"token file '{path}' is cut short: {size} bytes, and its header alone has {HEADER_BYTES}",
            "copy or prepare the file again",
        )
    if version != token_format.version:
        raise DataError(
            f"token file '{path}' has version {version}; magic {token_format.magic} ({token_format.name}) "
            f"goes with version {token_format.version}"
        )
    expected = HEADER_BYTES + announced * np.dtype(token_format.dtype).itemsize
    if announced <= 0 or size != expected:
        raise DataError(
            f"token file '{path}' has {size} bytes; its header says {announced} ids, so {expected} bytes",
            "copy or prepare the file again",
        )


def _check_ids(path: Path, tokens: Tokens, vocab_size: int) -> None:
    """Look at every id, a chunk at a time; on the first bad one, look on for the largest."""
    if np.iinfo(tokens.dtype).max < vocab_size:
        return
    first_bad = largest = -1
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = tokens[start : start + _CHUNK_TOKENS]
        chunk_largest = int(chunk.max())
        largest = max(largest, chunk_largest)
        if first_bad < 0 and chunk_largest >= vocab_size:
            first_bad = start + int(np.argmax(chunk >= vocab_size))
    if first_bad >= 0:
        raise DataError(
            f"token file '{path}': position {first_bad} holds id {tokens[first_bad]}, "
            f"and model.vocab_size = {vocab_size} allows 0..{vocab_size - 1}",
            f"model.vocab_size={largest + 1} holds the file's largest id",
        )
