"""What a command line asks to be checked, and the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch

from bptool.analysis.gradcheck.check import check_gradients, fresh_seed
from bptool.analysis.gradcheck.identities.check import check_identities, observed_identities
from bptool.analysis.gradcheck.identities.identity import Identities
from bptool.analysis.gradcheck.precision import check_precision
from bptool.analysis.gradcheck.result import GradcheckResult
from bptool.analysis.gradcheck.shrink import shrunk
from bptool.analysis.gradcheck.subject import Subject
from bptool.analysis.gradcheck.workloads import workload_target
from bptool.config.asked import Asked, read_command_line
from bptool.config.schema import Config, PrecisionSettings
from bptool.errors import OutOfMemory, UsageError, nearest
from bptool.hardware import resolve_device
from bptool.training.gradient_target import GradientTarget
from bptool.training.seeds import derive_seed
from bptool.training.user_code import load_gradient_target, users_errors
from bptool.training.workload import Workload, transformer_workload


@dataclass(frozen=True)
class _Checked:
    """What is checked, and as what: a workload's loss, or the user's function alone."""

    words: str
    settings: tuple[str, ...]
    config: Config
    built_in: bool
    workload: Workload | None
    target: GradientTarget
    device: torch.device
    sizes_cut: list[str]
    notes: tuple[str, ...]


def answer(
    target_text: str | None, overrides: Sequence[str], *, seed: int | None = None, precision: str | None = None
) -> GradcheckResult:
    """Check the target's gradients, and the identities of backpropagation in it.

    Args:
        seed: of the directions; None: a fresh one.
        precision: a format of `precision.mode` whose gradients are compared with float64's, too.

    Raises:
        UsageError: the command line or the config is wrong, or the target cannot be checked.
        DeviceError: the device cannot do that format.
        OutOfMemory: the target does not fit, in float64.
    """
    _known(precision)
    command_line = read_command_line(target_text, overrides, command="gradcheck")
    seed = fresh_seed() if seed is None else seed
    torch.manual_seed(derive_seed(seed, "target"))  # sample inputs are a function of the seed, as the directions are
    with users_errors(command_line.code), _memory_errors(command_line.words):
        asked = _checked(command_line, seed)
        if precision is not None and asked.workload is None:
            raise UsageError(
                f"--precision {precision} compares training steps, and {asked.words} is a function without one",
                "give it a TARGET that returns a Workload",
            )
        result = check_gradients(
            asked.target, seed=seed, name=asked.words, settings=asked.settings, sizes_cut=asked.sizes_cut
        )
        return _with_model_checks(result, asked, precision)


def _checked(found: Asked, seed: int) -> _Checked:
    config, sizes_cut = found.config, list[str]()
    device = resolve_device(config.training.device)
    if found.code is None:
        config, sizes_cut = shrunk(config)
        workload: Workload | None = transformer_workload(config)
        target = workload_target(transformer_workload(config), seed=config.run.seed, device=device)
    else:
        made = load_gradient_target(found.code)
        workload = None if isinstance(made, GradientTarget) else made
        target = made if isinstance(made, GradientTarget) else workload_target(made, seed=seed, device=device)
    return _Checked(
        found.words, found.overrides, config, found.code is None, workload, target, device, sizes_cut, found.notes
    )


def _with_model_checks(result: GradcheckResult, asked: _Checked, precision: str | None) -> GradcheckResult:
    """The identities of what the target has, and its gradients in another format."""
    found = _identities(asked, result.seed)
    formats = None
    if precision is not None and asked.workload is not None:
        formats = check_precision(
            asked.config, asked.workload, precision, built_in=asked.built_in, seed=result.seed, device=asked.device
        )
    return result.model_copy(
        update={
            "identities": found.identities,
            "assumptions": [*asked.notes, *result.assumptions, *found.left_out],
            "precision": formats,
            "passed": result.passed and all(identity.holds for identity in found.identities),
        }
    )


def _identities(asked: _Checked, seed: int) -> Identities:
    if asked.workload is None:
        subject = Subject(asked.target, seed=seed)
        if not any(output.requires_grad for output in subject.outputs()):
            return Identities(identities=[], left_out=[])
        observed = observed_identities(lambda: subject.scalar(subject.outputs()))
        return Identities(identities=observed, left_out=[])
    return check_identities(asked.config, asked.workload, built_in=asked.built_in, seed=seed, device=asked.device)


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
