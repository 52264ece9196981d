"""Blocks that are compiled, each with what it computes again inside of it.

PyTorch's compiler splits what it is given into a forward and a backward, and has the backward compute again what is
tagged so. Outside of what is compiled, recomputation would run the whole forward once more, with nothing fused into the
backward, and could save no result of a single operation.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bptool.config.block_plan import parse_plan
from bptool.config.schema import Config
from bptool.errors import DeviceError
from bptool.training.selective import Chooser, Operator, nature, selective_contexts

_VARIANTS = 64
"""How often the compiler may compile one function before it runs it as it is: once for each kind of block and for what
each of them saves, and without gradients. Its own limit is 8, which a budget's plan for two kinds may exceed."""
_ADVICE = "Detected that context_fn is passed"
"""How a warning begins against writing in place in recomputed regions. The graph that is split into forward and
backward is functional: an operation in place is another one by then, with the same choice."""


def compile_blocks(modules: Sequence[nn.Module], device: torch.device) -> None:
    """Compile each module's forward on the instance: equal ones compile once, and names stay the plain model's.

    Raises:
        DeviceError: there is no compiler.
    """
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise DeviceError(
            "training.compile needs a C++ compiler on a CPU, and there is none",
            "install g++, name another in CXX, or leave training.compile=false",
        )
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_news)
    for module in modules:
        module.forward = torch.compile(module.forward)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)


def recomputes_unseen(config: Config) -> bool:
    """Whether there is recomputation that is no phase of its own, being compiled into the backward."""
    settings = config.activation_checkpoint
    policies = parse_plan(settings.plan) if settings.policy == "plan" else [settings.policy]
    return config.training.compile and not {"none", "offload"}.issuperset(policies)


def recompute_compiled(module: nn.Module, chooser: Callable[[], Chooser] | None) -> None:
    """Have the module's backward compute it again, as a part of what is then compiled, but for what is chosen.

    No phase is announced: the backward does it among its own work (`recomputes_unseen`).
    """
    forward = module.forward
    if isinstance(forward, MethodType) and forward.__self__ is module:
        module.forward = MethodType(_recomputing_method(forward.__func__, chooser), module)
    else:
        module.forward = _recomputing(forward, chooser)


@cache
def _recomputing_method(function: Callable[..., Any], chooser: Callable[[], Chooser] | None) -> Callable[..., Any]:
    """One for all modules of a class, so that they are compiled once."""
    return _recomputing(function, chooser)


def _recomputing(function: Callable[..., Any], chooser: Callable[[], Chooser] | None) -> Callable[..., Any]:
    choosing: dict[str, Any] = {} if chooser is None else {"context_fn": partial(_contexts, chooser)}

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # compiled once for all, whatever they save
            return function(*args, **kwargs)
        return checkpoint(function, *args, use_reentrant=False, **choosing, **kwargs)

    return run


def _contexts(make: Callable[[], Chooser]) -> Any:
    """PyTorch's own, as its compiler takes no others; where it leaves a block to Python, those of any such block."""
    if not _is_traced():
        return selective_contexts(make)
    chooser = make()

    def policy(context: Any, func: Operator, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = nature(func).counts and chooser(func)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _is_traced() -> bool:
    """Whether a graph is made. PyTorch's checkpoint asks so too, as `torch.compiler.is_compiling` says no in 2.11."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None


def _is_news(record: logging.LogRecord) -> bool:
    return _ADVICE not in str(record.msg)
