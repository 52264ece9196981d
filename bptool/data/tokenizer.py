"""Text to token ids and back: plain bytes, or byte-pair encoding through the `tokenizers` library.

Either is saved as a `tokenizer.json`, which `tokenizers` and `transformers` load with the same ids.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bptool.config.schema import BPE, BYTES
from bptool.data.files import existing, unreadable
from bptool.errors import DataError
from bptool.files import replace_text
from bptool.interop.token_files import Tokens

if TYPE_CHECKING:
    from types import ModuleType

    import tokenizers

DOCUMENT_SEPARATOR = "\n\n"
"""Between documents where the tokenizer has no end-of-text token."""

END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # GPT-2; Llama 3; Llama 2; Gemma
_BATCH_CHARACTERS = 2**22  # the library's own record of an encoding takes 100 bytes and more for a token
_PIECE_CHARACTERS = 2**17  # of a long document: pieces keep all cores busy, and batches small
_THREADS = "TOKENIZERS_PARALLELISM"  # the library looks at it before each use of threads
_PIECE_END = re.compile(r"(?<=[^\W_])\n")  # here GPT-2 and Llama end a word whatever follows: no id changes


class Tokenizer(Protocol):
    """What the rest of bptool needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def end_of_text(self) -> int | None:
        """The id that separates documents, if the vocabulary has one."""

    @property
    def description(self) -> str:
        """`bytes`, or `BPE with 50,257 ids`."""

    def encode(self, text: str) -> Tokens:
        """Ids of `text`, [n_tokens]; the spelling of a special token is text like any other."""

    def encode_documents(self, documents: Sequence[str]) -> Tokens:
        """Ids of all documents, [n_tokens], with `end_of_text` or `DOCUMENT_SEPARATOR` between them."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; what is no UTF-8 becomes U+FFFD."""

    def save(self, path: Path) -> None:
        """Write a tokenizer.json, whole or not at all.

        Raises:
            StorageError: it cannot be written.
        """


class ByteTokenizer:
    """UTF-8: byte b has id b."""

    vocab_size = 256
    end_of_text = None
    description = "bytes"

    def encode(self, text: str) -> Tokens:
        """The bytes of `text`, uint8 [n_bytes]."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8)

    def encode_documents(self, documents: Sequence[str]) -> Tokens:
        """The bytes of all documents, uint8 [n_bytes], with `DOCUMENT_SEPARATOR` between."""
        return self.encode(DOCUMENT_SEPARATOR.join(documents))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; an id beyond 255, which a model with a larger vocabulary can say, is U+FFFD."""
        never_in_utf8 = 0xFF
        return bytes(id if id < 256 else never_in_utf8 for id in ids).decode("utf-8", errors="replace")

    def save(self, path: Path) -> None:
        """Write a byte-level BPE without merges."""
        replace_text(path, json.dumps(_byte_level_json(), ensure_ascii=False, indent=2))


