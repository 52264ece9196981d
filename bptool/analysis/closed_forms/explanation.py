"""The estimate's own audit: each closed form beside what the ledger counted, and why the two differ where they do."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

import torch

from bptool.analysis.closed_forms import terms
from bptool.analysis.closed_forms.formula import total
from bptool.analysis.closed_forms.moments import end_of_forward, moment_of
from bptool.analysis.closed_forms.peak_terms import Share, is_logits, peak_shares
from bptool.analysis.closed_forms.saved_tensors import (
    WEIGHT_COPY,
    Device,
    Saved,
    after_saved,
    before_saved,
    block_saved,
)
from bptool.analysis.closed_forms.terms import DERIVATIVES, Parameter, Term
from bptool.analysis.memory.simulation import STEADY
from bptool.analysis.memory.sweeps import block_of
from bptool.analysis.result import Record
from bptool.config.schema import Config
from bptool.instruments.memory.trace import Allocation, Category, MemoryTrace, total_bytes
from bptool.training.activation_checkpoint import recomputed_blocks
from bptool.units import format_bytes

_CUDA_BLOCK = 512
"""Bytes of which CUDA's allocator hands out multiples."""

_NAMED = 3
"""How many of the ledger's tensors a sentence names."""


class ExplainedTerm(Record):
    """A closed form beside the ledger's count.

    Attributes:
        formula: with the numbers put in; empty where there is no closed form.
        source: where the formula comes from.
        instant: when the ledger counted.
        predicted_bytes: None where there is no closed form.
        difference_bytes: the ledger's less the predicted.
        why: what makes the difference, or why it is there at all; may be empty where there is none.
        parts: what the term is the sum of.
    """

    name: str
    formula: str
    source: str
    instant: str
    predicted_bytes: int | None
    ledger_bytes: int
    difference_bytes: int | None
    why: str
    parts: list[ExplainedTerm]


class BytesPerParameter(Record):
    """What the recipe holds of each parameter, in bytes; without `lasting` it is the forward's and gone after it."""

    name: str
    per_parameter_bytes: float
    lasting: bool


class Explanation(Record):
    """Closed forms of one architecture and recipe, audited.

    Attributes:
        terms: each at the instant when the ledger holds all of it.
        literature: a layer as a paper counts it, beside this model's.
        bytes_per_parameter: the recipe.
        peak: what adds up to the step's peak, at that instant.
        peak_predicted_bytes: the sum of the closed forms among them.
        peak_ledger_bytes: the step's peak.
        no_closed_form: settings, or the user's own module, that the closed forms do not know.
        verdict: a sentence or two.
    """

    terms: list[ExplainedTerm]
    literature: list[ExplainedTerm]
    bytes_per_parameter: list[BytesPerParameter]
    peak: list[ExplainedTerm]
    peak_instant: str
    peak_predicted_bytes: int
    peak_ledger_bytes: int
    no_closed_form: list[str]
    verdict: str


def explain(config: Config, trace: MemoryTrace, device: Literal["cpu", "cuda"] = "cpu") -> Explanation:
    """Pair each closed form with the ledger's count in the record of a simulated step.

    Where the config has what no closed form covers, or the model is the user's own, only weights, gradients and
    optimizer state are predicted, from the parameters that the ledger saw.

    Args:
        trace: of `simulate_deep`, or of the same step under CUDA's stand-in, with sizes rounded as its allocator does.
        device: whose kernels the step was simulated with.
    """
    kernels = _kernels(trace, device)
    own = config.run.workload
    unknown = [f"the activations of {own}"] if own else terms.uncovered(config, kernels)
    parameters = _ledger_parameters(trace) if unknown else terms.parameters_of(config)
    found = _states(config, parameters, trace, kernels)
    literature: list[ExplainedTerm] = []
    if not unknown:
        found += [_inputs(config, trace), *_activations(config, trace, kernels), _logits(config, trace)]
        literature = _literature(config, trace, kernels)
    peak_event = trace.peak_event(STEADY)
    live, moment = trace.live_at(peak_event), moment_of(trace, peak_event)
    shares = peak_shares(config, parameters, live, moment, kernels, covered=not unknown)
    instant = _place(trace, peak_event)
    peak = [_explained_share(share, instant) for share in shares if share.held or (share.size and share.size.n_bytes)]
    predicted, held = sum(term.predicted_bytes or 0 for term in peak), int(trace.live_bytes[peak_event])
    return Explanation(
        terms=found,
        literature=literature,
        bytes_per_parameter=_per_parameter(config, parameters, kernels, covered=not unknown),
        peak=peak,
        peak_instant=instant,
        peak_predicted_bytes=predicted,
        peak_ledger_bytes=held,
        no_closed_form=unknown,
        verdict=_verdict(found, peak, held, unknown),
    )


