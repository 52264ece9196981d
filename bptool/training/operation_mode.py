"""What sees every operation that runs while it is entered, below autograd."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode  # PyTorch's documented way to see every operation


class OperationMode(TorchDispatchMode):
    """A dispatch mode under which nothing is compiled: PyTorch's wrapper against that costs more than the mode."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """The wrapper is left out."""
        return False