class BpeTokenizer:
    """Any tokenizer of the `tokenizers` library; byte-level BPE where bptool trains it."""

    def __init__(self, library_tokenizer: tokenizers.Tokenizer) -> None:
        library_tokenizer.no_truncation()  # files of sentence encoders cut texts and fill them up
        library_tokenizer.no_padding()
        library_tokenizer.encode_special_tokens = True  # in a text, <|endoftext|> is thirteen characters
        vocabulary: dict[str, int] = library_tokenizer.get_vocab()
        self._library_tokenizer = library_tokenizer
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.end_of_text = next((vocabulary[name] for name in _END_OF_TEXT_NAMES if name in vocabulary), None)
        separator = library_tokenizer.encode(DOCUMENT_SEPARATOR, add_special_tokens=False).ids
        self._separator = separator if self.end_of_text is None else [self.end_of_text]

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """Byte-level BPE with GPT-2's splitting of words; the same arguments give the same ids.

        A small text may have too few pairs that occur twice; it then gives fewer than `vocab_size` ids.

        Raises:
            DataError: `vocab_size` has no room for the bytes and the end-of-text token.
        """
        smallest = 256 + 1
        if vocab_size < smallest:
            raise DataError(
                f"model.vocab_size = {vocab_size} is too small for data.tokenizer = 'bpe': "
                f"256 bytes and {END_OF_TEXT} alone are {smallest} ids",
                "model.vocab_size=4096, or data.tokenizer=bytes",
            )
        tokenizers = _import_tokenizers()
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = byte_level
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(byte_level.alphabet()),
            show_progress=False,
        )
        with _all_cores():
            tokenizer.train_from_iterator(documents, trainer)
        return cls(tokenizer)

    @property
    def description(self) -> str:
        """`BPE with 50,257 ids`."""
        return f"BPE with {self.vocab_size:,} ids"

    def encode(self, text: str) -> Tokens:
        """Ids of `text`, [n_tokens]; nothing is put before or after it."""
        return self.encode_documents([text])

    def encode_documents(self, documents: Sequence[str]) -> Tokens:
        """Ids of all documents in one stream, [n_tokens], encoded on all cores, in the smallest dtype.

        Raises:
            DataError: the tokenizer has no ids for some text, and none for what is unknown.
        """
        dtype = np.min_scalar_type(max(self.vocab_size - 1, 0))
        stream: list[Tokens] = []
        for batch in _batches(documents):
            for ids, (_, is_last) in zip(self._encode_batch([piece for piece, _ in batch]), batch, strict=True):
                stream.append(np.array(ids, dtype))
                if is_last:
                    stream.append(np.array(self._separator, dtype))
        return np.concatenate(stream[:-1])

    def _encode_batch(self, texts: list[str]) -> Iterator[list[int]]:
        try:
            with _all_cores():
                encodings = self._library_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"the tokenizer cannot encode the text: {error}") from error
        return (encoding.ids for encoding in encodings)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens spelt out; ids that the vocabulary lacks are left out."""
        text: str = self._library_tokenizer.decode([int(id) for id in ids], skip_special_tokens=False)
        return text

    def save(self, path: Path) -> None:
        """Write the library's own form."""
        replace_text(path, self._library_tokenizer.to_str(pretty=True))


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a folder that holds one; bytes are recognised.

    Raises:
        DataError: missing, malformed, or without a vocabulary.
        StorageError: it cannot be read.
    """
    path = existing(path, "tokenizer", [BYTES, BPE])
    if path.is_dir():
        path = existing(path / "tokenizer.json", "tokenizer")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise _malformed(path, error) from error
    if _is_byte_level(content):
        return ByteTokenizer()
    try:
        tokenizer = BpeTokenizer(_import_tokenizers().Tokenizer.from_str(text))
    except Exception as error:  # the library raises plain Exception
        raise _malformed(path, error) from error
    if tokenizer.vocab_size == 0:
        raise _malformed(path, "its vocabulary is empty")
    return tokenizer


def _malformed(path: Path, why: object) -> DataError:
    return DataError(
        f"'{path}' is no tokenizer.json of the tokenizers library: {why}",
        "save one with tokenizer.save(FILE) of `tokenizers`, or save_pretrained(FOLDER) of `transformers`",
    )


def _import_tokenizers() -> ModuleType:
    """`tokenizers`, imported where it is needed: it takes a while."""
    import tokenizers
    import tokenizers.decoders
    import tokenizers.models
    import tokenizers.pre_tokenizers
    import tokenizers.trainers

    return tokenizers


@cache
def _user_decides_on_threads() -> bool:
    return _THREADS in os.environ


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let the library use threads here, and nowhere else, unless the environment says what it may do.

    Left on, a forked child that uses the library hangs; left unset, some versions print a warning at each fork.
    """
    if _user_decides_on_threads():
        yield
        return
    os.environ[_THREADS] = "true"
    try:
        yield
    finally:
        os.environ[_THREADS] = "false"


def _batches(documents: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of documents, each with whether it is its document's last, in batches of limited size."""
    batch: list[tuple[str, bool]] = []
    room = _BATCH_CHARACTERS
    for document in documents:
        for piece in _pieces(document):
            batch.append(piece)
            room -= len(piece[0])
            if room <= 0:
                yield batch
                batch, room = [], _BATCH_CHARACTERS
    if batch:
        yield batch


def _pieces(document: str) -> Iterator[tuple[str, bool]]:
    start = 0
    while end := _PIECE_END.search(document, start + _PIECE_CHARACTERS):
        yield document[start : end.start()], False
        start = end.start()
    yield document[start:], True


def _byte_vocabulary() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's encoder.py)."""
    spans = ("!", "~"), ("¡", "¬"), ("®", "ÿ")
    printable = [byte for first, last in spans for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    return {characters[byte]: byte for byte in range(256)}


def _byte_level_json() -> dict[str, object]:
    """A tokenizer.json whose ids are bytes: byte-level BPE that never merges."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": _byte_vocabulary(),
            "merges": [],
        },
    }


def _is_byte_level(content: object) -> bool:
    """Whether a tokenizer.json is what `ByteTokenizer` saves, be it saved again by the library."""
    if not isinstance(content, Mapping) or not isinstance(model := content.get("model"), Mapping):
        return False
    more = model.get("merges") or content.get("added_tokens") or content.get("normalizer")
    return model.get("vocab") == _byte_vocabulary() and not more
