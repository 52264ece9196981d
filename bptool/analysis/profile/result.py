"""Where do forward, backward and recomputation go? The Result of `bptool profile`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from bptool.analysis.result import Record, Result


class FlopCounts(Record):
    """FLOPs of one step, all its micro-batches together.

    Attributes:
        forward_flops, dgrad_flops, wgrad_flops, recompute_flops: of matrix products, convolutions and attention,
            wherever in the step they are done: a fused loss computes its gradients in the forward.
        optimizer_flops: arithmetic of clipping and the update, element by element.
        backward_over_forward: (dgrad + wgrad) / forward; None where the forward has no FLOPs.
    """

    forward_flops: int
    dgrad_flops: int
    wgrad_flops: int
    recompute_flops: int
    optimizer_flops: int
    backward_over_forward: float | None


class PhaseCounts(Record):
    """What one phase does, all micro-batches together, without the phases inside it.

    Attributes:
        flops: of matrix products, convolutions and attention; a fused loss's gradients are among the forward's.
        pointwise_flops: of all else, one for each result element of each arithmetic step.
    """

    phase: str
    flops: int
    pointwise_flops: int
    bytes_moved: int


class Duration(Record):
    """Seconds of a phase in each timed step: the median, the tenth and the ninetieth percentile, and all of them."""

    median_s: float
    p10_s: float
    p90_s: float
    samples_s: list[float]


class PhaseTimes(Record):
    """Each phase of a step, all its micro-batches together, without the phases inside it: `backward` has no recompute,
    but where that is compiled into it.

    Attributes:
        step: the whole of it.
        recompute: None where nothing is recomputed, and where it is compiled into the backward (`compiled`, and there
            are `recompute_flops`).
        backward_over_forward: median of the steps' ratios, in time.
        backward_over_forward_low, backward_over_forward_high: a 95% interval of that median.
        backward_over_forward_by_kind: the same with gradients that the forward computes early, as a fused loss does,
            counted as backward, as their FLOPs are; None where no step was recorded or there are none.
    """

    step: Duration
    data: Duration
    forward: Duration
    recompute: Duration | None
    backward: Duration
    clip: Duration
    optimizer: Duration
    backward_over_forward: float
    backward_over_forward_low: float
    backward_over_forward_high: float
    backward_over_forward_by_kind: float | None = None

    def of(self, phase: str) -> Duration | None:
        """A phase's, by its name; None where the step has no such phase."""
        found: Duration | None = getattr(self, phase)
        return found


class KindCosts(Record):
    """FLOPs and, where a step was timed, seconds, by what they are for. Seconds are medians over the recorded steps."""

    forward_flops: int
    dgrad_flops: int
    wgrad_flops: int
    recompute_flops: int
    forward_s: float | None = None
    dgrad_s: float | None = None
    wgrad_s: float | None = None
    recompute_s: float | None = None


class ModuleCost(KindCosts):
    """One module's own share of a step, without its submodules'; the list adds up to the step's.

    Attributes:
        name: under which it was called; empty for what no submodule does.
        calls: in the forwards of one step.
        status: `unused`: never called; `no_backward`: called, and no gradient comes back through it (frozen, and
            nothing before it is trained, or its result is not used); `frozen`: a gradient passes through it, and its
            own parameters are not trained.
    """

    name: str
    type: str
    calls: int
    parameters_count: int
    bytes_moved: int
    status: Literal["used", "frozen", "no_backward", "unused"]


class OpCost(Record):
    """One operation of aten's in one kind of work, over the whole step.

    Attributes:
        kind: forward, recompute, dgrad, wgrad or optimizer.
        bytes_moved: inputs read once, results written once.
        intensity: FLOPs, pointwise ones too, for each of these bytes; None where nothing is moved.
        bound: which roof of the roofline it is under; None where the roofline is not known.
        duration_s: median over the recorded steps; None where none was timed.
        predicted_s: at the measured rates of its kind, or by the roofline; None where neither is known.
    """

    op: str
    kind: str
    calls: int
    flops: int
    pointwise_flops: int
    bytes_moved: int
    intensity: float | None
    bound: Literal["compute", "memory"] | None
    duration_s: float | None
    predicted_s: float | None


class RatioTerm(Record):
    """Why the ratio is not 2: these terms add up to `flops.backward_over_forward - 2`.

    Attributes:
        detail: in words, with the modules that it is about.
    """

    name: str
    excess_over_two: float
    detail: str = ""


class RecomputeTerm(Record):
    """Why recomputation is not one more forward: these add up to recompute FLOPs / forward FLOPs - 1."""

    name: str
    excess_over_one: float
    detail: str = ""


