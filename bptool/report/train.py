"""A TrainResult as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

from bptool.analysis.train import TrainResult
from bptool.report.text import aligned, next_commands, quoted
from bptool.units import format_bytes, format_count, format_duration, format_rate


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
    mfu = "n/a" if result.mfu is None else f"{result.mfu:.1%}"
    peak = "" if result.peak_flops_per_s is None else f"{format_rate(result.peak_flops_per_s, 'FLOP')}, "
    rows += [
        (
            "speed",
            f"{format_count(result.tokens_per_s)} {result.unit}/s, {format_duration(result.step_median_s)} a step",
        ),
        (
            "MFU",
            f"{mfu} of {peak}{result.peak_flops_source}" if peak else f"{mfu} ({result.peak_flops_source})",
        ),
        ("backward", f"{result.backward_over_forward:.2f}x the forward's time"),
        ("model", f"{format_count(result.parameters_count)} parameters"),
        ("data", result.data),
    ]
    return [*rows, ("checkpoint", result.checkpoint)] if result.checkpoint else rows


def _loss(result: TrainResult) -> str:
    per = f" nats/{result.unit.removesuffix('s')}" if result.unit == "tokens" else ""
    text = f"{result.val_loss:.4f} held out, {result.train_loss:.4f} in training{per}"
    if result.unigram_entropy is None:
        return text
    return f"{text}; {result.unigram_entropy:.4f} by token frequencies alone"


def _memory(result: TrainResult) -> str:
    predicted, measured = result.predicted_peak_bytes, result.measured_peak_bytes
    words = [
        "predicted " + ("n/a" if predicted is None else format_bytes(predicted)),
        "measured " + ("n/a" if measured is None else format_bytes(measured)),
    ]
    if predicted is not None and measured:
        words.append("equal to the byte" if predicted == measured else f"{predicted / measured - 1:+.2%}")
    return ", ".join(words)


def _next(result: TrainResult) -> Sequence[str]:
    if result.status == "interrupted":
        return [f"bptool train --resume {result.run}"]
    sample = [] if result.sample is None else [f'bptool sample {result.run} --prompt "class "']
    return [*sample, f"tensorboard --logdir {result.run}"]
