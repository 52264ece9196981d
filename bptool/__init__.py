"""bptool: see, predict, check and choose what backpropagation costs when you train a transformer.

The names below are the public face; they are imported when first used, so `import bptool` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bptool.analysis.gradcheck.assertion import assert_gradients
    from bptool.model.estimators import score_function, straight_through
    from bptool.training.gradient_target import GradientTarget
    from bptool.training.workload import Workload

__version__ = "0.1.0"
__all__ = ["GradientTarget", "Workload", "__version__", "assert_gradients", "score_function", "straight_through"]

_HOMES = {
    "GradientTarget": "bptool.training.gradient_target",
    "Workload": "bptool.training.workload",
    "assert_gradients": "bptool.analysis.gradcheck.assertion",
    "score_function": "bptool.model.estimators",
    "straight_through": "bptool.model.estimators",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bptool' has no attribute '{name}'")
