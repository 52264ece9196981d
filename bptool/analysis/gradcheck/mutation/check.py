"""Every known bug, put into one operation of a target's own backward each, and what the check makes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from torch import Tensor

from bptool.analysis.gradcheck.mutation.calls import (
    CallSite,
    DoesNotApplyError,
    call_sites,
    gradients_with_formula,
)
from bptool.analysis.gradcheck.mutation.catching import Caught, Eye
from bptool.analysis.gradcheck.mutation.formulas import FORMULA_BUGS, FormulaBug
from bptool.analysis.gradcheck.mutation.gradients import GRADIENT_BUGS, GradientBug
from bptool.analysis.gradcheck.mutation.graph import Site, gradients_with, sent_at, sites, spread
from bptool.analysis.gradcheck.mutation.products import PRODUCT_BUGS
from bptool.analysis.gradcheck.mutation.record import MutationCheck
from bptool.analysis.gradcheck.probing import first_line
from bptool.analysis.gradcheck.subject import Gradients, Subject, gaussian_like

MOST_SITES = 3
"""Where a bug changes nothing in one operation, it is tried in so many."""
_FORMULAS = (*FORMULA_BUGS, *PRODUCT_BUGS)
COUNT = len(GRADIENT_BUGS) + len(_FORMULAS)

Progress = Callable[[int, int], None]


def mutations(subject: Subject, eye: Eye, progress: Progress = lambda done, of: None) -> list[MutationCheck]:
    """Put each bug in, and look: a forward and a backward each, as the differences are there already.

    Args:
        eye: what the check measured at this subject's point.
        progress: told how many bugs of how many are done.
    """
    made = _Mutations(subject, eye)
    found = []
    for done, record in enumerate(made.all(), 1):
        found.append(record)
        progress(done, COUNT)
    subject.clear()
    return found


class _Mutations:
    def __init__(self, subject: Subject, eye: Eye) -> None:
        self._subject = subject
        self._eye = eye
        self._sites = sites(subject)
        self._calls = call_sites(subject, {op for bug in _FORMULAS for op in bug.ops})
        self._used: Counter[str] = Counter()

    def all(self) -> Iterator[MutationCheck]:
        yield from (self._of_gradient(bug) for bug in GRADIENT_BUGS)
        yield from (self._of_formula(bug) for bug in _FORMULAS)

    def _of_gradient(self, bug: GradientBug) -> MutationCheck:
        fitting = [site for site in self._sites if bug.fits(site.shape)]
        order = spread(fitting, self._used, self._subject.generator("mutation", bug.name))
        tried = ((site.words, site, partial(self._mutated, bug, site)) for site in order)
        none = MutationCheck(name=bug.name, outcome="not_applicable", detail="no gradient has a shape for it")
        return self._first(none, tried)

    def _mutated(self, bug: GradientBug, site: Site) -> Gradients:
        self._used[site.op] += 1
        change: Callable[[Tensor], Tensor] = bug.change
        if bug.of_previous_call:
            stale = sent_at(self._subject, site, self._another_point())
            if stale is None:
                raise DoesNotApplyError
            change = partial(_replaced, stale)
        return gradients_with(self._subject, site, change)

    def _of_formula(self, bug: FormulaBug) -> MutationCheck:
        calls = [call for call in self._calls if call.op in bug.ops]
        order = spread(calls, self._used, self._subject.generator("mutation", bug.name, *bug.ops))
        tried = ((call.op, call, partial(gradients_with_formula, self._subject, call, bug.formula)) for call in order)
        ops = " or ".join(bug.ops)
        detail = f"no call of {ops} can have it" if calls else f"{ops} is not called"
        return self._first(MutationCheck(name=bug.name, op=ops, outcome="not_applicable", detail=detail), tried)

    def _first(
        self, none: MutationCheck, tried: Iterable[tuple[str, Site | CallSite, Callable[[], Gradients]]]
    ) -> MutationCheck:
        """The first place where the bug changes the gradient; the last of several where it does not."""
        last, count = none, 0
        for op, site, mutate in tried:
            here = MutationCheck(name=none.name, op=op, module=site.module, outcome="no_effect")
            try:
                last = _judged(here, self._eye.sees(mutate()))
            except DoesNotApplyError:
                continue
            except (RuntimeError, ValueError, AssertionError) as error:
                detail = f"the target's own backward refuses it: {first_line(error)}"
                last = here.model_copy(update={"outcome": "caught", "detail": detail})
            count += 1
            if last.outcome != "no_effect" or count == MOST_SITES:
                break
        return last

    def _another_point(self) -> dict[str, Tensor]:
        leaves = self._subject.leaves.items()
        generator = self._subject.generator("previous call")
        return {name: 0.1 * leaf.scale * gaussian_like(leaf.base, generator) for name, leaf in leaves}


def _replaced(stale: Tensor, gradient: Tensor) -> Tensor:
    return stale if stale.shape == gradient.shape else gradient


def _judged(here: MutationCheck, caught: Caught) -> MutationCheck:
    if not caught.changed:
        return here.model_copy(update={"detail": "the gradient stays the same but for rounding"})
    more = len(caught.changed) - 1
    detail = f"and in {more} more tensor{'s' if more > 1 else ''}" if more else ""
    if not caught.finite:
        detail = "the gradient is not finite"
    elif not caught.seen:
        detail = _why_missed(caught)
    return here.model_copy(
        update={
            "outcome": "caught" if caught.seen else "missed",
            "tensor": caught.tensor,
            "relative_error": caught.relative_error,
            "detectable_relative_error": caught.detectable,
            "detail": detail,
        }
    )


def _why_missed(caught: Caught) -> str:
    if caught.relative_error is None or caught.detectable is None:
        return "in a tensor for whose gradient there is no such limit"
    claimed = f"{caught.detectable:.1e} in {caught.tensor}"
    if caught.relative_error < caught.detectable:
        return f"the check claims to catch from {claimed} on"
    return f"though the check claims to catch from {claimed} on: one in 100 goes by, run it with another seed"
