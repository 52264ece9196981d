"""The batch order: bijections, epochs and purity, by counting."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from bptool.data.order import WindowOrder, permuted


def keys(seed: int) -> npt.NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(0, 2**64, 6, np.uint64)


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_permutation_is_a_bijection(size: int, seed: int) -> None:
    assert sorted(permuted(np.arange(size), size, keys(seed))) == list(range(size))


@given(size=st.integers(2**32, 2**50), seed=st.integers(0, 2**32), data=st.data())
def test_permutation_of_a_huge_range_has_no_collision(size: int, seed: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=50, unique=True))
    images = permuted(np.array(positions), size, keys(seed))
    assert len(set(images.tolist())) == len(positions)
    assert images.min() >= 0
    assert images.max() < size


def test_permutation_does_not_depend_on_what_else_is_asked() -> None:
    whole = permuted(np.arange(1000), 1000, keys(1))
    assert [int(permuted(np.array([i]), 1000, keys(1))[0]) for i in range(0, 1000, 77)] == whole[::77].tolist()


def test_permutations_of_four_come_equally_often() -> None:
    """Chi-square of the 24 permutations over 720 keys: with 23 degrees of freedom, 49.7 is 1 in 1000."""
    counts = Counter(tuple(permuted(np.arange(4), 4, keys(seed)).tolist()) for seed in range(720))
    chi_square = sum((count - 30) ** 2 / 30 for count in counts.values()) + 30 * (24 - len(counts))
    assert chi_square < 49.7


def test_neighbours_are_torn_apart() -> None:
    """The rank correlation of a random permutation of n is about 1/sqrt(n)."""
    for seed in range(20):
        images = permuted(np.arange(10_000), 10_000, keys(seed))
        for lag in (1, 2, 64):
            assert abs(np.corrcoef(images[:-lag], images[lag:])[0, 1]) < 0.05


@given(length=st.integers(1, 40), extra=st.integers(1, 400), seed=st.integers(0, 2**80), epoch=st.integers(0, 50))
def test_each_window_once_an_epoch(length: int, extra: int, seed: int, epoch: int) -> None:
    order = WindowOrder(length + extra, length, seed)
    starts = order.starts(epoch * order.n_windows, order.n_windows)
    gaps = np.diff(np.sort(starts))
    assert (gaps == length).all()  # a grid: none twice, none left out
    assert starts.min() >= 0
    assert starts.max() + length <= length + extra - 1  # the last target is a token of the split
    assert (order.n_windows + 2) * length > length + extra - 1  # less than two windows are lost


@given(first=st.integers(0, 100), count=st.integers(1, 100), cut=st.integers(0, 100))
def test_samples_are_a_function_of_their_number(first: int, count: int, cut: int) -> None:
    order = WindowOrder(31 * 8 + 3, 8, 5)  # thirty windows, so these run into other epochs
    cut = min(cut, count - 1)
    apart = [
        order.starts(first, cut).tolist() if cut else [],
        order.starts(first + cut, count - cut).tolist(),
    ]
    assert order.starts(first, count).tolist() == apart[0] + apart[1]


def test_epochs_and_seeds_differ_in_order_and_in_grid() -> None:
    order = WindowOrder(100 * 64, 64, 0)
    epochs = [order.starts(epoch * order.n_windows, order.n_windows) for epoch in range(30)]
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 30
    shifts = {int(epoch.min()) for epoch in epochs}
    assert len(shifts) > 10
    assert max(shifts) < 2 * 64
    assert not np.array_equal(epochs[0], WindowOrder(100 * 64, 64, 1).starts(0, order.n_windows))
