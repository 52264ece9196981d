"""`bptool profile`: the step counted, and run where it can be, as one Result."""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass, replace

import torch

from bptool.analysis.activation_budget.planning import with_plan
from bptool.analysis.memory.fit import memory_errors
from bptool.analysis.profile.admission import Admission, admission
from bptool.analysis.profile.assumptions import assumptions, warnings
from bptool.analysis.profile.conventions import EXECUTED, conventions
from bptool.analysis.profile.counting import count_question
from bptool.analysis.profile.depth import Counted
from bptool.analysis.profile.kernel_rates import TYPICAL, AttentionShape
from bptool.analysis.profile.measuring import Measurement, Plan, Progress, measure, stoppable
from bptool.analysis.profile.parts import flop_counts, module_costs, op_costs, phase_counts
from bptool.analysis.profile.prediction import predict
from bptool.analysis.profile.ratio_terms import ratio_terms, recompute_terms
from bptool.analysis.profile.reconciliation import ratio_by_kind, typical, unexplained, with_durations, with_seconds
from bptool.analysis.profile.recorder_cost import recorder_costs
from bptool.analysis.profile.result import Convention, PhaseTimes, ProfileResult
from bptool.analysis.profile.roofline import Rates, cpu_rates, gpu_rates, matmul_dtypes, under_roofs
from bptool.analysis.profile.tally import Tally, tally_of
from bptool.analysis.profile.timing import finite_differences, phase_times, units_per_s
from bptool.analysis.question import Question
from bptool.errors import BptoolError, TargetError
from bptool.instruments.operations.trace import OperationTrace
from bptool.training.assembly import build_model
from bptool.training.user_code import describe, users_errors

_NOTHING = Measurement((), (), (), None, (), False)


@dataclass(frozen=True)
class Profiled:
    """The answer, and the typical recorded step that its times are from; None where none was recorded."""

    result: ProfileResult
    trace: OperationTrace | None


@dataclass(frozen=True)
class _Found:
    """All that was counted and measured."""

    question: Question
    admission: Admission
    measurement: Measurement
    trace: OperationTrace | None
    counted: Counted
    rates: Rates | None
    units: int


def profile(question: Question, plan: Plan, done: Progress = lambda number, total: None) -> Profiled:
    """Count the question's step, and run it where the machine is here and has the memory.

    Args:
        done: told of each step that was run.

    Raises:
        BptoolError: the user's model fails, or the step cannot be run here.
    """
    # Told in our own words; PyTorch would also log a traceback.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    with users_errors(question.code):
        question = with_plan(question)
        admitted = admission(question, measure=plan.measure)
        if admitted.refusal:
            return _profiled(_found(question, admitted, _NOTHING))
        with stoppable() as stop:
            with memory_errors(question, admitted.prediction):
                measurement = measure(question, plan, stop, done)
            found = _found(question, admitted, measurement)
            # Whoever stops it while the figures are made has them all the same.
            measurement = replace(measurement, interrupted=bool(stop.reason))
            return _profiled(replace(found, measurement=measurement))


def _found(question: Question, admitted: Admission, measurement: Measurement) -> _Found:
    trace = _typical(question, measurement)
    counted = _counted(question, trace, may_run=not admitted.refusal)
    thorough = measurement.timed and not measurement.interrupted
    rates = _rates(question, counted, seconds=0.6 if thorough else 0.2)
    units = measurement.timed[0].units if measurement.timed else _units(question)
    return _Found(question, admitted, measurement, trace, counted, rates, units)


def _profiled(found: _Found) -> Profiled:
    return Profiled(_result(found), found.trace)


def _typical(question: Question, measurement: Measurement) -> OperationTrace | None:
    if not measurement.traces:
        return None
    on_cpu = question.machine.device == "cpu"  # in a GPU's queue the recorder takes no time
    return typical(measurement.traces, recorder_costs() if on_cpu else {})


def _counted(question: Question, trace: OperationTrace | None, *, may_run: bool) -> Counted:
    """What was recorded where something was, else on fake tensors; in earnest where they fail and a step may run."""
    micro_batches = question.config.training.gradient_accumulation_steps
    if trace is not None:
        model = build_model(question.workload, torch.device("meta"), torch.float32)
        return Counted(tally_of(trace, model, micro_batches, micro_batches), ())
    try:
        return count_question(question)
    except BptoolError:
        raise
    except Exception as error:
        if not question.code:
            raise
        if may_run and question.machine.gpu is None:
            return count_question(replace(question, machine=replace(question.machine, fake=False)))
        raise TargetError(
            f"{question.code} does not run on fake tensors, which have shapes and no values: {describe(error)}",
            "a model that reads values in its forward is counted in a real step: leave out --count, or --gpu",
        ) from error


