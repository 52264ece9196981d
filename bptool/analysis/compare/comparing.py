"""A grid from its words to its file: each row predicted, and run where that is asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from bptool import __version__
from bptool.analysis.activation_budget.planning import with_blocks
from bptool.analysis.compare.entries import Entry, Header, Prediction
from bptool.analysis.compare.grid import Grid
from bptool.analysis.compare.journal import Journal
from bptool.analysis.compare.measuring import measure_grid
from bptool.analysis.compare.prediction import Predictor
from bptool.analysis.question import Question
from bptool.config.block_plan import parse_plan
from bptool.errors import DeviceError
from bptool.hardware import cpu_name, resolve_device
from bptool.training.interruption import StopRequest
from bptool.training.user_code import users_errors
from bptool.units import format_bytes, format_duration

Mode = Literal["predict", "measure"]
Told = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is run of each row.

    Attributes:
        mode: whether anything is.
        warmup, steps: of a process: those before the timed ones, and these.
        rounds: processes.
        time_limit_s: of a process.
    """

    mode: Mode
    warmup: int
    steps: int
    rounds: int
    time_limit_s: float


def mode_of(grid: Grid, asked: Mode | None, *, named: bool) -> Mode:
    """Whether rows are run: as was asked, else where the device is here.

    Args:
        named: whether a GPU was named, which need not be here.

    Raises:
        DeviceError: they are to be run, and there is no such device.
    """
    here = not named and (grid.machine.gpu is None or torch.cuda.is_available())
    if asked == "measure" and not here:
        raise DeviceError("--measure runs the rows, and this machine has no GPU", "leave it out to predict them")
    return asked or ("measure" if here else "predict")


def header_of(grid: Grid, plan: Plan) -> Header:
    """The first line of the grid's file."""
    gpu = grid.machine.gpu
    measured_on = torch.cuda.get_device_name() if gpu and plan.mode == "measure" else cpu_name()
    return Header(
        bptool_version=__version__,
        torch_version=torch.__version__,
        target=grid.target,
        overrides=grid.overrides,
        axes={axis.key: list(axis.words) for axis in grid.axes},
        rows=[row.settings for row in grid.rows],
        reference=next(index for index, row in enumerate(grid.rows) if row.question),
        mode=plan.mode,
        device=grid.machine.device,
        device_name=gpu.name if gpu and plan.mode == "predict" else measured_on,
        unit=grid.question.workload.unit,
        warmup=plan.warmup,
        steps=plan.steps,
        rounds=plan.rounds,
        time_limit_s=plan.time_limit_s,
    )


def size(grid: Grid, plan: Plan) -> str:
    """How much there is to do, before anything of it is done."""
    axes = " x ".join(f"{axis.key} ({len(axis.words)})" for axis in grid.axes)
    out = sum(row.question is None for row in grid.rows)
    less = f", {out} of them cannot be run" if out else ""
    then = "predicted on tensors without values, and nothing is run"
    if plan.mode == "measure":
        then = f"each predicted, then run in {_rounds(plan.rounds)} of {plan.warmup} + {plan.steps} steps"
    return f"{_rows(len(grid.rows))}{less}: {axes}; {then}"


def run_grid(grid: Grid, header: Header, journal: Journal, told: Told) -> bool:
    """Find out what the journal does not hold yet, and write it there.

    Returns:
        Whether the user stopped it.

    Raises:
        StorageError: the journal cannot be written.
    """
    # Told in our own words; PyTorch would also log a traceback.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    with users_errors(grid.question.code):
        if _predict_all(grid, header, journal, told):
            return True
    if header.mode == "predict":
        return False
    runnable = _runnable(grid, journal.entries)
    told(_expected(header, journal.entries, sum(question is not None for question in runnable)))
    return measure_grid(runnable, header, journal, told)


def _predict_all(grid: Grid, header: Header, journal: Journal, told: Told) -> bool:
    """Whether the user stopped it."""
    known = {entry.row for entry in journal.entries if isinstance(entry, Prediction)}
    predictor = Predictor(resolve_device(header.device) if header.mode == "measure" else None)
    with StopRequest("printing what is there, after this row", "stopped at once; --resume goes on") as stop:
        for index, row in enumerate(grid.rows):
            if index in known:
                continue
            if stop.reason:
                return True
            if row.question is None:
                found = Prediction(row=index, status="unsupported", reason=row.reason)
            else:
                found = predictor.predict(index, row.question)
            journal.append(found if header.mode == "predict" else _before_it_runs(found))
            told(f"row {index + 1} of {len(grid.rows)}, {row.label}: {_words(found)}")
        return bool(stop.reason) and header.mode == "measure"


def _before_it_runs(found: Prediction) -> Prediction:
    """A model that cannot be predicted may be run all the same."""
    if found.status != "failed":
        return found
    return Prediction(row=found.row, status="ok", notes=[f"not predicted: {found.reason}"])


def _runnable(grid: Grid, entries: Sequence[Entry]) -> list[Question | None]:
    """What is to be run: not what was refused, and with a budget's plan in its place, the same in each process."""
    known = {entry.row: entry for entry in entries if isinstance(entry, Prediction)}
    refused = {row for row, entry in known.items() if entry.status != "ok"}
    return [
        None if index in refused or row.question is None else _planned(row.question, known[index].plan)
        for index, row in enumerate(grid.rows)
    ]


def _planned(question: Question, plan: str) -> Question:
    if not plan:
        return question
    config = with_blocks(question.config, parse_plan(plan))
    settings = (*question.settings, f"activation_checkpoint.policy=plan:{plan}")
    return replace(question, config=config, settings=settings)


def _expected(header: Header, entries: Sequence[Entry], count: int) -> str:
    """How long it should take: by the predictions, of steps alone."""
    seconds = [entry.step_s for entry in entries if isinstance(entry, Prediction) and entry.status == "ok"]
    processes = f"{_rows(count)} x {_rounds(header.rounds)}, each a process of {header.warmup + header.steps} steps"
    if None in seconds or not seconds:
        return processes
    total = sum(filter(None, seconds)) * header.rounds * (header.warmup + header.steps)
    return f"{processes}: about {format_duration(total)} of steps by the prediction, and each process's own start"


def _words(found: Prediction) -> str:
    if found.status != "ok":
        return f"{found.status.replace('_', ' ')}: {found.reason}"
    peak = "" if found.peak_bytes is None else f", peak {format_bytes(found.peak_bytes)}"
    time = "" if found.step_s is None else f", {format_duration(found.step_s)} a step"
    return f"predicted{peak}{time}"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"{count} rounds"
