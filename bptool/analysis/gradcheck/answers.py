"""What a command line asks to be checked, and the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch

from bptool.analysis.gradcheck.check import examine, fresh_seed
from bptool.analysis.gradcheck.further import Trained, with_identities, with_mutations, with_precision
from bptool.analysis.gradcheck.result import GradcheckResult
from bptool.analysis.gradcheck.shrink import shrunk
from bptool.analysis.gradcheck.workloads import affordable, workload_target
from bptool.config.asked import Asked, read_command_line
from bptool.config.schema import PrecisionSettings
from bptool.errors import OutOfMemory, UsageError, nearest
from bptool.hardware import resolve_device, tune_cpu_allocator
from bptool.training.gradient_target import GradientTarget
from bptool.training.seeds import derive_seed
from bptool.training.user_code import load_gradient_target, users_errors
from bptool.training.workload import transformer_workload

LONG_S = 30.0
"""Whoever waits longer is told so before it begins."""


@dataclass(frozen=True)
class Wanted:
    """What is asked for beside a verdict on each tensor.

    Attributes:
        precision: a format of `precision.mode` whose gradients are compared with float64's.
        mutate: whether known bugs are put into the target's backward, to see which the check catches.
    """

    precision: str | None = None
    mutate: bool = False

    def passes(self, *, step: bool) -> int:
        """Forwards and backwards that this takes beside the check, about.

        Args:
            step: whether there is a training step, whose identities are checked.
        """
        return (25 if step else 0) + (100 if self.mutate else 0)


@dataclass(frozen=True)
class Listener:
    """Who waits for the answer.

    Attributes:
        expected: told, where it takes long, how long it will: seconds in all, and of one forward and backward.
        tried: told how many of the known bugs were tried, of how many.
    """

    expected: Callable[[float, float], None] = lambda all_s, pass_s: None
    tried: Callable[[int, int], None] = lambda done, of: None


@dataclass(frozen=True)
class _Checked:
    """What is checked, and as what: a training step's loss, or the user's function alone."""

    words: str
    settings: tuple[str, ...]
    trained: Trained | None
    target: GradientTarget
    sizes_cut: list[str]
    notes: tuple[str, ...]


def answer(
    target_text: str | None,
    overrides: Sequence[str],
    wanted: Wanted,
    *,
    seed: int | None = None,
    listener: Listener | None = None,
) -> GradcheckResult:
    """Check the target's gradients, and the identities of backpropagation in it.

    Args:
        seed: of the directions; None: a fresh one.
        listener: is told what there is to wait for.

    Raises:
        UsageError: the command line or the config is wrong, or the target cannot be checked.
        DeviceError: the device cannot do that format.
        OutOfMemory: the target does not fit, in float64.
    """
    _known(wanted.precision)
    command_line = read_command_line(target_text, overrides, command="gradcheck")
    listener = listener or Listener()
    seed = fresh_seed() if seed is None else seed
    tune_cpu_allocator()
    torch.manual_seed(derive_seed(seed, "target"))  # sample inputs are a function of the seed, as the directions are
    with users_errors(command_line.code), _memory_errors(command_line.words):
        asked = _checked(command_line, seed)
        if wanted.precision is not None and asked.trained is None:
            raise UsageError(
                f"--precision {wanted.precision} compares training steps, and {asked.words} is a function without one",
                "give it a TARGET that returns a Workload",
            )
        more = wanted.passes(step=asked.trained is not None)

        def expected(pass_s: float, passes: int) -> None:
            if (passes + more) * pass_s > LONG_S:
                listener.expected((passes + more) * pass_s, pass_s)

        examined = examine(
            asked.target,
            seed=seed,
            name=asked.words,
            settings=asked.settings,
            sizes_cut=asked.sizes_cut,
            expected=expected,
        )
        told = examined.result.model_copy(update={"assumptions": [*asked.notes, *examined.result.assumptions]})
        result = with_identities(told, asked.trained or asked.target)
        if wanted.precision is not None and asked.trained is not None:
            result = with_precision(result, asked.trained, wanted.precision)
        return with_mutations(result, examined, listener.tried) if wanted.mutate else result


def _checked(found: Asked, seed: int) -> _Checked:
    config = found.config
    device = resolve_device(config.training.device)
    if found.code is None:
        config, sizes_cut = shrunk(config)
        workload = transformer_workload(config)
        target = workload_target(transformer_workload(config), seed=config.run.seed, device=device)
    else:
        made = load_gradient_target(found.code)
        if isinstance(made, GradientTarget):
            if found.overrides:
                raise UsageError(
                    f"{found.words} is a function, in which {', '.join(found.overrides)} changes nothing",
                    f"leave it out: bptool gradcheck {found.words}",
                )
            return _Checked(found.words, found.overrides, None, made, [], found.notes)
        workload, target, sizes_cut = affordable(made, workload_target(made, seed=seed, device=device))
    trained = Trained(config, workload, found.code is None, device)
    return _Checked(found.words, found.overrides, trained, target, sizes_cut, found.notes)


def _known(precision: str | None) -> None:
    modes = get_args(PrecisionSettings.model_fields["mode"].annotation)
    if precision is not None and precision not in modes:
        raise UsageError(
            f"--precision {precision} is no format{nearest(precision, modes)}", f"choose one of {', '.join(modes)}"
        )


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