def _rates(question: Question, counted: Counted, *, seconds: float) -> Rates | None:
    """Of the machine that is asked about; None for a GPU that is here and not known.

    Args:
        seconds: for which a CPU's are each measured.
    """
    gpu, mode = question.machine.gpu, question.config.precision.mode
    if gpu is None:
        return cpu_rates(mode, matmul_dtypes(counted.tally.costs), _attention(question, counted.tally), seconds=seconds)
    return gpu_rates(gpu, mode) if question.machine.known else None


def _attention(question: Question, tally: Tally) -> AttentionShape | None:
    """The built-in transformer's is known, a user's own is not; None where there is none."""
    if not any("attention" in place.op for place, cost in tally.costs.items() if cost.flops):
        return None
    config = question.config
    return TYPICAL if question.code else AttentionShape(config.training.sequence_length, config.model.head_dim, True)


def _units(question: Question) -> int:
    """What a step works off, told by a batch."""
    workload = question.workload
    batch = workload.batch(torch.Generator())
    return int(workload.weight(batch)) * question.config.training.gradient_accumulation_steps


def _result(found: _Found) -> ProfileResult:
    question, tally, rates, measurement = found.question, found.counted.tally, found.rates, found.measurement
    times = _times(found)
    per_s = units_per_s(measurement.timed) if measurement.timed else None
    line = rates.roofline if rates else None
    known = _with_mfu(found, per_s)
    modules, ops = module_costs(tally), op_costs(tally)
    if found.trace:
        modules, ops = with_seconds(modules, found.trace), with_durations(ops, found.trace)
    facts = tally.modules.values()
    trainable = sum(module.trainable for module in facts)
    forward_s, overhead = measurement.forward_s, _overhead(measurement)
    explained = unexplained(times, found.trace) if times and found.trace else []
    return ProfileResult(
        target=question.target,
        settings=list(question.settings),
        device=question.machine.device,
        gpu=question.machine.gpu.name if question.machine.gpu else None,
        parameters_count=sum(module.parameters for module in facts),
        trainable_parameters_count=trainable,
        unit=question.workload.unit,
        units_per_step=found.units,
        flops=flop_counts(tally),
        phases=phase_counts(tally),
        time=times,
        tokens_per_s=per_s,
        mfu=next((one.mfu for one in known if one.headline), None),
        hfu=next((one.mfu for one in known if one.name == EXECUTED), None),
        peak_flops_per_s=line.flops_per_s if line else None,
        peak_flops_source=line.flops_source if line else "no peak is known for this GPU",
        ratio_terms=ratio_terms(tally),
        recompute_terms=recompute_terms(tally),
        conventions=known,
        modules=modules,
        ops=under_roofs(ops, tally.costs, rates) if rates else ops,
        unexplained=explained,
        recorder_overhead=overhead,
        roofline=line,
        predicted=predict(tally.costs, found.units, rates, times) if rates else None,
        finite_differences=finite_differences(times, forward_s, trainable) if times and forward_s else None,
        memory=found.admission.memory,
        compiled=question.config.training.compile and times is not None,
        extrapolated_from_layers=list(found.counted.depths),
        assumptions=assumptions(question, found.admission, measurement, found.counted.depths),
        warnings=warnings(found.admission, measurement, explained, overhead),
        interrupted=measurement.interrupted,
    )


def _times(found: _Found) -> PhaseTimes | None:
    if not found.measurement.timed:
        return None
    times = phase_times(found.measurement.timed)
    by_kind = ratio_by_kind(times, found.trace) if found.trace else None
    return times.model_copy(update={"backward_over_forward_by_kind": by_kind})


def _with_mfu(found: _Found, per_s: float | None) -> list[Convention]:
    """Every convention with the MFU that it gives."""
    config = None if found.question.code else found.question.config
    known = conventions(found.counted.tally, found.units, config)
    peak = found.rates.roofline.flops_per_s if found.rates else None
    if per_s is None or peak is None:
        return known
    return [one.model_copy(update={"mfu": one.flops_per_unit * per_s / peak}) for one in known]


def _overhead(measurement: Measurement) -> float | None:
    """How much longer a recorded step takes, as a share of one that is not."""
    if not measurement.recorded:
        return None
    recorded, plain = (
        statistics.median(step.seconds["step"] for step in steps) for steps in (measurement.recorded, measurement.timed)
    )
    return recorded / plain - 1
