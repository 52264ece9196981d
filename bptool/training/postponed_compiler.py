"""PyTorch's compiler front end, `torch._dynamo`, loaded when something of it is used.

`FakeTensorMode`, every optimizer's step and activation checkpointing import it, for its settings and for functions that
do nothing where nothing is compiled (PyTorch's _subclasses/fake_tensor.py, optim/optimizer.py, utils/checkpoint.py,
_compile.py). Loading it takes about a second, of the five of a prediction.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_NAME = "torch._dynamo"
_SETTINGS = f"{_NAME}.config"  # a module that needs nothing of the others
_PLACEHOLDERS = ("asked", "disable", "graph_break")
_lock = threading.RLock()


def postpone_compiler() -> None:
    """From now on `import torch._dynamo` loads its settings alone, and the rest at the first use of anything else.

    Nothing is replaced for good: the first other attribute or submodule that is asked for, such as by `torch.compile`,
    loads the package into the same module. Where it is loaded already, nothing happens.
    """
    if _NAME not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the package without executing it, and executes it before its submodules but the settings."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == _NAME:
            spec = PathFinder.find_spec(fullname, path)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
            return spec
        if fullname.startswith(f"{_NAME}.") and fullname != _SETTINGS:
            _load(sys.modules[_NAME])
        return None


class _Loader(importlib.abc.Loader):
    """Makes the package's module, and leaves it empty.

    Args:
        real: what would fill it.
    """

    def __init__(self, real: importlib.abc.Loader) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Postponed(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Postponed(ModuleType):
    """The package before it is loaded, with what PyTorch calls of it where nothing is compiled."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.asked: list[Any] = []
        self.disable, self.graph_break = self._disable, lambda *args, **kwargs: None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself asks of any module
            raise AttributeError(f"module '{_NAME}' has no attribute '{name}'")
        if f"{_NAME}.{name}" == _SETTINGS:  # activation checkpointing takes them for imported
            return importlib.import_module(_SETTINGS)
        _load(self)
        return getattr(self, name)

    def _disable(self, fn: Any = None, recursive: bool = True, *, wrapping: bool = True, **more: Any) -> Any:
        """PyTorch's own functions are called as they are, and those that it has lent a decorator (`wrapping=False`).

        Anybody else's may be met by a compiler later.
        """
        if wrapping and not str(getattr(fn, "__module__", "")).startswith("torch."):
            _load(self)
            return vars(self)["disable"](fn, recursive, **more)
        self.asked.append(fn)
        return fn


def _load(module: ModuleType) -> None:
    """Execute the package in its own module."""
    with _lock:
        if not isinstance(module, _Postponed):
            return
        for fn in module.asked:
            vars(fn).pop("__dynamo_disable", None)  # where `_compile.py` keeps our answer; it asks again
        for name in _PLACEHOLDERS:
            delattr(module, name)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        module.__class__ = ModuleType  # type: ignore[assignment]
        spec = module.__spec__
        assert spec is not None
        assert isinstance(spec.loader, _Loader)
        spec.loader = module.__loader__ = spec.loader.real
        spec.loader.exec_module(module)
