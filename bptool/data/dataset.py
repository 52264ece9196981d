"""From `[data]` to token arrays: one stream of ids, its head to train on, its tail held out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bptool.config.schema import BPE, BYTES, DataSettings
from bptool.data.corpus import read_corpus
from bptool.data.files import existing
from bptool.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from bptool.errors import DataError
from bptool.interop.token_files import Tokens, read_token_file
from bptool.units import format_count

_CHUNK_TOKENS = 2**20
_LOOKED_AT_TOKENS = 2**26


@dataclass(frozen=True, eq=False)
class Dataset:
    """What a run learns from.

    Attributes:
        train: ids, [n_tokens] uint8, uint16 or uint32; those of a token file are memory-mapped and read-only.
        validation: ids that follow them in the stream, never trained on.
        tokenizer: what turns ids into text; none for a token file.
        description: one line for people.
    """

    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer | None
    description: str

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of dtype, lengths and ids of both splits.

        Of a split beyond 2^26 tokens it sees the length and 64 evenly spaced chunks of 2^20, head and tail
        among them.
        """
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            digest.update(f"{split.dtype.str} {len(split)};".encode())
            for chunk in _sampled_chunks(split):
                digest.update(chunk.data)
        return digest.hexdigest()

    @cached_property
    def unigram_entropy(self) -> float:
        """Entropy of the train split's token frequencies, -sum p ln p, in nats per token.

        The least loss of a model that looks at no context. Beyond 2^26 tokens it is that of the chunks which
        the fingerprint sees.
        """
        counts = np.zeros(0, np.int64)
        for chunk in _sampled_chunks(self.train):
            more = np.bincount(chunk, minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
        p = counts[counts > 0] / counts.sum()
        return max(0.0, -float(np.sum(p * np.log(p))))


def open_dataset(
    settings: DataSettings, *, vocab_size: int, sequence_length: int, tokenizer_file: Path | None = None
) -> Dataset:
    """Read, encode and split what `settings` name.

    Args:
        settings: source, tokenizer and the share that is held out.
        vocab_size: ids that the model knows.
        sequence_length: T; each split needs T + 1 tokens at least.
        tokenizer_file: the run's own tokenizer.json; where it exists, `bpe` is read from it, not trained.

    Raises:
        DataError: a text, token file or tokenizer is missing, malformed, too short, or beyond the vocabulary.
        StorageError: a file cannot be read.
    """
    if settings.source.endswith(".bin"):
        tokens, tokenizer, description = _from_token_file(settings.source, vocab_size)
    else:
        tokens, tokenizer, description = _from_text(settings, vocab_size, tokenizer_file)
    n_train = len(tokens) - int(len(tokens) * settings.validation_fraction)
    _check_lengths(settings, n_train, len(tokens) - n_train, sequence_length)
    return Dataset(tokens[:n_train], tokens[n_train:], tokenizer, description)


def _from_token_file(source: str, vocab_size: int) -> tuple[Tokens, None, str]:
    path = existing(Path(source), "data.source")
    opened = read_token_file(path, vocab_size=vocab_size)
    n_tokens = format_count(len(opened.tokens))
    return opened.tokens, None, f"{path.name}, {n_tokens} tokens ({opened.format.name})"


def _from_text(settings: DataSettings, vocab_size: int, tokenizer_file: Path | None) -> tuple[Tokens, Tokenizer, str]:
    corpus = read_corpus(settings.source)
    tokenizer = _tokenizer(settings.tokenizer, corpus.documents, vocab_size, tokenizer_file)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"model.vocab_size = {vocab_size} is smaller than the {tokenizer.vocab_size} ids of "
            f"data.tokenizer = '{settings.tokenizer}'",
            f"model.vocab_size={tokenizer.vocab_size}",
        )
    tokens = tokenizer.encode_documents(corpus.documents)
    return tokens, tokenizer, f"{corpus.description}, as {tokenizer.description}"


def _tokenizer(name: str, documents: tuple[str, ...], vocab_size: int, saved: Path | None) -> Tokenizer:
    if name == BYTES:
        return ByteTokenizer()
    if name != BPE:
        return load_tokenizer(Path(name))
    if saved is not None and saved.exists():
        return load_tokenizer(saved)
    return BpeTokenizer.train(documents, vocab_size)


def _check_lengths(settings: DataSettings, n_train: int, n_validation: int, sequence_length: int) -> None:
    needed = sequence_length + 1
    shorter = min(n_train, n_validation)
    if shorter >= needed:
        return
    total = n_train + n_validation
    remedies = []
    if total >= 2 * needed:
        fraction = min(0.5, (1000 * needed // total + 1) / 1000)
        remedies.append(f"data.validation_fraction={fraction}")
    if shorter > 1:
        remedies.append(f"training.sequence_length={shorter - 1}")
    enough = math.floor(needed / min(settings.validation_fraction, 1 - settings.validation_fraction)) + 1
    remedies.append(f"more text ({enough} tokens are enough)")
    raise DataError(
        f"data.source = '{settings.source}' gives {total} tokens: {n_train} to train on, {n_validation} held "
        f"out; each split needs at least {needed} (training.sequence_length + 1)",
        ", or ".join(remedies),
    )


def _sampled_chunks(tokens: Tokens) -> Iterator[Tokens]:
    """All of `tokens` in chunks, or 64 evenly spaced chunks of more than can be read in a moment."""
    if len(tokens) <= _LOOKED_AT_TOKENS:
        starts = np.arange(0, len(tokens), _CHUNK_TOKENS)
    else:
        n_chunks = _LOOKED_AT_TOKENS // _CHUNK_TOKENS
        starts = np.linspace(0, len(tokens) - _CHUNK_TOKENS, n_chunks).astype(np.int64)
    for start in starts:
        yield tokens[start : start + _CHUNK_TOKENS]
