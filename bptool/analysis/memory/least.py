"""The least that a step must hold, from the parameters' sizes alone: no need to simulate what cannot fit."""

from __future__ import annotations

import torch
from torch import Tensor

from bptool.analysis.memory.parameters import sum_of_parameters
from bptool.analysis.memory.simulation import eager_on_cpu
from bptool.config.schema import Config
from bptool.training.precision import Precision
from bptool.training.workload import Workload

# Parameter-sized tensors that an update rule keeps, at least: Adafactor's are rows and columns, Muon's AdamW has more.
_STATE_TENSORS = {"gradient-descent": 0, "sgd": 1, "adam": 2, "adamw": 2, "muon": 1, "adafactor": 0}


def least_bytes(config: Config, workload: Workload) -> int:
    """Least that a step holds: `state_bytes`, and `block_inputs_bytes` at the end of its forward."""
    return state_bytes(config, workload) + block_inputs_bytes(config)


def state_bytes(config: Config, workload: Workload) -> int:
    """Weights, and of those that are trained the gradients and the optimizer's state."""
    optimizer, precision = config.optimizer, eager_on_cpu(config).precision
    states = 0 if optimizer.name == "sgd" and optimizer.momentum == 0 else _STATE_TENSORS[optimizer.name]
    dtype = Precision(precision, torch.device("cpu")).parameter_dtype
    with_master = precision.bf16_update == "master"

    def held(parameter: Tensor) -> int:
        if not parameter.requires_grad:
            return parameter.nbytes
        copied = with_master and parameter.dtype == torch.bfloat16
        state = 4 * (1 + states) * parameter.numel() if copied else states * parameter.nbytes
        return 2 * parameter.nbytes + state

    return sum_of_parameters(workload, held, dtype)


def block_inputs_bytes(config: Config) -> int:
    """What the built-in model's forward keeps for the backward, whatever is recomputed: each block's input.

    Nothing where it may wait in host memory.
    """
    settings = config.activation_checkpoint
    if config.run.workload or "offload" in (settings.policy if settings.policy != "plan" else settings.plan):
        return 0
    tokens = config.training.micro_batch_size * config.training.sequence_length
    return config.model.n_layers * tokens * config.model.d_model * (2 if config.precision.mode == "bf16" else 4)
