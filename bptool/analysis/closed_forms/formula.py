"""Numbers of bytes that keep the formula they come from: the text and the number cannot drift apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

Factors = tuple[tuple[str, int], ...]
"""Symbols with their values."""


@dataclass(frozen=True)
class Amount:
    """A sum of products: each so many bytes times its factors, in the order in which a person would write them."""

    products: tuple[tuple[int, Factors], ...] = ()

    @property
    def n_bytes(self) -> int:
        """Its value."""
        return sum(each * prod(value for _, value in factors) for each, factors in self.products)

    @property
    def symbols(self) -> str:
        """`2·b·s·h`."""
        return " + ".join("·".join([str(each), *(s for s, _ in factors)]) for each, factors in self.products) or "0"

    @property
    def formula(self) -> str:
        """As a person writes it, with the numbers put in: `4·P = 4·124,439,808`."""
        numbers = ["·".join([str(each), *(f"{value:,}" for _, value in factors)]) for each, factors in self.products]
        written = " + ".join(numbers) or "0"
        return written if written == self.symbols else f"{self.symbols} = {written}"

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.products + other.products)

    def __mul__(self, times: tuple[str, int]) -> Amount:
        """Each product with one more factor."""
        return Amount(tuple((each, (times, *factors)) for each, factors in self.products))


def amount(each: int, **factors: int) -> Amount:
    """So many bytes times each of the named factors; `s_2` is written `s`, for a square."""
    return Amount(((each, tuple((name.partition("_")[0], value) for name, value in factors.items())),))


def total(amounts: Iterable[Amount]) -> Amount:
    """Their sum, with products of the same factors as one; of nothing it is 0."""
    sums: Counter[Factors] = Counter()
    for one in amounts:
        for each, factors in one.products:
            sums[factors] += each
    return Amount(tuple((each, factors) for factors, each in sums.items()))
