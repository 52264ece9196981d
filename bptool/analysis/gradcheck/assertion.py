"""The check as a test's assertion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bptool.analysis.gradcheck.arguments import ModelLoss
from bptool.analysis.gradcheck.check import check_gradients, fresh_seed
from bptool.analysis.gradcheck.further import Trained, with_identities
from bptool.analysis.gradcheck.result import GradcheckResult
from bptool.analysis.gradcheck.workloads import affordable, workload_target
from bptool.config.schema import Config
from bptool.training.gradient_target import GradientTarget
from bptool.training.workload import Workload


def assert_gradients(
    target: GradientTarget | Workload | Callable[..., Any], inputs: Any = None, *, seed: int | None = None
) -> GradcheckResult:
    """Assert that every gradient of a module, a function or a Workload is right, as `bptool gradcheck` sees it.

    The identities of backpropagation must hold, too: a Workload's training step with the config's defaults, and
    PyTorch's own attention and cross-entropy in anything else.

    Args:
        target: a GradientTarget or a Workload; or a module or function, with its `inputs`.
        inputs: as `GradientTarget.inputs`.
        seed: of the random directions; None: a fresh one in every run, named in the message.

    Returns:
        The result, with a verdict on each tensor.

    Raises:
        AssertionError: a gradient is wrong, a probe or an identity fails; its message has the verdicts.
        TargetError: the target cannot be checked.
    """
    seed = fresh_seed() if seed is None else seed
    trained, cut = None, list[str]()
    if isinstance(target, Workload):
        workload, wanted, cut = affordable(target, workload_target(target, seed=seed))
        trained = Trained(Config(), workload, built_in=False, device=torch.device("cpu"))
    elif isinstance(target, GradientTarget):
        wanted = target
    else:
        wanted = GradientTarget(target, () if inputs is None else inputs)
    result = check_gradients(wanted, seed=seed, name=_name(wanted.function), sizes_cut=cut)
    result = with_identities(result, trained or wanted)
    if not result.passed:
        raise AssertionError(message(result))
    return result


def message(result: GradcheckResult) -> str:
    """The verdicts that are not right, each with its figures."""
    lines = [f"gradients of {result.target}: {', '.join(result.failures())}"]
    for tensor in result.tensors:
        if tensor.verdict != "right":
            lines.append(f"  {tensor.name} {tensor.shape}: {tensor.verdict}{_figures(tensor)}")
    lines += [f"  identity {one.name}: {one.detail}" for one in result.identities if not one.holds]
    lines += [f"  probe {one.name}: {one.detail}" for one in result.probes if not one.holds]
    return "\n".join([*lines, f"  again: assert_gradients(..., seed={result.seed})"])


def _figures(tensor: Any) -> str:
    parts = []
    if tensor.relative_error is not None:
        parts.append(f"relative error {tensor.relative_error:.2e}")
    if tensor.location:
        parts.append(f"at {tensor.location}")
    if tensor.cut_by:
        parts.append(f"cut by {tensor.cut_by}")
    if tensor.detail:
        parts.append(tensor.detail)
    return f": {', '.join(parts)}" if parts else ""


def _name(function: Callable[..., Any]) -> str:
    if isinstance(function, nn.Module):
        return type(function).__name__
    if isinstance(function, ModelLoss):
        return f"the loss of {type(function.model).__name__}"
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "the function")
    return f"{owner.__name__}.{name}" if isinstance(owner, type) else name
