"""A row on tensors without values: its memory, its FLOPs, and its time by the roofline. Nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from bptool.analysis.activation_budget.operation_costs import Estimated, Measured
from bptool.analysis.activation_budget.planning import BudgetTooSmall, Planned, settled
from bptool.analysis.compare.entries import Prediction
from bptool.analysis.machine import Machine
from bptool.analysis.memory.estimate import Simulated, counted
from bptool.analysis.memory.result import categories_at
from bptool.analysis.memory.simulation import eager_on_cpu, simulate_deep
from bptool.analysis.profile.counting import count_deep
from bptool.analysis.profile.prediction import predict
from bptool.analysis.profile.roofline import Rates, cpu_rates, gpu_rates, matmul_dtypes
from bptool.analysis.profile.tally import Tally
from bptool.analysis.question import Question
from bptool.config.block_plan import write_plan
from bptool.errors import BptoolError
from bptool.instruments.memory.trace import CATEGORIES
from bptool.training.activation_checkpoint import PolicyUnfit
from bptool.training.user_code import describe
from bptool.units import format_bytes

_SECONDS = 0.2
"""For which each of a CPU's rates is measured."""


class _Counts(NamedTuple):
    """What is counted of a step; it takes seconds, and rows that differ in no tensor's size share it."""

    peak_bytes: int
    total_bytes: int
    category_bytes: dict[str, int]
    lack: str
    """By how much it does not fit; empty: it fits, or nothing is known of the capacity."""
    tally: Tally


class Predictor:
    """Predicts rows, one by one, all by the same rates: a CPU's are measured once.

    Args:
        device: where budgets are planned by operations' times measured there; None: by an estimate, nothing is run.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._costs: dict[str, Measured] = {}
        self._of_cpu: Rates | None = None
        self._measured: set[str] = set()
        self._counts: dict[str, _Counts] = {}

    def predict(self, row: int, question: Question) -> Prediction:
        """The row's prediction; what is wrong with it is told in its status.

        `failed` is a model that fake tensors cannot run, which may run all the same.
        """
        try:
            return self._predicted(row, question)
        except (BudgetTooSmall, PolicyUnfit) as error:
            return Prediction(row=row, status="unsupported", reason=_in_a_line(error))
        except BptoolError as error:
            return Prediction(row=row, status="failed", reason=_in_a_line(error))
        except Exception as error:
            if not question.code:
                raise
            return Prediction(row=row, status="failed", reason=f"tensors without values: {describe(error)}")

    def _predicted(self, row: int, question: Question) -> Prediction:
        costs = self._measured_costs(question)
        config, workload, planned = settled(question.config, question.workload, question.machine, costs)
        chosen = replace(question, config=config, workload=workload)
        # Compiled or in tf32 it is counted alike.
        alike = eager_on_cpu(config).model_dump_json()
        counts = self._counts[alike] = self._counts.get(alike) or _count(chosen)
        return Prediction(
            row=row,
            status="out_of_memory" if counts.lack else "ok",
            reason=counts.lack,
            notes=list(_notes(question, planned)),
            plan=write_plan(planned.plan.policies) if planned else "",
            peak_bytes=counts.peak_bytes,
            total_bytes=counts.total_bytes,
            category_bytes=counts.category_bytes,
            recompute_flops_share=recompute_share(counts.tally),
            **self._times(chosen, counts.tally),
        )

    def _measured_costs(self, question: Question) -> Measured | None:
        """The same for all rows of a precision: what was measured for one of them is known."""
        if self._device is None:
            return None
        mode = question.config.precision.mode
        if mode not in self._costs:
            self._costs[mode] = Measured(self._device, Estimated(question.machine.gpu, mode))
        return self._costs[mode]

    def _times(self, question: Question, tally: Tally) -> dict[str, Any]:
        """The units of a step, and the seconds of its phases; without them where nothing is known of the GPU."""
        units = _units(question)
        rates = self._rates(question, tally)
        if rates is None:
            return {"units": units}
        found = predict(tally.costs, units, rates, None)
        phases = {phase.phase: phase.predicted_s for phase in found.phases}
        seconds = {f"{phase}_s": phases.get(phase, 0.0) for phase in ("forward", "recompute", "backward")}
        return {"units": units, "step_s": found.step_s, **seconds}

    def _rates(self, question: Question, tally: Tally) -> Rates | None:
        machine, mode = question.machine, question.config.precision.mode
        if machine.gpu:
            return gpu_rates(machine.gpu, mode) if machine.known else None
        wanted, known = matmul_dtypes(tally.costs), self._of_cpu
        if known is None:
            self._of_cpu = cpu_rates(mode, wanted, seconds=_SECONDS)
        elif not wanted <= self._measured:
            self._of_cpu = known.joined(cpu_rates(mode, wanted, seconds=_SECONDS))
        self._measured |= wanted
        return self._of_cpu


def _count(question: Question) -> _Counts:
    config, workload, machine = question.config, question.workload, question.machine
    step = counted(simulate_deep(config, workload, machine), machine)
    return _Counts(
        peak_bytes=step.peak_bytes,
        total_bytes=_total_or_all(step, machine),
        category_bytes=_categories(step),
        lack=_lack(step, machine) if step.fits is False else "",
        tally=count_deep(config, workload, machine).tally,
    )


def _notes(question: Question, planned: Planned | None) -> Iterator[str]:
    if planned:
        yield planned.sentence
    if question.config.training.compile:
        yield "predicted without torch.compile, whose fusion would save some of the activations and of the time"


def recompute_share(tally: Tally) -> float:
    """FLOPs of recomputation over those of forward, backward and recomputation."""
    again = tally.flops("recompute")
    total = again + tally.flops("forward", "dgrad", "wgrad")
    return again / total if total else 0.0


def _units(question: Question) -> int:
    batch = question.workload.batch(torch.Generator())
    return int(question.workload.weight(batch)) * question.config.training.gradient_accumulation_steps


def _categories(step: Simulated) -> dict[str, int]:
    held = categories_at(step.trace, step.peak_event).model_dump()
    return {name: held[f"{name}_bytes"] for name in CATEGORIES}


def _total(step: Simulated, machine: Machine) -> int:
    return step.reserved_bytes + (machine.gpu.context.expected if machine.gpu else 0)


def _total_or_all(step: Simulated, machine: Machine) -> int:
    """What fits the device needs no more than that: the allocator gives back what it only caches."""
    total = _total(step, machine)
    return min(total, machine.capacity_bytes) if step.fits and machine.capacity_bytes is not None else total


def _lack(step: Simulated, machine: Machine) -> str:
    need, there = format_bytes(_total(step, machine)), format_bytes(machine.capacity_bytes or 0)
    return f"needs {need} by its prediction; {there} are there"


def _in_a_line(error: BptoolError) -> str:
    return "; ".join([error.message, *error.remedy.splitlines()])
