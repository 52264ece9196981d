"""Histograms of each parameter's gradient, as the optimizer is about to use it (after clipping)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from bptool.training.instrument import Instrument, Phase


class GradientHistograms(Instrument):
    """Hands every `every`-th step's gradients to `write(name, gradient, steps_done)`.

    Args:
        first_step: optimizer steps done before the first one that is seen.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int,
        first_step: int,
        write: Callable[[str, torch.Tensor, int], None],
    ) -> None:
        self._model = model
        self._every = every
        self._write = write
        self._step = first_step

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Look at the gradients where the optimizer begins."""
        return self._look() if name == "optimizer" else self._count(name)

    def _count(self, name: Phase) -> AbstractContextManager[None]:
        if name == "step":
            self._step += 1
        return nullcontext()

    @contextmanager
    def _look(self) -> Iterator[None]:
        if self._step % self._every == 0:
            for name, parameter in self._model.named_parameters():
                if parameter.grad is not None:
                    self._write(name, parameter.grad, self._step)
        yield