class Convention(Record):
    """One way to count the FLOPs of a token, forward and backward, and the MFU that it gives.

    Attributes:
        formula: such as `6N + 12 L H Q T`.
        counts: what is in it, in words, and who uses it.
        headline: whether it is `mfu` above.
    """

    name: str
    formula: str
    counts: str
    flops_per_unit: float
    mfu: float | None
    headline: bool


class Roofline(Record):
    """A device's two roofs.

    Attributes:
        flops_per_s: dense matrix products in the step's format.
        bytes_per_s: memory.
        ridge: FLOPs for each byte where the roofs meet.
    """

    device: str
    flops_per_s: float
    flops_source: str
    bytes_per_s: float
    bytes_source: str
    ridge: float


class PredictedPhase(Record):
    """A phase's time from counted FLOPs and bytes, beside the measured one."""

    phase: str
    predicted_s: float
    measured_s: float | None
    relative_error: float | None


class PredictedTime(Record):
    """Step time from what was counted.

    Attributes:
        basis: which rates, in a sentence.
    """

    basis: str
    step_s: float
    units_per_s: float
    phases: list[PredictedPhase]


class Unexplained(Record):
    """A phase's measured time, and what operations account for.

    Attributes:
        measured_s: median of the timed steps, no instrument inside.
        operations_s: inside of operations, in the recorded steps.
        outside_s: between operations: Python, autograd, the recorder itself.
        unexplained_s: measured less the other two; negative where the recorder slowed the step down.
    """

    phase: str
    measured_s: float
    operations_s: float
    outside_s: float
    unexplained_s: float


class FiniteDifferences(Record):
    """The point of backpropagation: what all P gradients took, and what 2 P forwards would.

    Attributes:
        gradients_s: one backward, recomputation included.
        forwards: how many forwards' time that is.
        finite_differences_s: 2 P forwards.
    """

    parameters_count: int
    gradients_s: float
    forward_s: float
    forwards: float
    finite_differences_s: float


class PhaseMemory(Record):
    """Peak during a phase, predicted as `memory-estimate` does."""

    phase: str
    peak_allocated_bytes: int


class ProfileResult(Result):
    """One training step: counted in FLOPs exactly, and, where it was run, measured in time.

    Attributes:
        target, settings: in the user's words.
        device: `cpu` or `cuda`; gpu: which, where one was named or is there.
        unit, units_per_step: what a step works off, such as tokens.
        phases: what each does, in the step's order.
        time: None where no step was run; so are the figures that follow from it.
        tokens_per_s: of whatever `unit` is, from the median step.
        mfu: model FLOPs per second over `peak_flops_per_s`, by the headline convention; hfu: all FLOPs that are done.
        recorder_overhead: how much longer a recorded step takes, as a share; None where none was timed.
        compiled: the times are of a compiled model, and the FLOPs of the same model run eagerly.
        extrapolated_from_layers: depths that were counted in place of the model's own; empty: it was counted itself.
        warnings: what makes the figures doubtful, each with its remedy.
        interrupted: Ctrl-C came: the figures are of the steps until then.
    """

    command: ClassVar[str] = "profile"

    target: str
    settings: list[str]
    device: str
    gpu: str | None
    parameters_count: int
    trainable_parameters_count: int
    unit: str
    units_per_step: int
    flops: FlopCounts
    phases: list[PhaseCounts] = Field(default_factory=list)
    time: PhaseTimes | None
    tokens_per_s: float | None
    mfu: float | None
    hfu: float | None
    peak_flops_per_s: float | None
    peak_flops_source: str
    ratio_terms: list[RatioTerm]
    recompute_terms: list[RecomputeTerm]
    conventions: list[Convention]
    modules: list[ModuleCost]
    ops: list[OpCost]
    unexplained: list[Unexplained]
    recorder_overhead: float | None
    roofline: Roofline | None
    predicted: PredictedTime | None
    finite_differences: FiniteDifferences | None
    memory: list[PhaseMemory]
    compiled: bool
    extrapolated_from_layers: list[int]
    assumptions: list[str]
    warnings: list[str]
    interrupted: bool

    @property
    def recomputes_in_backward(self) -> bool:
        """Whether the backward's time is with recomputation, which was compiled into it."""
        return bool(self.time and self.time.recompute is None and self.flops.recompute_flops)

    @property
    def flops_ratio(self) -> float | None:
        """Of backward over forward, in the FLOPs of what the ratio of times is of; None where the forward has none."""
        alone = self.flops.backward_over_forward
        if alone is None or not self.recomputes_in_backward:
            return alone
        return alone + self.flops.recompute_flops / self.flops.forward_flops
