"""A memory estimate as a person reads it: the answer first, the next command last."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from bptool.analysis.memory.result import CategoryBytes, Fitting, MemoryEstimate
from bptool.instruments.memory.trace import CATEGORIES
from bptool.report.memory.explanation import render_explanation
from bptool.report.memory.snapshot_diff import render_diff
from bptool.report.module_tree import ModuleNode, module_tree
from bptool.report.text import aligned, columns, hanging, next_commands
from bptool.units import format_bytes, format_count

_BAR = 24
_TREE_DEPTH = 3


def render(estimate: MemoryEstimate, picture: str = "", width: int = 100) -> str:
    """The report.

    Args:
        picture: the step's memory over time, drawn already; empty: none.
        width: columns that sentences may take.
    """
    blocks = [
        _headline(estimate),
        aligned(_rows(estimate)),
        _categories(estimate),
        *([picture.rstrip("\n")] if picture else []),
        _phases(estimate),
        _largest(estimate),
        _modules(estimate),
        *([_what_if(estimate)] if estimate.what_if else []),
        *([_fitting(estimate)] if estimate.fitting or estimate.fits is False else []),
        *([render_explanation(estimate.explanation)] if estimate.explanation else []),
        *([render_diff(estimate.snapshot_diff)] if estimate.snapshot_diff else []),
        "\n".join(["assuming", *(hanging(sentence, width) for sentence in estimate.assumptions)]),
        next_commands(_next(estimate)),
    ]
    return "\n\n".join(blocks)


def _headline(estimate: MemoryEstimate) -> str:
    asked, device = " ".join([estimate.target, *estimate.settings]), estimate.gpu or estimate.device
    need, capacity = format_bytes(estimate.total_expected_bytes), estimate.capacity_bytes
    if capacity is None:
        return f"{asked} on {device}: needs {need}"
    verdict = "fits" if estimate.fits else "does not fit"
    return f"{asked} on {device}: {verdict}, needs {need} of {format_bytes(capacity)}"


def _rows(estimate: MemoryEstimate) -> list[tuple[str, str]]:
    when = f"in the {estimate.peak_phase}" if estimate.peak_phase else "outside of all phases"
    what = f", by {estimate.peak_op}" if estimate.peak_op else ""
    where = f", {estimate.peak_module}" if estimate.peak_module else ""
    rows = [("peak allocated", f"{format_bytes(estimate.peak_allocated_bytes)} {when}{where}{what}")]
    if estimate.measured:
        rows.append(("measured", _measured(estimate)))
    first = format_bytes(estimate.first_step_peak_allocated_bytes)
    rows.append(("first step", f"{first}, which begins without optimizer state"))
    if estimate.device == "cuda":
        low, high = format_bytes(estimate.total_low_bytes), format_bytes(estimate.total_high_bytes)
        rows += [
            ("peak reserved", f"{format_bytes(estimate.peak_reserved_bytes)} by the caching allocator"),
            ("outside of it", f"{format_bytes(estimate.overhead_bytes)} for the CUDA context and kernels"),
            ("in all", f"{format_bytes(estimate.total_expected_bytes)}, from {low} to {high}"),
        ]
    frozen = estimate.parameters_count - estimate.trainable_parameters_count
    trained = f", {format_count(frozen)} of them frozen" if frozen else ""
    return [*rows, ("model", f"{format_count(estimate.parameters_count)} parameters{trained}")]


def _measured(estimate: MemoryEstimate) -> str:
    assert estimate.measured is not None
    error = estimate.measured.relative_error
    how = "equal to the byte" if error == 0 else f"the prediction is {error:+.2%} off"
    return f"{format_bytes(estimate.measured.peak_allocated_bytes)} in a real step: {how}"


def _categories(estimate: MemoryEstimate) -> str:
    rows = [["what fills it", "at the peak", "", "most ever"]]
    for category in CATEGORIES:
        held, most = _bytes_of(estimate.at_peak, category), _bytes_of(estimate.maximum, category)
        share = held / max(estimate.peak_allocated_bytes, 1)
        bar = "█" * round(share * _BAR)
        rows.append([category.replace("_", " "), format_bytes(held), f"{share:4.0%} {bar}", format_bytes(most)])
    if estimate.loss_bytes:
        rows.append(["of these loss and logits", format_bytes(estimate.loss_bytes), "", ""])
    return columns(rows, right=(1, 3))


def _bytes_of(held: CategoryBytes, category: str) -> int:
    n_bytes: int = getattr(held, f"{category}_bytes")
    return n_bytes


def _phases(estimate: MemoryEstimate) -> str:
    rows = [["fullest instant of", "", "op", "module"]]
    for peak in estimate.phase_peaks:
        mark = " <- the peak" if peak.phase == estimate.peak_phase else ""
        rows.append([peak.phase, format_bytes(peak.peak_allocated_bytes), peak.op, peak.module + mark])
    return columns(rows, right=(1,))


def _largest(estimate: MemoryEstimate) -> str:
    rows = [["largest at the peak", "", "tensor", "made by", "in"]]
    for group in estimate.largest:
        tensor = f"{group.count} x {group.tensor}" if group.count > 1 else group.tensor
        rows.append([group.category.replace("_", " "), format_bytes(group.n_bytes), tensor, group.op, group.module])
    return columns(rows, right=(1,))


def _modules(estimate: MemoryEstimate) -> str:
    """The tree, as deep as is pleasant; the page unfolds all of it."""
    rows = [["module", "parameters", "activations"]]

    def add(node: ModuleNode, depth: int) -> None:
        name = "  " * depth + node.name
        rows.append([name, format_bytes(node.parameters_bytes), format_bytes(node.activations_bytes)])
        for child in node.children.values() if depth < _TREE_DEPTH else ():
            add(child, depth + 1)

    add(module_tree(estimate.modules), 0)
    return columns(rows, right=(1, 2))


def _what_if(estimate: MemoryEstimate) -> str:
    rows = [["what if", "peak", "saves"]]
    for one in estimate.what_if:
        saved = estimate.peak_allocated_bytes - one.peak_allocated_bytes
        sign = "-" if saved < 0 else ""
        rows.append([" ".join(one.settings), format_bytes(one.peak_allocated_bytes), sign + format_bytes(abs(saved))])
    return columns(rows, right=(1, 2))


def _recomputed(one: Fitting) -> str:
    if one.recompute_over_model_flops:
        return f"{one.recompute_over_model_flops:+.0%} FLOPs"
    policy = "activation_checkpoint.policy=save_matmuls"
    return "no products" if policy in one.settings else "none"


def _fitting(estimate: MemoryEstimate) -> str:
    rows = [["these would fit", "needs", "recompute", ""]]
    for one in estimate.fitting:
        result = "same result" if one.same_result else "other arithmetic"
        rows.append([" ".join(one.settings), format_bytes(one.total_expected_bytes), _recomputed(one), result])
    nothing = (
        "no precision, optimizer, recomputation or split of this batch fits; choose a smaller model or more devices"
    )
    lines = [columns(rows, right=(1,)) if estimate.fitting else nothing]
    most = [
        ("largest micro-batch", estimate.largest_micro_batch_size, "sequences"),
        ("longest sequence", estimate.longest_sequence_length, "tokens"),
    ]
    known = [(name, f"{count} {unit}, all else as it is") for name, count, unit in most if count]
    return "\n".join([*lines, *([aligned(known)] if known else [])])


def _next(estimate: MemoryEstimate) -> Sequence[str]:
    asked = shlex.join([estimate.target, *estimate.settings])
    gpu = f" --gpu {estimate.gpu}" if estimate.gpu else ""
    if estimate.fitting:
        settings = dict(setting.split("=", 1) for setting in [*estimate.settings, *estimate.fitting[0].settings])
        return [
            shlex.join(["bptool", "train", estimate.target, *(f"{key}={value}" for key, value in settings.items())])
        ]
    if estimate.fits is False:
        return [f"bptool memory-estimate {asked}{gpu} --what-if"]
    if not estimate.what_if:
        return [f"bptool memory-estimate {asked}{gpu} --what-if"]
    return [f"bptool train {asked}"]
