"""The user's own code: `file.py:name` or `package.module:name`, which returns a Workload or a GradientTarget."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import bptool
from bptool.config.target import CodeTarget
from bptool.errors import BptoolError, TargetError, nearest
from bptool.training.gradient_target import GradientTarget
from bptool.training.workload import Batch, Workload

# Frames of the interpreter, of libraries, and of bptool itself.
_NOT_THEIRS = ("<", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), bptool.__path__[0])


def load_workload(target: CodeTarget) -> Workload:
    """Import the target's file or module, and call the callable it names.

    This runs the user's code; it is called only for a target that the user typed.

    Raises:
        TargetError: it is not there, is not callable, returns no Workload, or raised; the user's own line is named.
    """
    workload = _made(target)
    if isinstance(workload, GradientTarget):
        raise TargetError(f"{target} gave a GradientTarget, which only gradcheck takes", f"bptool gradcheck {target}")
    if not isinstance(workload, Workload):
        raise TargetError(
            f"{target} gave {type(workload).__name__}, not a Workload",
            "return bptool.Workload(model=..., batch=..., loss=...) from it",
        )
    return replace(workload, model=_checked_model(target, workload), loss=_checked_loss(target, workload))


def load_gradient_target(target: CodeTarget) -> Workload | GradientTarget:
    """The same for a check of gradients, where the callable may return a GradientTarget too.

    Raises:
        TargetError: as `load_workload`.
    """
    made = _made(target)
    if not isinstance(made, Workload | GradientTarget):
        raise TargetError(
            f"{target} gave {type(made).__name__}, neither a GradientTarget nor a Workload",
            "return bptool.GradientTarget(function, inputs) from it",
        )
    return made


def _made(target: CodeTarget) -> Any:
    module = _run(target, lambda: _import(target.place))
    factory = getattr(module, target.name, None)
    if factory is None:
        public = [name for name in vars(module) if not name.startswith("_")]
        raise TargetError(
            f"{target.place} has no '{target.name}'{nearest(target.name, public)}",
            f"name a callable that returns a Workload: {target.place}:NAME",
        )
    return _run(target, factory) if callable(factory) else factory


@contextmanager
def users_errors(target: CodeTarget | None) -> Iterator[None]:
    """While the user's code runs: what it raises, in its own lines or through them, is theirs.

    Raises:
        TargetError: in place of an error whose traceback passes a file of the user's.
    """
    try:
        yield
    except BptoolError:
        raise
    except Exception as error:
        if target is None or not _own_frames(error):
            raise
        raise _their_error(target, error) from error


def _checked_model(target: CodeTarget, workload: Workload) -> Callable[[], nn.Module]:
    """The workload's model, refused where it is none."""
    given: Any = workload.model
    if isinstance(given, nn.Module) or not callable(given):
        raise TargetError(
            f"{target}: its model is {type(given).__name__}, not a function that builds one",
            "give the function: Workload(model=lambda: Net(...), ...)",
        )

    def model() -> nn.Module:
        built: Any = given()
        if not isinstance(built, nn.Module):
            raise TargetError(
                f"{target}: its model() gave {type(built).__name__}, not a torch.nn.Module",
                "return the module from it",
            )
        return built

    return model


def _checked_loss(target: CodeTarget, workload: Workload) -> Callable[[nn.Module, Batch], Tensor]:
    """The workload's loss, refused where a backward could not begin from it."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value: Any = workload.loss(model, batch)
        if not isinstance(value, Tensor) or value.dim() > 0:
            found = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise TargetError(f"{target}: its loss is {found}, not a scalar tensor", "return the mean over the batch")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise TargetError(
                f"{target}: its loss depends on no parameter that requires a gradient",
                "look for detach(), .data, item() or no_grad() on the way from the model to the loss",
            )
        return value

    return loss


def _import(place: Path | str) -> ModuleType:
    if isinstance(place, str):
        sys.path.insert(0, "")  # the user's own package in the current folder, as `python -m` finds it
        return importlib.import_module(place)
    name = f"{place.stem}_target" if place.stem in sys.modules else place.stem  # a user's file may be called json.py
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None, "the target has a .py file's name"
    assert spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look a module up by its name
    sys.path.insert(0, str(place.parent))  # files beside it, as `python FILE` finds them
    spec.loader.exec_module(module)
    return module


def _run(target: CodeTarget, call: Callable[[], Any]) -> Any:
    """The user's code; what it raises becomes an error that is theirs, with their line."""
    try:
        return call()
    except (Exception, SystemExit) as error:  # a script without a main guard may leave by itself
        raise _their_error(target, error) from error


def _their_error(target: CodeTarget, error: BaseException) -> TargetError:
    return TargetError(f"{target} raised {describe(error)}", "fix it there, then run again")


def describe(error: BaseException) -> str:
    """`ValueError: no such layer (my_model.py, line 12, in vit)`: the error and the last line of the user's own."""
    theirs = _own_frames(error)
    where = f" ({theirs[-1].filename}, line {theirs[-1].lineno}, in {theirs[-1].name})" if theirs else ""
    return f"{type(error).__name__}: {error}{where}"


def _own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    passed = traceback.extract_tb(error.__traceback__)
    return [frame for frame in passed if not frame.filename.startswith(_NOT_THEIRS)]
