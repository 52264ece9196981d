"""What a grid's file holds: a header, and an entry for each thing that was found out, in the order it was."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from bptool.analysis.compare.result import Status
from bptool.analysis.result import Record


class Header(Record):
    """The grid: what was asked, where, and of whom.

    Attributes:
        target, overrides: in the user's words, without the axes.
        axes: each axis's key and its values, in the user's words.
        rows: each row's settings, dotted keys to values, in the grid's order.
        mode: whether the rows are run, or predicted alone.
        device: cpu or cuda; `device_name` says which one, or which GPU is predicted for.
        warmup, steps, rounds: steps of a process before the timed ones, the timed ones, and processes a row.
    """

    kind: Literal["header"] = "header"
    format_version: int = 1
    bptool_version: str
    torch_version: str
    target: str
    overrides: list[str]
    axes: dict[str, list[str]]
    rows: list[dict[str, Any]]
    reference: int
    mode: Literal["predict", "measure"]
    device: str
    device_name: str
    unit: str
    warmup: int
    steps: int
    rounds: int
    time_limit_s: float


class Prediction(Record):
    """A row on tensors without values. Figures are None where the status is not `ok` or they cannot be had.

    Attributes:
        plan: what each block keeps, where the row has a budget for that; its processes then keep to it.
    """

    kind: Literal["prediction"] = "prediction"
    row: int
    status: Status
    reason: str = ""
    notes: list[str] = Field(default_factory=list)
    plan: str = ""
    peak_bytes: int | None = None
    total_bytes: int | None = None
    category_bytes: dict[str, int] = Field(default_factory=dict)
    units: int | None = None
    step_s: float | None = None
    forward_s: float | None = None
    recompute_s: float | None = None
    backward_s: float | None = None
    recompute_flops_share: float | None = None


class GradientComparison(Record):
    """A row's gradient: against the policy `none` to the bit, and against the reference in number.

    Attributes:
        changed: parameters and buffers that recomputation changes.
        relative_error: over all parameters; `layers`: by the module that owns them.
    """

    kind: Literal["gradient"] = "gradient"
    row: int
    status: Status
    reason: str = ""
    changed: list[str] = Field(default_factory=list)
    reference: Literal["float64", "float32"] | None = None
    relative_error: float | None = None
    layers: dict[str, float] = Field(default_factory=dict)


class TimedPhases(Record):
    """Seconds of one step and its phases, all micro-batches together.

    Attributes:
        recompute_s: None where it is compiled into the backward; else the backward is without it.
    """

    step_s: float
    forward_s: float
    recompute_s: float | None
    backward_s: float
    units: float


class RowRun(Record):
    """One process's run of a row.

    Attributes:
        round: from 0 on; rows take turns, so that a round holds each of them once.
        peak_bytes: allocated, of a steady step.
        steps: those that were timed.
        losses: of all steps, those of the warm-up too.
    """

    kind: Literal["run"] = "run"
    row: int
    round: int
    status: Status
    reason: str = ""
    peak_bytes: int | None = None
    steps: list[TimedPhases] = Field(default_factory=list)
    losses: list[float] = Field(default_factory=list)


Entry = Annotated[Prediction | GradientComparison | RowRun, Field(discriminator="kind")]
"""A line of the file, below its header."""
