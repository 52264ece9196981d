"""What a check of gradients found: the JSON contract of `bptool gradcheck`."""

from __future__ import annotations

from typing import ClassVar, Literal

from bptool.analysis.gradcheck.estimators import EstimatorCheck
from bptool.analysis.gradcheck.identities.identity import Identity
from bptool.analysis.gradcheck.mutation.record import MutationCheck
from bptool.analysis.gradcheck.precision import PrecisionCheck
from bptool.analysis.result import Record, Result

Verdict = Literal[
    "right", "wrong", "kink", "nondeterministic", "precision_limited", "structurally_zero", "not_connected", "estimator"
]
"""right: it agrees with finite differences within their error bar. wrong: it does not, or it is NaN or infinite.
kink: left and right slopes differ here, and the gradient is right beside it. nondeterministic: a second evaluation
gives another value. precision_limited: the differences are too coarse for an error of 0.05% to be seen, or a factor is
exact to float32 only. structurally_zero: it is zero, or rounding, and so are the differences. not_connected: no path
leads from it to the loss. estimator: bptool's own
`straight_through` or `score_function` makes it an estimate; its error is its bias."""

FAILING: tuple[Verdict, ...] = ("wrong", "nondeterministic")


class TensorCheck(Record):
    """One parameter's or input's gradient g.

    An error e of g, both taken as vectors, is seen along K random directions v as <e, v>, which is normal with standard
    deviation ||e||.

    Attributes:
        relative_error: root of the sum over the directions of (finite difference - <g, v>)^2, over that of the larger
            of (finite differences)^2 and <g, v>^2: about ||e|| / ||g||. Where tensors share directions, what all of
            them differ by together over this one's own ||g|| sqrt(K).
        error_bar: the same with the differences' error bars in the numerator: a relative error below it is none.
        detectable_relative_error: the ||e|| / ||g|| from which an error of any form, chosen without knowing the seed,
            is caught in at least 99 of 100 runs.
        location: where the wrong entries are, in Python's index notation, or "everywhere"; None: it is not wrong, or
            others were searched first and that took long enough.
        cut_by: the operation that cuts the path to the loss, or a part of it; None: nothing does, or it is not used.
        detail: one clause more, for a person.
    """

    name: str
    kind: Literal["parameter", "input"]
    shape: list[int]
    verdict: Verdict
    relative_error: float | None = None
    error_bar: float | None = None
    detectable_relative_error: float | None = None
    location: str | None = None
    cut_by: str | None = None
    detail: str = ""


class ProbeCheck(Record):
    """One thing that a check of the numbers at one point leaves out."""

    name: str
    holds: bool
    detail: str = ""


class Cost(Record):
    """What the check cost, and what the plain method would.

    Attributes:
        forward_s, backward_s: one forward with its graph, and the backward after it.
        check_s: all of this check: the differences and probes, and what follows.
        identities_s, precision_s, mutations_s: those parts of it; 0: they were not asked for.
        passes: check_s over (forward_s + backward_s).
        forwards_count: evaluations of the function.
        finite_differences_forwards_count: two for each checked number.
        finite_differences_s: how long those would take.
    """

    forward_s: float
    backward_s: float
    check_s: float
    passes: float
    forwards_count: int
    finite_differences_forwards_count: int
    finite_differences_s: float
    identities_s: float = 0.0
    precision_s: float = 0.0
    mutations_s: float = 0.0


class GradcheckResult(Result):
    """Is the gradient right?

    Attributes:
        target, settings: in the user's words.
        passed: no tensor is wrong, no probe and no identity fails, nothing is NaN, and the target is deterministic.
        seed: with it, the same directions are taken again.
        sizes_cut: what was made smaller so that float64 can afford it; empty: nothing.
        assumptions: what was taken for granted or left out, and why.
        estimates: gradients that are estimates on purpose, beside the truth.
        precision: every gradient in another format beside float64's, where one was asked for.
        mutations: what became of known bugs in the target's backward, where that was asked for.
    """

    command: ClassVar[str] = "gradcheck"

    target: str
    settings: list[str]
    passed: bool
    seed: int
    tensors: list[TensorCheck]
    identities: list[Identity]
    probes: list[ProbeCheck]
    checked_count: int
    sizes_cut: list[str]
    assumptions: list[str]
    cost: Cost
    estimates: list[EstimatorCheck]
    precision: PrecisionCheck | None
    mutations: list[MutationCheck] | None = None

    def failures(self) -> list[str]:
        """What is not right, by name; empty where the check passed."""
        tensors = [f"{tensor.name} ({tensor.verdict})" for tensor in self.tensors if tensor.verdict in FAILING]
        probes = [f"probe {probe.name}" for probe in self.probes if not probe.holds]
        return [*tensors, *(f"identity {one.name}" for one in self.identities if not one.holds), *probes]
