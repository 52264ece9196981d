"""Grids that were made up, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bptool.analysis.compare.entries import GradientComparison, Header, Prediction, RowRun, TimedPhases
from bptool.analysis.compare.result import Status

POLICY, MODE = "activation_checkpoint.policy", "precision.mode"


def header(count: int = 3, **changes: Any) -> Header:
    """A grid of policies."""
    policies = ["none", "full", "save_matmuls", "attention", "mlp", "offload"][:count]
    known: dict[str, Any] = {
        "bptool_version": "1",
        "torch_version": "2",
        "target": "tiny",
        "overrides": ["training.steps=9"],
        "axes": {POLICY: policies},
        "rows": [{POLICY: policy} for policy in policies],
        "reference": 0,
        "mode": "measure",
        "device": "cpu",
        "device_name": "a CPU",
        "unit": "tokens",
        "warmup": 1,
        "steps": 3,
        "rounds": 2,
        "time_limit_s": 60.0,
    }
    return Header(**(known | changes))


def run(
    row: int,
    round: int = 0,
    step_s: float = 1.0,
    *,
    units: int = 100,
    peak: int = 1000,
    losses: Sequence[float] = (3.0, 2.0),
    status: Status = "ok",
    reason: str = "",
) -> RowRun:
    """Three steps about so long."""
    steps = [
        TimedPhases(step_s=s, forward_s=s / 4, recompute_s=s / 8, backward_s=s / 2, units=units)
        for s in (step_s * 0.99, step_s, step_s * 1.01)
    ]
    if status != "ok":
        return RowRun(row=row, round=round, status=status, reason=reason)
    return RowRun(row=row, round=round, status="ok", peak_bytes=peak, steps=steps, losses=list(losses))


def failed_prediction(row: int, reason: str) -> Prediction:
    """Of a model that needs values."""
    return Prediction(row=row, status="failed", reason=reason)


def prediction(row: int, *, peak: int = 1000, step_s: float = 1.0, units: int = 100, **changes: Any) -> Prediction:
    """One that came to its end."""
    known: dict[str, Any] = {
        "row": row,
        "status": "ok",
        "peak_bytes": peak,
        "total_bytes": peak + 10,
        "category_bytes": {"parameters": peak // 2, "activations": peak - peak // 2},
        "units": units,
        "step_s": step_s,
        "forward_s": step_s / 4,
        "recompute_s": 0.0,
        "backward_s": step_s / 2,
        "recompute_flops_share": 0.25,
    }
    return Prediction(**(known | changes))


def gradient(row: int, error: float = 0.0, **changes: Any) -> GradientComparison:
    """Against float64."""
    known: dict[str, Any] = {
        "row": row,
        "status": "ok",
        "reference": "float64",
        "relative_error": error,
        "layers": {"blocks.0": error / 2, "blocks.1": error * 2},
    }
    return GradientComparison(**(known | changes))
