"""Comparisons to show: figures made up by a rule, as no step is run for them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

from bptool.analysis.compare.result import Best, CompareResult, CompareRow, Ratio, StepTimes
from bptool.units import MIB

HOSTILE = """</script></style><img src=x onerror="alert(1)"> & &lt; ' --> ]]>"""
POLICIES = {  # memory held by activations, and time, over those of `none`
    "none": (1.0, 1.0),
    "full": (0.22, 1.31),
    "every_k": (0.55, 1.17),
    "attention": (0.7, 1.12),
    "mlp": (0.5, 1.2),
    "selective": (0.48, 1.08),
    "offload": (0.2, 2.6),
    "budget": (0.4, 1.1),
}
PRECISIONS = {"fp32": (1.0, 1.0, 2.1e-7), "bf16-mixed": (0.62, 0.71, 3.2e-3), "bf16": (0.5, 0.66, 8.9e-3)}
FAILURES = ("unsupported", "out_of_memory", "gradients_differ", "failed", "timed_out", "diverged", "not_run")
STATE = {"parameters": 40 * MIB, "optimizer_state": 80 * MIB, "inputs": MIB // 4, "gradients": 40 * MIB}


def measured_row(policy: str, precision: str, batch: int = 1) -> CompareRow:
    """A row that was run; a larger batch takes memory in proportion, and less time a token."""
    (held, slower), (narrow, faster, error) = POLICIES[policy], PRECISIONS[precision]
    activations = int(300 * MIB * held * narrow * batch)
    categories = {**STATE, "activations": activations, "temporaries": 12 * MIB}
    step = 0.120 * slower * faster * batch**0.9
    recompute = max(slower - 1.0, 0.0) * step / slower if policy != "offload" else 0.0
    return CompareRow(
        settings={
            "activation_checkpoint.policy": policy,
            "precision.mode": precision,
            "training.micro_batch_size": batch,
        },
        label=f"{policy} · {precision}" + (f" · {batch}" if batch > 1 else ""),
        status="ok",
        predicted_peak_bytes=sum(categories.values()),
        predicted_total_bytes=sum(categories.values()) + 100 * MIB,
        predicted_step_s=0.9 * step,
        predicted_category_bytes=categories,
        measured_peak_bytes=sum(categories.values()) + (0 if precision == "fp32" else 3 * MIB),
        step_s=StepTimes(median=step, p10=0.97 * step, p90=1.06 * step, samples=[0.97 * step, step, 1.06 * step]),
        tokens_per_s=512 * batch / step,
        forward_s=step * 0.3,
        recompute_s=recompute,
        backward_s=step * 0.6,
        recompute_flops_share=recompute / step,
        gradient_relative_error=error,
        worst_layer="blocks.3.attention",
        worst_layer_relative_error=2.5 * error,
        first_loss=5.545,
        final_loss=2.301 + error,
        peak_ratio=sum(categories.values()) / (472 * MIB),
        time_ratio=Ratio(
            value=slower * faster, low=slower * faster - 0.04, high=slower * faster + 0.04,
            significant=abs(slower * faster - 1) > 0.04,
        ),
    )  # fmt: skip


def failed_row(status: str) -> CompareRow:
    """A row without figures."""
    return CompareRow.model_validate(
        {
            "settings": {"activation_checkpoint.policy": "full", "precision.mode": f"fp16 {status}"},
            "label": f"full · fp16 · {status}",
            "status": status,
            "reason": f"the process said: {status} after 3 steps",
        }
    )


def comparison(rows: list[CompareRow], changes: Mapping[str, Any] | None = None) -> CompareResult:
    """A measured grid of these rows, with `changes` on top; the front is of the rows that are ok."""
    ok = [row for row in rows if row.status == "ok"]
    judged = [row.model_copy(update=_standing(row, rows, ok)) for row in rows]
    figures: dict[str, Any] = {
        "target": "tiny",
        "overrides": ["training.steps=20"],
        "axes": {"activation_checkpoint.policy": ["none", "full"], "precision.mode": ["fp32", "bf16-mixed"]},
        "unit": "tokens",
        "mode": "measure",
        "device": "cpu",
        "device_name": "AMD EPYC 7R13",
        "gradient_reference": "float64",
        "steps": 5,
        "rounds": 4,
        "reference": 0,
        "rows": judged,
    }
    return CompareResult(**{**figures, **(changes or {})})


def _figures(row: CompareRow) -> tuple[float, float, float]:
    assert row.measured_peak_bytes
    assert row.tokens_per_s
    return row.measured_peak_bytes, 1 / row.tokens_per_s, row.gradient_relative_error or 0.0


def _standing(row: CompareRow, rows: list[CompareRow], ok: list[CompareRow]) -> dict[str, Any]:
    if row.status != "ok":
        return {}
    mine = _figures(row)
    better = [
        one for one in ok if _figures(one) != mine and all(a <= b for a, b in zip(_figures(one), mine, strict=True))
    ]
    return {"on_front": not better, "dominated_by": [rows.index(one) for one in better][:3]}


def small_comparison(changes: Mapping[str, Any] | None = None) -> CompareResult:
    """Three policies by two precisions; the fastest within 256 MiB is row 6."""
    rows = [
        measured_row(policy, mode) for policy, mode in product(("none", "full", "selective"), ("fp32", "bf16-mixed"))
    ]
    best = Best(
        row=5,
        settings=rows[5].settings,
        command="bptool train tiny activation_checkpoint.policy=selective precision.mode=bf16-mixed",
        needed_bytes=rows[5].measured_peak_bytes or 0,
    )
    return comparison(rows, {"fit_bytes": 270 * MIB, "best": best, **(changes or {})})


def predicted_comparison(changes: Mapping[str, Any] | None = None) -> CompareResult:
    """The small one, where nothing was run; without a limit."""
    ran = {"measured_peak_bytes": None, "step_s": None, "first_loss": None, "final_loss": None}
    compared = {"gradient_relative_error": None, "worst_layer": None, "worst_layer_relative_error": None}
    rows = [row.model_copy(update={**ran, **compared}) for row in small_comparison().rows]
    asked = {"mode": "predict", "rows": rows, "fit_bytes": None, "best": None, "gradient_reference": None}
    return small_comparison({**asked, "device_name": "H200", **(changes or {})})


def large_comparison(batches: int = 1, changes: Mapping[str, Any] | None = None) -> CompareResult:
    """All policies by all precisions by so many micro-batch sizes."""
    sizes = [2**i for i in range(batches)]
    return comparison([measured_row(*axes) for axes in product(POLICIES, PRECISIONS, sizes)], changes)


def mixed_comparison(changes: Mapping[str, Any] | None = None) -> CompareResult:
    """Four rows with figures, and one of each kind without."""
    rows = [measured_row(policy, "fp32") for policy in ("none", "full", "mlp", "budget")]
    rows[3] = rows[3].model_copy(update={"notes": ["the plan recomputes 9 of 14 kinds of op; optimality gap 0"]})
    return comparison(
        [*rows, *map(failed_row, FAILURES)],
        {"warnings": ["The machine was busy: load 3.1 on 2 cores."], **(changes or {})},
    )


def hostile_comparison() -> CompareResult:
    """Every name is markup."""
    row = measured_row("none", "fp32").model_copy(
        update={"label": HOSTILE, "settings": {HOSTILE: HOSTILE}, "worst_layer": HOSTILE, "notes": [HOSTILE]}
    )
    bad = failed_row("failed").model_copy(update={"reason": HOSTILE})
    return comparison([row, bad], {"target": HOSTILE, "overrides": [HOSTILE], "warnings": [HOSTILE]})
