"""Which activation-checkpointing and precision settings? The Result of `bptool compare`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from bptool.analysis.result import Record, Result

Status = Literal["ok", "unsupported", "out_of_memory", "gradients_differ", "failed", "timed_out", "diverged", "not_run"]
"""Of a row. `unsupported`: its settings contradict each other, or device or model cannot do them; `gradients_differ`:
its recomputation changes the gradient of `none`; `failed`: its process raised an error or died; `diverged`: its loss is
not finite, or rose while the reference's fell; `not_run`: the grid was stopped before."""


class StepTimes(Record):
    """Seconds of an optimizer step: the median over all rounds, the tenth and ninetieth percentile, and all of them."""

    median: float
    p10: float
    p90: float
    samples: list[float]


class Ratio(Record):
    """A row's figure over the reference's.

    Attributes:
        low, high: a 95% interval; None where it was counted, not measured.
        significant: whether the interval leaves out 1.
    """

    value: float
    low: float | None
    high: float | None
    significant: bool


class CompareRow(Record):
    """One setting of the grid.

    Attributes:
        settings: the axes' keys, dotted, and this row's values as a command line takes them, such as `budget:4GiB`.
        label: the same in few words.
        reason: why the status is not `ok`; empty where it is.
        notes: what else is to be known of it, such as the plan that a budget came to.
        predicted_peak_bytes: allocated, of a steady step, simulated; None where fake tensors cannot do it.
        predicted_total_bytes: what the device must have free: what its allocator reserves, and its context.
        predicted_step_s: by the roofline.
        predicted_category_bytes: of the predicted peak, what is held by category.
        measured_peak_bytes: allocated, of a steady step.
        tokens_per_s: of whatever the workload counts; measured, or predicted where nothing is run.
        forward_s, recompute_s, backward_s: of one step, medians; measured, or predicted where nothing is run. Where
            the recomputation was compiled into the backward, `recompute_s` is None, and it is in `backward_s`.
        recompute_flops_share: FLOPs of recomputation over all FLOPs of forward, backward and recomputation.
        gradient_relative_error: distance from the reference gradient over its norm, all parameters together.
        worst_layer, worst_layer_relative_error: of the module whose own parameters' gradient is farthest off.
        first_loss, final_loss: of the first and the last step of the run, all rows from the same weights and data.
        peak_ratio, time_ratio: memory, and time per token, over the reference row's.
        on_front: no row on the front is better in one of memory, time per token and gradient error, and worse in none;
            times that do not differ significantly are alike.
        dominated_by: indices of rows on the front that are at least as good in all three, and better in one.
    """

    settings: dict[str, Any]
    label: str
    status: Status
    reason: str = ""
    notes: list[str] = Field(default_factory=list)
    predicted_peak_bytes: int | None = None
    predicted_total_bytes: int | None = None
    predicted_step_s: float | None = None
    predicted_category_bytes: dict[str, int] = Field(default_factory=dict)
    measured_peak_bytes: int | None = None
    step_s: StepTimes | None = None
    tokens_per_s: float | None = None
    forward_s: float | None = None
    recompute_s: float | None = None
    backward_s: float | None = None
    recompute_flops_share: float | None = None
    gradient_relative_error: float | None = None
    worst_layer: str | None = None
    worst_layer_relative_error: float | None = None
    first_loss: float | None = None
    final_loss: float | None = None
    peak_ratio: float | None = None
    time_ratio: Ratio | None = None
    on_front: bool = False
    dominated_by: list[int] = Field(default_factory=list)


class Best(Record):
    """The fastest row that fits.

    Attributes:
        row: its index.
        command: `bptool train` with its settings.
        needed_bytes: what it needs of the limit: its peak, measured where it was run, and what the allocator's reserve
            and the device's context add to it by prediction.
    """

    row: int
    settings: dict[str, Any]
    command: str
    needed_bytes: int


class CompareResult(Result):
    """A grid of settings, side by side.

    Attributes:
        target, overrides: in the user's words, without the axes.
        axes: each axis's key and its values, in the user's words.
        unit: what throughput counts, such as tokens.
        mode: whether the rows were run, or predicted alone.
        device, device_name: where, or for which GPU the prediction is.
        gradient_reference: the dtype of the gradient that errors are against; None where there is none.
        steps, rounds: timed steps of a process, and processes a row.
        reference: index of the row that ratios are to.
        fit_bytes: the limit that was asked about; None where none was.
        best: None where none was asked for, or none fits.
        warnings: what makes the figures doubtful.
        interrupted: rows are missing.
    """

    command: ClassVar[str] = "compare"

    target: str
    overrides: list[str]
    axes: dict[str, list[str]]
    unit: str
    mode: Literal["predict", "measure"]
    device: str
    device_name: str
    gradient_reference: Literal["float64", "float32"] | None
    steps: int
    rounds: int
    reference: int
    rows: list[CompareRow]
    fit_bytes: int | None = None
    best: Best | None = None
    warnings: list[str] = Field(default_factory=list)
    interrupted: bool = False