def _kernels(trace: MemoryTrace, device: Literal["cpu", "cuda"]) -> Device:
    with_cudnn = any("cudnn_attention" in allocation.op for allocation in trace.allocations)
    return "cuda-cudnn" if device == "cuda" and with_cudnn else device


def _ledger_parameters(trace: MemoryTrace) -> list[Parameter]:
    """The parameters of a model that no closed form knows; buffers are among them."""
    found = []
    for allocation in trace.allocations:
        if allocation.category == "parameters":
            dtype, _, sizes = allocation.tensor.partition("[")
            shape = tuple(int(size) for size in sizes.rstrip("]").split(",") if size.strip())
            in_block = any(part.isdigit() for part in allocation.module.split("."))
            found.append(Parameter(shape, in_block, getattr(torch, dtype).itemsize))
    return found


def _states(config: Config, parameters: Sequence[Parameter], trace: MemoryTrace, device: Device) -> list[ExplainedTerm]:
    update = trace.events_of(STEADY, "optimizer")
    live = trace.live_at(int(update[0]))
    kinds: list[tuple[Category, Term]] = [
        ("parameters", terms.weights(parameters)),
        ("gradients", terms.gradients(parameters)),
        ("optimizer_state", terms.optimizer_state(config, parameters, device)),
    ]
    why = "parameters that are not trained, and buffers, have no gradient and no state"
    return [
        _explained(term, [a for a in live if a.category == kind], "when the optimizer begins", why)
        for kind, term in kinds
    ]


def _inputs(config: Config, trace: MemoryTrace) -> ExplainedTerm:
    live = trace.live_at(int(trace.events_of(STEADY, "optimizer")[0]))
    return _explained(terms.inputs(config), [a for a in live if a.category == "inputs"], "all through the step")


def _activations(config: Config, trace: MemoryTrace, device: Device) -> list[ExplainedTerm]:
    """One block tensor by tensor, all the blocks, and what is outside of them."""
    instant, kept = "when the forward ends", _kept_by_forward(trace)
    layers = range(config.model.n_layers)
    blocks: defaultdict[int | None, list[Allocation]] = defaultdict(list)
    for allocation in kept:
        blocks[block_of(allocation.module)].append(allocation)
    forms = {i: block_saved(config, i, device) for i in layers}
    shown = _shown_blocks(config, device)
    ones = [_itemized(f"activations of blocks.{i}", forms[i], blocks[i], instant, f"blocks.{i}") for i in shown]
    all_blocks = Term("activations of all blocks", total(s.size for i in layers for s in forms[i]), DERIVATIVES)
    return [
        *ones,
        _explained(all_blocks, [a for i in layers for a in blocks[i]], instant, "see the block's own tensors"),
        _itemized(
            "activations outside of the blocks",
            [*before_saved(config, device), *after_saved(config, device)],
            blocks[None],
            instant,
        ),
    ]


def _shown_blocks(config: Config, device: Device) -> list[int]:
    """One of each kind, away from the ends where there is one."""
    by_form = {tuple(s.name for s in block_saved(config, i, device)): i for i in reversed(range(config.model.n_layers))}
    return sorted(by_form.values())


def _kept_by_forward(trace: MemoryTrace) -> list[Allocation]:
    """What the last forward has made and still holds at its end, whatever becomes of it; empty tensors hold nothing."""
    moment = end_of_forward(trace)
    live = trace.live_at(moment.event)
    return [a for a in live if a.born >= moment.since and a.phase == "forward" and a.n_bytes]


