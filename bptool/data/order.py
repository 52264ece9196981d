"""The order in which a run sees its tokens: a pure function of the seed, without state and without replay.

A split of n tokens is cut into W windows; one window feeds one sequence of T tokens and, for the last
target, one token more. Sample s of a run is window p_e(s mod W) of epoch e = s div W, where p_e is a keyed
permutation of range(W), new in each epoch; all windows are shifted by less than 2T tokens, anew in each epoch
too, so that the cuts fall elsewhere. The permutation is a Feistel network on the cells of a table, made to
fit range(W) by cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): it costs no
memory, however many windows there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_ROUNDS = 6  # even, so that rows are rows again at the end


@dataclass(frozen=True)
class WindowOrder:
    """Windows of a split of `n_tokens`, in the order that `seed` gives; `n_tokens > sequence_length`."""

    n_tokens: int
    sequence_length: int
    seed: int

    @property
    def n_windows(self) -> int:
        """Windows in an epoch, the same in each; it leaves T to 2T - 1 tokens over, if there are 2T."""
        return max(1, self.n_tokens // self.sequence_length - 1)

    def starts(self, first: int, count: int) -> Integers:
        """First token of each of the samples `first`, ..., `first + count - 1` of the run, [count].

        Sample s covers the tokens start, ..., start + T, the last of them as a target only.
        """
        pieces: list[Integers] = []
        while count > 0:
            epoch, position = divmod(first, self.n_windows)
            in_epoch = min(count, self.n_windows - position)
            pieces.append(self._epoch_starts(epoch, position, in_epoch))
            first, count = first + in_epoch, count - in_epoch
        return np.concatenate(pieces)

    def _epoch_starts(self, epoch: int, position: int, count: int) -> Integers:
        entropy = np.random.SeedSequence(self.seed, spawn_key=(epoch,))
        keys = np.asarray(entropy.generate_state(_ROUNDS + 1, np.uint64), np.uint64)
        shift = int(keys[-1]) % (self.n_tokens - self.n_windows * self.sequence_length)
        windows = permuted(np.arange(position, position + count), self.n_windows, keys[:-1])
        return shift + windows * self.sequence_length


def permuted(positions: Integers, size: int, keys: Words) -> Integers:
    """Where a permutation of range(`size`) takes `positions`; `keys`, an even number, select it."""
    n_rows = max(8, math.isqrt(size - 1) + 1)
    n_columns = max(8, -(-size // n_rows))  # a table smaller than 8 x 8 would mix badly
    words = _feistel(positions.astype(np.uint64), n_rows, n_columns, keys)
    while (outside := words >= size).any():  # walk the cycle on until it is back in range
        words[outside] = _feistel(words[outside], n_rows, n_columns, keys)
    return words.astype(np.int64)


def _feistel(words: Words, n_rows: int, n_columns: int, keys: Words) -> Words:
    """A permutation of range(n_rows n_columns): each round adds to one coordinate a function of the other."""
    rows, columns = np.uint64(n_rows), np.uint64(n_columns)
    row, column = words // columns, words % columns
    for key in keys:
        row, column = column, (row + _mixed(column ^ key) % rows) % rows
        rows, columns = columns, rows
    return row * columns + column


def _mixed(words: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): each bit moves every bit of the output."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
