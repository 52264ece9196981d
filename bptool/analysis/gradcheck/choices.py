"""A function that draws discrete choices, as the sum over all of them: each way it can go, and how likely that is.

`torch.multinomial` and `torch.bernoulli` (which `torch.distributions` draws with) are answered here in place of
PyTorch's generators. All other randomness is left to the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Chooser = Callable[[int, list[float]], int]
"""Of draw number n and its options' probabilities: the option to take."""


@dataclass(frozen=True)
class Path:
    """One way that a function went: the option taken at each draw, its probabilities, and what came of it.

    Attributes:
        probability: of all the draws together.
        value: what the function returned.
    """

    taken: tuple[int, ...]
    options: tuple[tuple[float, ...], ...]
    probability: float
    value: Tensor


class Draws(TorchFunctionMode):
    """Answers each draw with the option that a chooser names."""

    def __init__(self, choose: Chooser) -> None:
        super().__init__()
        self._choose = choose
        self.taken: list[int] = []
        self.options: list[list[float]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As PyTorch calls it for each function."""
        kwargs = kwargs or {}
        if func in (torch.multinomial, Tensor.multinomial):
            return self._multinomial(*args, **kwargs)
        if func in (torch.bernoulli, Tensor.bernoulli) and len(args) == 1 and "p" not in kwargs:
            return self._bernoulli(*args)
        return func(*args, **kwargs)

    def _multinomial(
        self, input: Tensor, num_samples: int, replacement: bool = False, *, generator: Any = None, out: Any = None
    ) -> Tensor:
        rows = input.detach().reshape(-1, input.shape[-1]).tolist()
        drawn = [self._row(row, num_samples, replacement) for row in rows]
        return torch.tensor(drawn, device=input.device).view(*input.shape[:-1], num_samples)

    def _row(self, weights: list[float], count: int, replacement: bool) -> list[int]:
        weights, drawn = list(weights), []
        for _ in range(count):
            total = math.fsum(weights)
            drawn.append(self._draw([weight / total for weight in weights]))
            if not replacement:
                weights[drawn[-1]] = 0.0
        return drawn

    def _bernoulli(self, input: Tensor) -> Tensor:
        drawn = [self._draw([1 - p, p]) for p in input.detach().flatten().tolist()]
        return torch.tensor(drawn, dtype=input.dtype, device=input.device).view(input.shape)

    def _draw(self, probabilities: list[float]) -> int:
        option = self._choose(len(self.taken), probabilities)
        self.taken.append(option)
        self.options.append(probabilities)
        return option

    def path(self, value: Tensor) -> Path:
        """What came of it."""
        likely = math.prod(options[option] for options, option in zip(self.options, self.taken, strict=True))
        return Path(tuple(self.taken), tuple(map(tuple, self.options)), likely, value)


def followed(run: Callable[[], Tensor], taken: Sequence[int]) -> Path:
    """The function along a given path; draws after its end take their first option that is possible."""

    def choose(number: int, probabilities: list[float]) -> int:
        if number < len(taken):
            return taken[number]
        return next(option for option, probability in enumerate(probabilities) if probability > 0)

    draws = Draws(choose)
    with draws:
        value = run()
    return draws.path(value)


def drawn(run: Callable[[], Tensor], generator: torch.Generator) -> Path:
    """The function along a path that is drawn from its own probabilities."""

    def choose(number: int, probabilities: list[float]) -> int:
        weights = torch.tensor(probabilities, dtype=torch.float64)
        return int(torch.multinomial(weights, 1, generator=generator))

    draws = Draws(choose)
    with draws:
        value = run()
    return draws.path(value)


def all_paths(run: Callable[[], Tensor]) -> Iterator[Path]:
    """Every path that is possible, depth first; a function without draws has one."""
    start: list[int] | None = []
    while start is not None:
        path = followed(run, start)
        yield path
        start = _next(path)


def _next(path: Path) -> list[int] | None:
    """Up to the last draw that has another possible option, with that option taken."""
    for last in range(len(path.taken) - 1, -1, -1):
        later = range(path.taken[last] + 1, len(path.options[last]))
        for option in later:
            if path.options[last][option] > 0:
                return [*path.taken[:last], option]
    return None
