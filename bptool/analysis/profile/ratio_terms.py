"""Why backward over forward is not 2, and recomputation over forward not 1, in terms that add up exactly.

A layer owes two gradients, each of as many FLOPs as its forward: a ratio of 2. Every module's `dgrad + wgrad` less
`2 forward` is put under the reason for it; together these are the ratio less 2, as fractions, before anything is
rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import NamedTuple

from bptool.analysis.profile.result import RatioTerm, RecomputeTerm
from bptool.analysis.profile.tally import NOTHING, Cost, ModuleFacts, Tally
from bptool.instruments.operations.trace import Kind

RESCORING = "attention's backward computes the scores again"
NO_DGRAD = "no gradient of the input is wanted"
NO_WGRAD = "frozen parameters have no gradient"
NO_BACKWARD = "no gradient comes back"
EMBEDDINGS = "embeddings are looked up: no FLOPs in either direction"

NOT_RECOMPUTED = "blocks that keep their activations"
EARLY_STOP = "early stop: what no gradient needs is not made again"
OUTSIDE = "outside of the recomputed blocks"
AGAIN = "made more than once again"

_ATTENTION = "attention"


class Term(NamedTuple):
    """A part of a ratio, unrounded."""

    name: str
    excess: Fraction
    modules: tuple[str, ...]


def ratio_terms(tally: Tally) -> list[RatioTerm]:
    """Largest first; they add up to (dgrad + wgrad) / forward - 2. Empty where the forward has no FLOPs."""
    return [
        RatioTerm(name=term.name, excess_over_two=float(term.excess), detail=_listed(term.modules))
        for term in exact_ratio_terms(tally)
    ]


def recompute_terms(tally: Tally) -> list[RecomputeTerm]:
    """Largest first; they add up to recompute / forward - 1. Empty where nothing is recomputed."""
    return [
        RecomputeTerm(name=term.name, excess_over_one=float(term.excess), detail=_listed(term.modules))
        for term in exact_recompute_terms(tally)
    ]


def exact_ratio_terms(tally: Tally) -> list[Term]:
    """The same as fractions."""
    parts = [part for name, costs in _products(tally) for part in _parts(name, costs, tally.modules.get(name))]
    parts += [(EMBEDDINGS, 0, name) for name in _embeddings(tally)]
    return _summed(parts, tally.flops("forward"))


def exact_recompute_terms(tally: Tally) -> list[Term]:
    """The same as fractions."""
    if not tally.flops("recompute"):
        return []
    flops = {name: (_flops(costs, "forward"), _flops(costs, "recompute")) for name, costs in tally.by_module().items()}
    again = {name for name, facts in tally.modules.items() if facts.recomputed}
    alike = {_pattern(name) for name in again}
    parts = [
        (_recompute_reason(name, made > forward, again, alike), made - forward, name)
        for name, (forward, made) in flops.items()
        if made != forward
    ]
    return _summed(parts, tally.flops("forward"))


_Part = tuple[str, int, str]
"""Reason, FLOPs in excess, module."""


def _parts(name: str, costs: Mapping[str, dict[Kind, Cost]], facts: ModuleFacts | None) -> Iterator[_Part]:
    """Of one module: its fused attention, and its other products."""
    for of, kinds in costs.items():
        forward, dgrad, wgrad = (_flops(kinds, kind) for kind in ("forward", "dgrad", "wgrad"))
        excess = dgrad + wgrad - 2 * forward
        if not excess:
            continue
        frozen = facts is not None and facts.parameters and not facts.trainable
        if not dgrad and not wgrad:
            yield NO_BACKWARD, excess, name
        elif of == _ATTENTION and excess > 0:
            yield RESCORING, excess, name
        elif (excess == -forward and not dgrad) or (wgrad == forward and dgrad < forward):
            yield NO_DGRAD, excess, name
        elif excess == -forward and frozen:
            yield NO_WGRAD, excess, name
        else:
            yield f"other products of {_pattern(name) or 'the model itself'}", excess, name


def _products(tally: Tally) -> Iterator[tuple[str, Mapping[str, dict[Kind, Cost]]]]:
    """Each module with FLOPs: those of fused attention, those of batched products, and the others.

    A product of two activations is a batched one, and owes both of its gradients to them; kept apart, they leave a
    gradient of each weight beside its forward.
    """
    found: dict[str, dict[str, dict[Kind, Cost]]] = {}
    for place, cost in tally.costs.items():
        if cost.flops and place.kind in ("forward", "dgrad", "wgrad"):
            costs = found.setdefault(place.module, {}).setdefault(_class_of(place.op), {})
            costs[place.kind] = costs.get(place.kind, NOTHING).plus(cost)
    yield from found.items()


def _class_of(op: str) -> str:
    if "attention" in op or "flex" in op:
        return _ATTENTION
    return "batched" if "bmm" in op else ""


def _embeddings(tally: Tally) -> list[str]:
    return list(dict.fromkeys(place.module for place in tally.costs if place.op == "embedding"))


def _recompute_reason(name: str, more: bool, again: set[str], alike: set[str]) -> str:
    """Why a module's recomputation is not its forward.

    Args:
        again: modules that were recomputed; alike: their patterns.
    """
    if more:
        return AGAIN
    around = _prefixes(name)
    if any(prefix in again for prefix in around):
        return EARLY_STOP
    return NOT_RECOMPUTED if any(_pattern(prefix) in alike for prefix in around) else OUTSIDE


def _summed(parts: Iterable[_Part], forward: int) -> list[Term]:
    """One term a reason, as shares of the forward."""
    excess: dict[str, int] = {}
    modules: dict[str, list[str]] = {}
    for reason, flops, name in parts:
        excess[reason] = excess.get(reason, 0) + flops
        modules.setdefault(reason, []).append(name)
    if not forward:
        return []
    terms = [Term(reason, Fraction(flops, forward), tuple(modules[reason])) for reason, flops in excess.items()]
    return sorted(terms, key=lambda term: -abs(term.excess))


def _flops(costs: Mapping[Kind, Cost], kind: Kind) -> int:
    return costs.get(kind, NOTHING).flops


def _prefixes(name: str) -> list[str]:
    """`a.0.b` to `["", "a", "a.0", "a.0.b"]`."""
    parts = name.split(".") if name else []
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


def _pattern(name: str) -> str:
    """`blocks.3.attention` to `blocks.*.attention`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _listed(names: Iterable[str]) -> str:
    """Patterns of modules, and how many each one stands for."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = _pattern(name) or "the model itself"
        counts[pattern] = counts.get(pattern, 0) + 1
    return ", ".join(f"{pattern} ({count})" if count > 1 else pattern for pattern, count in counts.items())
