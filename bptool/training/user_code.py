"""The user's own code: `file.py:name` or `package.module:name`, a callable that returns a Workload."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from bptool.config.target import CodeTarget
from bptool.errors import TargetError, nearest
from bptool.training.workload import Workload


def load_workload(target: CodeTarget) -> Workload:
    """Import the target's file or module, and call the callable it names.

    This runs the user's code; it is called only for a target that the user typed.

    Raises:
        TargetError: it is not there, is not callable, returns no Workload, or raised; the user's own line is named.
    """
    module = _run(target, lambda: _import(target.place))
    factory = getattr(module, target.name, None)
    if factory is None:
        public = [name for name in vars(module) if not name.startswith("_")]
        raise TargetError(
            f"{target.place} has no '{target.name}'{nearest(target.name, public)}",
            f"name a callable that returns a Workload: {target.place}:NAME",
        )
    workload = _run(target, factory) if callable(factory) else factory
    if not isinstance(workload, Workload):
        raise TargetError(
            f"{target} gave {type(workload).__name__}, not a Workload",
            "return bptool.Workload(model=..., batch=..., loss=...) from it",
        )
    return workload


def _import(place: Path | str) -> ModuleType:
    if isinstance(place, str):
        sys.path.insert(0, "")  # the user's own package in the current folder, as `python -m` finds it
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(place.stem, place)
    assert spec is not None, "the target has a .py file's name"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[place.stem] = module  # dataclasses and pickling look a module up by its name
    sys.path.insert(0, str(place.parent))  # files beside it, as `python FILE` finds them
    spec.loader.exec_module(module)
    return module


def _run(target: CodeTarget, call: Callable[[], Any]) -> Any:
    """The user's code; what it raises becomes an error that is theirs, with their line."""
    try:
        return call()
    except Exception as error:
        raise TargetError(f"{target} raised {describe(error)}", "fix it there, then run again") from error


def describe(error: BaseException) -> str:
    """`ValueError: no such layer (my_model.py, line 12, in vit)`: the error and the last line it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
