"""What the figures take for granted, and what makes them doubtful, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bptool.analysis.profile.admission import Admission
from bptool.analysis.profile.measuring import Measurement
from bptool.analysis.profile.prediction import PUBLISHED
from bptool.analysis.profile.result import Unexplained
from bptool.analysis.question import Question
from bptool.training.compiling import recomputes_unseen

WIDE = 0.1
"""How far, as a share, a step's operations may add up to another time than the step's before that is a warning."""
HEAVY = 0.5
"""How much longer a recorded step may be, as a share, before the recorder is what a remedy is about."""


def assumptions(question: Question, admitted: Admission, measurement: Measurement, depths: Sequence[int]) -> list[str]:
    """Sentences."""
    sentences = [*question.assumptions, *(question.machine.assumptions if question.machine.gpu else ())]
    if admitted.refusal and admitted.expected:
        sentences.append(f"counted, {admitted.refusal}")
    if admitted.note:
        sentences.append(admitted.note)
    if admitted.memory:
        sentences.append("peak memory is predicted, as memory-estimate does, also where the step is run")
    if depths:
        check, low, high = depths
        known = f"{low} and {high}, and so do {check}, as counting them showed"
        sentences.append(f"{question.workload.n_layers} layers follow from {known}")
    sentences += _of_counting(question)
    if not measurement.traces and question.config.training.clip_norm:
        sentences.append(
            "the clip is counted with the multiply that scales the gradients, a FLOP an element; a step that finds"
            " their norm below training.clip_norm does without"
        )
    if measurement.timed:
        sentences += _of_timing(question)
    if measurement.traces:
        sentences += _of_recording(question)
    if question.machine.gpu and not measurement.timed:
        nearest, farthest = PUBLISHED
        sentences.append(
            "the predicted time is a lower bound: published runs with fused attention (nanoGPT on A100s, torchtitan on"
            f" A100s and H100s) took {nearest} to {farthest} times as long, written-out attention takes longer still"
        )
    return sentences


def warnings(
    admitted: Admission,
    measurement: Measurement,
    phases: Sequence[Unexplained],
    recorder_overhead: float | None,
) -> list[str]:
    """Each with its remedy.

    Args:
        phases: what operations account for.
    """
    found = [*measurement.warnings, *_not_adding_up(phases, recorder_overhead or 0.0)]
    if admitted.refusal and not admitted.expected:
        remedy = "make the batch or the model smaller, or name the machine that it is for with --gpu"
        found.insert(0, f"counted, {admitted.refusal}: {remedy}")
    if measurement.interrupted:
        found.insert(0, "interrupted: figures are of the steps until then; let it run to its end for all of them")
    return found


def _not_adding_up(phases: Sequence[Unexplained], recorder_overhead: float) -> Iterator[str]:
    """Modules' and operations' seconds, from steps that were recorded, beside the phases' from others."""
    measured = sum(phase.measured_s for phase in phases)
    share = 1 - sum(phase.unexplained_s for phase in phases) / measured if measured else 1.0
    if abs(share - 1) <= WIDE:
        return
    remedy = "stop what else runs here, or time more of them: --steps 30"
    if recorder_overhead > HEAVY:
        times = f"{1 + recorder_overhead:.1f} times as long"
        remedy = f"a larger batch makes the recorder weigh less, which makes a step {times}"
    yield (
        f"operations and the time between them add up to {share:.0%} of the step's time: take the seconds of modules"
        f" and operations as shares, those of phases as they are; {remedy}"
    )


def _of_counting(question: Question) -> Iterator[str]:
    counted = "attention is counted over all T x T scores"
    taken = "of half of them where it is causal" if question.machine.gpu else "at the rate measured, counted alike"
    yield f"{counted}; its predicted time is {taken}"


def _of_timing(question: Question) -> Iterator[str]:
    yield "batches are random and made on the spot: the data phase is not that of a corpus"
    config = question.config
    if config.training.compile:
        yield "compiled: times are of the compiled model, FLOPs of the same model run eagerly; no operation is timed"
    if recomputes_unseen(config):
        yield "recomputation is compiled into the backward, and is time of it"
    if not question.code and config.training.loss == "fused":
        yield (
            "the fused loss computes its gradients in the forward: they are time of the forward, and FLOPs of the"
            " backward (training.loss=plain keeps them apart)"
        )


def _of_recording(question: Question) -> Iterator[str]:
    yield (
        "a module's time is that of its operations and since the one before each of them, so that Python and autograd"
        " are in it; medians over recorded steps"
    )
    if question.machine.device == "cpu":
        yield "what the recorder itself takes was measured on a model of tiny layers, and is taken out again"
