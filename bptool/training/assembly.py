"""From a config and a workload to a training step that is ready to run; and its state, out and in again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from bptool.config.schema import Config
from bptool.errors import ResumeError
from bptool.training import activation_checkpoint
from bptool.training.activation_checkpoint import announced
from bptool.training.checkpoint import Checkpoint
from bptool.training.compiling import compile_blocks, recompute_compiled
from bptool.training.instrument import Announcer
from bptool.training.optimizers import build_optimizers
from bptool.training.postponed_compiler import postpone_compiler
from bptool.training.precision import Precision
from bptool.training.schedule import learning_rate
from bptool.training.seeds import derive_seed
from bptool.training.step import TrainStep
from bptool.training.workload import Workload


def build_step(config: Config, workload: Workload, device: torch.device, announcer: Announcer) -> TrainStep:
    """Build the model on `device` and everything that its step needs, as `config` asks.

    Raises:
        DeviceError: the device, or the compiler that `training.compile` needs, cannot do this.
        ConfigError: the optimizer cannot do this.
    """
    keeps_casts = activation_checkpoint.keeps_casts(config.activation_checkpoint)
    precision = Precision(config.precision, device, keeps_casts=keeps_casts)
    torch.manual_seed(derive_seed(config.run.seed, "weights"))
    model = build_model(workload, device, precision.parameter_dtype)
    blocks = workload.blocks(model)
    if config.training.compile:
        activation_checkpoint.apply(blocks, config.activation_checkpoint, recompute_compiled)
        compile_blocks(blocks or [model], device)
    else:
        activation_checkpoint.apply(blocks, config.activation_checkpoint, announced(announcer))
    activation_checkpoint.apply_offload(blocks, config.activation_checkpoint)
    rate = partial(
        learning_rate,
        peak=config.optimizer.lr,
        total_steps=config.training.steps,
        schedule=config.schedule,
    )
    return TrainStep(
        model=model,
        workload=workload,
        optimizers=build_optimizers(model, blocks, config.optimizer, config.precision.bf16_update),
        precision=precision,
        learning_rate=rate,
        clip_norm=config.training.clip_norm,
        announcer=announcer,
    )


def build_model(workload: Workload, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The workload's model on `device` (`meta` too), its parameters in `dtype` unless it chooses another itself.

    Made in its dtype rather than converted to it: a conversion holds both at once, and fake tensors refuse it.
    """
    postpone_compiler()  # a model on fake tensors or on `meta` would load it
    with torch.device(device), default_dtype(dtype):
        return workload.model()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What a model makes without saying its dtype has this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def capture(step: TrainStep, steps_done: int, notes: Mapping[str, Any]) -> Checkpoint:
    """The step's state after `steps_done` updates; tensors are not copied. `notes` go into state.json as they are."""
    scale = step.precision.loss_scale
    state = {**notes, "loss_scale": None if scale is None else [scale.value, scale.good_steps]}
    return Checkpoint(steps_done, step.model.state_dict(), step.optimizers.state(), state)


def restore(step: TrainStep, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's state into a freshly built step.

    Raises:
        ResumeError: the checkpoint is of another model or optimizer.
    """
    load_model(step.model, checkpoint)
    step.optimizers.load_state(checkpoint.optimizer)
    scale, stored = step.precision.loss_scale, checkpoint.state["loss_scale"]
    if scale is not None and stored is not None:
        scale.value, scale.good_steps = stored


def load_model(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights into a model.

    Raises:
        ResumeError: the checkpoint is of another model; the first names and shapes that differ are said.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in checkpoint.model.items()}
    differences = [
        f"{name}: {stored.get(name, 'missing')} in the checkpoint, {own.get(name, 'missing')} in the model"
        for name in sorted(own.keys() | stored.keys())
        if own.get(name) != stored.get(name)
    ]
    if differences:
        shown = "\n".join(f"  {line}" for line in differences[:5])
        raise ResumeError(
            f"the checkpoint of step {checkpoint.step} is of another model"
            f" ({len(differences)} tensors differ):\n{shown}",
            "resume with the model's own settings, or start a new run",
        )
    model.load_state_dict(dict(checkpoint.model))
