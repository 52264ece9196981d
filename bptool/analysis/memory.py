"""Will it fit? The peak of a training step, from running that very step on fake tensors under the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bptool.analysis.simulation import STEADY, eager_on_cpu, simulate_deep
from bptool.config.overrides import override
from bptool.config.schema import Config
from bptool.errors import OutOfMemory
from bptool.training.assembly import build_model
from bptool.training.precision import Precision
from bptool.training.workload import Workload, transformer_workload
from bptool.units import format_bytes

# Parameter-sized tensors that an update rule keeps, at least: Adafactor's are rows and columns, Muon's AdamW has more.
_STATE_TENSORS = {"gradient-descent": 0, "sgd": 1, "adam": 2, "adamw": 2, "muon": 1, "adafactor": 0}


@dataclass(frozen=True)
class PeakPrediction:
    """Peak of a steady step: its second, which begins with the optimizer's state in place.

    Attributes:
        peak_bytes: of the whole step.
        phase_peaks_bytes: during each phase.
    """

    peak_bytes: int
    phase_peaks_bytes: dict[str, int]


def predict_peak(config: Config, workload: Workload) -> PeakPrediction:
    """Peak of the second step, simulated.

    Buffers that a kernel allocates and frees inside one operation are not seen.
    """
    trace = simulate_deep(config, workload).trace
    phases = {phase: int(trace.live_bytes[trace.peak_event(STEADY, phase)]) for phase in trace.phases_of(STEADY)}
    phases.pop("step")
    return PeakPrediction(int(trace.live_bytes[trace.peak_event(STEADY)]), phases)


def state_bytes(config: Config, workload: Workload) -> int:
    """Least that a step must hold: weights, and of those that are trained the gradients and the optimizer's state."""
    optimizer, precision = config.optimizer, eager_on_cpu(config).precision
    states = 0 if optimizer.name == "sgd" and optimizer.momentum == 0 else _STATE_TENSORS[optimizer.name]
    dtype = Precision(precision, torch.device("cpu")).parameter_dtype
    parameters = build_model(workload, torch.device("meta"), dtype).parameters()
    return sum(p.nbytes * (2 + states if p.requires_grad else 1) for p in parameters)


def block_inputs_bytes(config: Config) -> int:
    """Least that the built-in model's forward keeps for the backward: each block's input, under every policy."""
    if config.run.workload:
        return 0
    tokens = config.training.micro_batch_size * config.training.sequence_length
    return config.model.n_layers * tokens * config.model.d_model * (2 if config.precision.mode == "bf16" else 4)


def check_fit(config: Config, workload: Workload, available_bytes: int) -> PeakPrediction:
    """The predicted peak, once it is sure that it fits.

    The kernel kills a process that takes more memory than there is, without a word; so the refusal comes first.

    Raises:
        OutOfMemory: with the prediction, what is there, and the overrides that would fit.
    """
    check_state_fits(config, workload, available_bytes)
    prediction = predict_peak(config, workload)
    if prediction.peak_bytes > available_bytes:
        raise out_of_memory(config, prediction, available_bytes)
    return prediction


def check_state_fits(config: Config, workload: Workload, available_bytes: int) -> None:
    """The part of `check_fit` that takes no time.

    Raises:
        OutOfMemory: what every step must hold does not fit.
    """
    least = state_bytes(config, workload)
    if least > available_bytes:
        raise OutOfMemory(
            f"weights, gradients and optimizer state alone need {format_bytes(least)};"
            f" {format_bytes(available_bytes)} are available",
            _lighter_states(config, workload, available_bytes),
        )
    least += block_inputs_bytes(config)
    if least > available_bytes:
        raise _lack(config, f"at least {format_bytes(least)}", available_bytes)


def out_of_memory(config: Config, prediction: PeakPrediction | None, available_bytes: int) -> OutOfMemory:
    """The error of a run that does not fit, naming the overrides that would."""
    return _lack(config, format_bytes(prediction.peak_bytes) if prediction else "unknown", available_bytes)


def _lack(config: Config, predicted: str, available_bytes: int) -> OutOfMemory:
    return OutOfMemory(
        f"a step's peak is predicted as {predicted}; {format_bytes(available_bytes)} are available",
        _lighter_step(config, available_bytes),
    )


def _lighter_step(config: Config, available_bytes: int) -> str:
    if config.run.workload:
        return f"make the batches of {config.run.workload} smaller, or try activation_checkpoint.policy=full"
    fitting = list(_fitting(config, available_bytes))
    if not fitting:
        return "no split of this batch fits; choose fewer sequences a step, or a smaller model"
    return "\n".join(["these would fit:", *fitting])


def _fitting(config: Config, available_bytes: int) -> Iterator[str]:
    """The settings nearest to the asked ones that fit, with their predicted peak; a step's tokens stay the same."""
    tried: dict[str, object] = {}
    for change in _savings(config):
        tried |= change
        lighter = override(config, tried)
        workload = transformer_workload(lighter)
        if state_bytes(lighter, workload) + block_inputs_bytes(lighter) > available_bytes:
            continue  # no need to simulate it
        peak = predict_peak(lighter, workload).peak_bytes
        if peak <= available_bytes:
            yield f"{' '.join(f'{key}={value}' for key, value in tried.items())}   ({format_bytes(peak)})"
            return


def _savings(config: Config) -> Iterator[dict[str, object]]:
    """Changes that save memory, the cheapest first; each adds to those before it."""
    if config.training.loss == "plain":
        yield {"training.loss": "fused"}
    sequences = config.training.micro_batch_size * config.training.gradient_accumulation_steps
    for micro in _smaller_divisors(config.training.micro_batch_size):
        yield {"training.micro_batch_size": micro, "training.gradient_accumulation_steps": sequences // micro}
    if config.activation_checkpoint.policy != "full":
        yield {"activation_checkpoint.policy": "full"}
    if config.precision.mode != "bf16":
        yield {"precision.mode": "bf16"}
    if config.optimizer.name not in ("adafactor", "gradient-descent"):
        yield {"optimizer.name": "adafactor"}


def _smaller_divisors(number: int) -> Iterator[int]:
    """Divisors of `number`, each the largest that is at most half of the one before it: 30, 15, 6, 3, 1 of 60."""
    divisor = number
    while divisor > 1:
        divisor = next(d for d in range(divisor // 2, 0, -1) if number % d == 0)
        yield divisor


def _lighter_states(config: Config, workload: Workload, available_bytes: int) -> str:
    for change in (
        {"optimizer.name": "adafactor"},
        {"precision.mode": "bf16"},
        {"precision.mode": "bf16", "optimizer.name": "adafactor"},
    ):
        least = state_bytes(override(config, change), workload)
        if least <= available_bytes:
            pairs = " ".join(f"{key}={value}" for key, value in change.items())
            return f"{pairs} would need {format_bytes(least)} for them, and activations besides"
    return "no optimizer or precision makes them fit; choose a smaller model, or a machine with more memory"
