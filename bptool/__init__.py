"""bptool: see, predict, check and choose what backpropagation costs when you train a transformer.

The names below are the public face; they are imported when first used, so `import bptool` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bptool.training.workload import Workload

__version__ = "0.1.0"
__all__ = ["Workload", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Workload":
        from bptool.training.workload import Workload

        return Workload
    raise AttributeError(f"module 'bptool' has no attribute '{name}'")
