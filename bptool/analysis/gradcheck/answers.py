"""What a command line asks to be checked, and the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from bptool.analysis.gradcheck.check import check_gradients, fresh_seed
from bptool.analysis.gradcheck.result import GradcheckResult
from bptool.analysis.gradcheck.shrink import shrunk
from bptool.analysis.gradcheck.workloads import workload_target
from bptool.config.asked import read_command_line
from bptool.errors import OutOfMemory
from bptool.hardware import resolve_device
from bptool.training.gradient_target import GradientTarget
from bptool.training.seeds import derive_seed
from bptool.training.user_code import load_gradient_target, users_errors
from bptool.training.workload import transformer_workload


def answer(target_text: str | None, overrides: Sequence[str], *, seed: int | None = None) -> GradcheckResult:
    """Check the target's gradients.

    Args:
        seed: of the directions; None: a fresh one.

    Raises:
        UsageError: the command line or the config is wrong, or the target cannot be checked.
        OutOfMemory: the target does not fit, in float64.
    """
    asked = read_command_line(target_text, overrides, command="gradcheck")
    seed = fresh_seed() if seed is None else seed
    sizes_cut: list[str] = []
    device = resolve_device(asked.config.training.device)
    torch.manual_seed(derive_seed(seed, "target"))  # sample inputs are a function of the seed, as the directions are
    with users_errors(asked.code):
        if asked.code is None:
            small, sizes_cut = shrunk(asked.config)
            target = workload_target(transformer_workload(small), seed=small.run.seed, device=device)
        else:
            made = load_gradient_target(asked.code)
            with _memory_errors(asked.words):
                target = made if isinstance(made, GradientTarget) else workload_target(made, seed=seed, device=device)
        with _memory_errors(asked.words):
            return check_gradients(target, seed=seed, name=asked.words, settings=asked.overrides, sizes_cut=sizes_cut)


@contextmanager
def _memory_errors(words: str) -> Iterator[None]:
    """PyTorch's ways to say that memory is exhausted; on a CPU it is a RuntimeError like any other."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not known:
            raise
        raise OutOfMemory(
            f"{words} does not fit into memory in float64, which takes twice what float32 does",
            "check a smaller model of the same kind, or fewer sequences: the formulas are the same",
        ) from error