def _itemized(
    name: str, saved: Sequence[Saved], held: Sequence[Allocation], instant: str, block: str | None = None
) -> ExplainedTerm:
    """A sum whose parts are paired by size, and in a block by the module that made them too."""
    left, parts = list(held), []
    for one in saved:
        place = None if block is None else f"{block}.{one.module}".rstrip(".")
        alike = (a for a in left if _is_as_large(a, one.size.n_bytes) and place in (None, a.module))
        allocation = next(alike, None)
        left = [a for a in left if a is not allocation]
        parts.append(_explained_part(one, allocation, instant))
    parts += [_unforeseen(a, instant) for a in left]
    wrong = [part for part in parts if part.difference_bytes != 0]
    why = "; ".join(f"{part.name}: {part.why}" for part in wrong[:_NAMED])
    term = _explained(Term(name, total(one.size for one in saved), DERIVATIVES), held, instant, why)
    return term.model_copy(update={"parts": parts})


def _is_as_large(allocation: Allocation, n_bytes: int) -> bool:
    return allocation.n_bytes in (n_bytes, -(-n_bytes // _CUDA_BLOCK) * _CUDA_BLOCK)


def _explained_part(one: Saved, allocation: Allocation | None, instant: str) -> ExplainedTerm:
    held = 0 if allocation is None else allocation.n_bytes
    made_by = "the ledger has no such tensor" if allocation is None else allocation.op
    return ExplainedTerm(
        name=f"{one.module}: {one.name}" if one.module else one.name,
        formula=one.size.formula,
        source=DERIVATIVES,
        instant=instant,
        predicted_bytes=one.size.n_bytes,
        ledger_bytes=held,
        difference_bytes=held - one.size.n_bytes,
        why=f"{made_by}: {one.reason}" if one.reason else made_by,
        parts=[],
    )


def _unforeseen(allocation: Allocation, instant: str) -> ExplainedTerm:
    return ExplainedTerm(
        name=f"{allocation.module}: {allocation.tensor}",
        formula="",
        source="",
        instant=instant,
        predicted_bytes=None,
        ledger_bytes=allocation.n_bytes,
        difference_bytes=None,
        why=f"{allocation.op} made it; no closed form has it",
        parts=[],
    )


def _logits(config: Config, trace: MemoryTrace) -> ExplainedTerm:
    """The ledger's most of them at once."""
    term = terms.logits(config)
    live: list[Allocation] = []
    most: list[Allocation] = []
    for event in trace.events_of(STEADY).tolist():
        index = trace.events[event].allocation
        if index is not None and is_logits(config, trace.allocations[index]):
            if trace.events[event].delta > 0:
                live.append(trace.allocations[index])
            else:
                live = [a for a in live if a is not trace.allocations[index]]
            most = max(most, list(live), key=total_bytes)
    return _explained(term, most, "when there are most", "the loss's own order of operations")


def _literature(config: Config, trace: MemoryTrace, device: Device) -> list[ExplainedTerm]:
    """The paper's count of a layer beside this model's own, and where they part."""
    if not terms.is_gpt_layer(config):
        return []
    recomputed = recomputed_blocks(config.model.n_layers, config.activation_checkpoint)
    kept = _kept_by_forward(trace)
    return [
        _explained(
            term,
            [a for a in kept if block_of(a.module) == index],
            f"blocks.{index} when the forward ends",
            _departures(config, index, device),
        )
        for index in _shown_blocks(config, device)
        for term in terms.paper_layers(config, recomputed=index in recomputed)
    ]


def _departures(config: Config, index: int, device: Device) -> str:
    """Where this block departs from the paper's."""
    reasons: Counter[str] = Counter()
    for one in block_saved(config, index, device):
        if one.reason:
            reasons[one.reason] += one.size.n_bytes
    apart = [f"{reason} ({format_bytes(n_bytes)} of such tensors)" for reason, n_bytes in reasons.most_common()]
    if not config.model.dropout:
        apart.insert(0, "there is no dropout")
    if config.model.attention == "sdpa" and not config.model.dropout:
        apart.insert(0, "fused attention keeps no scores")
    if config.precision.mode in ("fp32", "tf32"):
        apart.insert(0, "numbers have 4 bytes where the paper's have 2")
    return "; ".join(apart)


def _per_parameter(
    config: Config, parameters: Sequence[Parameter], device: Device, *, covered: bool
) -> list[BytesPerParameter]:
    """The recipe; autocast's copies only where closed forms cover the model, as the blocks' tensors are known then."""
    rows = [
        BytesPerParameter(name=name, per_parameter_bytes=each, lasting=True)
        for name, each in terms.bytes_per_parameter(config, parameters, device)
    ]
    copied = 0
    if covered:
        layers = range(config.model.n_layers)
        copied = sum(s.size.n_bytes for i in layers for s in block_saved(config, i, device) if s.name == WEIGHT_COPY)
    if copied:
        each = copied / sum(p.count for p in parameters)
        name = "16-bit copies of linear layers, until their backward"
        rows.append(BytesPerParameter(name=name, per_parameter_bytes=each, lasting=False))
    return rows


def _explained(term: Term, held: Sequence[Allocation], instant: str, why: str = "") -> ExplainedTerm:
    n_bytes = total_bytes(held)
    difference = n_bytes - term.size.n_bytes
    if _is_rounding(held, difference):
        why = f"CUDA's allocator rounds each of {len(held):,} tensors up to {_CUDA_BLOCK} bytes"
    return ExplainedTerm(
        name=term.name,
        formula=term.size.formula,
        source=term.source,
        instant=instant,
        predicted_bytes=term.size.n_bytes,
        ledger_bytes=n_bytes,
        difference_bytes=difference,
        why=why if difference else "",
        parts=[],
    )


def _is_rounding(held: Sequence[Allocation], difference: int) -> bool:
    """Whether no more is missing than what rounding up can add."""
    return 0 <= difference < _CUDA_BLOCK * len(held) and all(a.n_bytes % _CUDA_BLOCK == 0 for a in held)


def _explained_share(share: Share, instant: str) -> ExplainedTerm:
    if share.size is not None:
        return _explained(Term(share.name, share.size, ""), share.held, instant, share.why)
    return ExplainedTerm(
        name=share.name,
        formula="",
        source="",
        instant=instant,
        predicted_bytes=None,
        ledger_bytes=total_bytes(share.held),
        difference_bytes=None,
        why=f"no closed form: {_largest(share.held)}",
        parts=[],
    )


def _largest(held: Sequence[Allocation]) -> str:
    """The operations and modules that made most of it."""
    made: Counter[tuple[str, str]] = Counter()
    for a in held:
        made[a.op, ".".join("*" if part.isdigit() else part for part in a.module.split("."))] += a.n_bytes
    return ", ".join(
        f"{op}{f' in {module}' if module else ''} ({format_bytes(n_bytes)})"
        for (op, module), n_bytes in made.most_common(_NAMED)
    )


def _place(trace: MemoryTrace, event: int) -> str:
    at = trace.events[event]
    return f"{at.phase}, {at.op or 'a release'}{f' in {at.module}' if at.module else ''}"


def _verdict(found: Sequence[ExplainedTerm], peak: Sequence[ExplainedTerm], held: int, unknown: Sequence[str]) -> str:
    rounded = [term for term in found if term.difference_bytes and term.why.startswith("CUDA's allocator")]
    wrong = [term for term in found if term.difference_bytes and term not in rounded]
    exact = f"{len(found) - len(wrong)} of {len(found)} closed forms agree with the ledger to the byte"
    exact += ", but for the allocator's rounding" if rounded else ""
    if wrong:
        exact += "; " + ", ".join(f"{term.name} differs by {term.difference_bytes:+,} B" for term in wrong)
    explained = sum(min(term.predicted_bytes, term.ledger_bytes) for term in peak if term.predicted_bytes is not None)
    rest = next((term for term in peak if term.name == "rest"), None)
    words = [exact, f"at the peak they account for {explained / held:.2%} of {format_bytes(held)}"]
    if rest is not None:
        words.append(f"the rest is {format_bytes(rest.ledger_bytes)} of temporaries, with {rest.why}")
    if unknown:
        words.append(f"no closed form for {', '.join(unknown)}")
    return ". ".join(word[0].upper() + word[1:] for word in words) + "."
