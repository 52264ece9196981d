"""A run as a person reads it: a TrainPlan before its first step, a TrainResult after the last."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from bptool.analysis.train import TrainPlan, TrainResult
from bptool.report.text import aligned, next_commands, quoted
from bptool.training.run_folder import resume_command
from bptool.units import format_bytes, format_count, format_duration, format_rate


def render_plan(plan: TrainPlan) -> str:
    """Two lines: the model and its steps, and what it learns from."""
    steps = f"steps {plan.first_step + 1} to {plan.total_steps}"
    if plan.first_step == plan.total_steps:
        steps = f"all {plan.total_steps} steps done, but for the result"
    model = f"{format_count(plan.parameters_count)} parameters on {plan.device}"
    return f"{model}, {steps}, predicted peak memory {_bytes(plan.predicted_peak_bytes)}\n{plan.data}"


def render(result: TrainResult) -> str:
    """The report: what it learned first, the next commands last."""
    blocks = [_headline(result), aligned(_rows(result))]
    if result.sample is not None:
        blocks.append("sample\n" + quoted(result.sample))
    blocks.append(next_commands(_next(result)))
    return "\n\n".join(blocks)


def _headline(result: TrainResult) -> str:
    verb = "finished" if result.status == "finished" else "stopped"
    sitting = f" (from step {result.first_step})" if result.first_step else ""
    duration = format_duration(result.duration_s)
    return f"{verb} at step {result.steps} of {result.total_steps}{sitting} after {duration} on {result.device}"


def _rows(result: TrainResult) -> list[tuple[str, str]]:
    rows = [("loss", _loss(result)), ("peak memory", _memory(result))]
    if result.steps > result.first_step:  # else there was no step to time
        rows += [
            ("speed", f"{_rate(result)}, {format_duration(result.step_median_s)} a step"),
            ("MFU", _mfu(result)),
            ("backward", f"{result.backward_over_forward:.2f}x the forward's time"),
        ]
    rows += [("model", f"{format_count(result.parameters_count)} parameters"), ("data", result.data)]
    return [*rows, ("checkpoint", result.checkpoint)] if result.checkpoint else rows


def _loss(result: TrainResult) -> str:
    known = []
    if result.status == "finished" or not math.isnan(result.val_loss):  # a finished run was evaluated
        known.append(f"{result.val_loss:.4f}{_per(result)} held out")
    if result.steps > result.first_step:
        known.append(f"{result.train_loss:.4f}{'' if known else _per(result)} in training")
    text = ", ".join(known) or "n/a"
    if result.unigram_entropy is None:
        return text
    return f"{text}; {result.unigram_entropy:.4f} by token frequencies alone"


def _per(result: TrainResult) -> str:
    return " nats/token" if result.unit == "tokens" else ""


def _memory(result: TrainResult) -> str:
    predicted, measured = result.predicted_peak_bytes, result.measured_peak_bytes
    words = [f"predicted {_bytes(predicted)}", f"measured {_bytes(measured)}"]
    if predicted is not None and measured:
        words.append("equal to the byte" if predicted == measured else f"{predicted / measured - 1:+.2%}")
    return ", ".join(words)


def _rate(result: TrainResult) -> str:
    return f"{format_count(result.tokens_per_s)} {result.unit}/s"


def _mfu(result: TrainResult) -> str:
    if result.peak_flops_per_s is None:
        return f"n/a ({result.peak_flops_source})"
    if result.mfu is None:
        return f"n/a (the FLOPs of {result.workload} are not known)"
    return f"{result.mfu:.1%} of {format_rate(result.peak_flops_per_s, 'FLOP')}, {result.peak_flops_source}"


def _bytes(n_bytes: int | None) -> str:
    return "n/a" if n_bytes is None else format_bytes(n_bytes)


def _next(result: TrainResult) -> Sequence[str]:
    run = shlex.quote(result.run)
    if result.status == "interrupted":
        return [resume_command(result.run, result.workload)]
    sample = [] if result.sample is None else [f"bptool sample {run} --tokens 300"]
    return [*sample, f"tensorboard --logdir {run}"]
