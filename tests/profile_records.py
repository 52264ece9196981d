"""Profiles to show: a small one with times, a deep one that was only counted, and one whose every name is hostile.

Their figures belong together as those of a real profile do: modules and operations add up to the step, terms to the
ratio.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bptool.analysis.profile.result import (
    Convention,
    Duration,
    FiniteDifferences,
    FlopCounts,
    ModuleCost,
    OpCost,
    PhaseCounts,
    PhaseMemory,
    PhaseTimes,
    PredictedPhase,
    PredictedTime,
    ProfileResult,
    RatioTerm,
    RecomputeTerm,
    Roofline,
    Unexplained,
)

HOSTILE = """</script></style><img src=x onerror="alert(1)"> & &lt; ' --> ]]>"""
PEAK, BANDWIDTH = 100e9, 20e9


def _modules(layers: int, width: int, tokens: int, *, timed: bool, recomputes: bool) -> Iterator[ModuleCost]:
    """Blocks of attention, a projection and a norm, between an embedding and a loss whose weights are frozen.

    Attention's backward is half as much again as what it owes its input alone.
    """

    def module(name: str, kind: str, flops: int, seconds: float, parameters: int, status: str = "used") -> ModuleCost:
        again = recomputes and name.startswith("blocks")
        trained = status == "used"
        costs: dict[str, Any] = {
            "forward_flops": flops,
            "dgrad_flops": flops * 3 // 2 if kind == "Attention" else flops,
            "wgrad_flops": 0 if name == "loss" or not trained else flops,
            "recompute_flops": flops if again else 0,
        }
        if timed:
            costs |= {
                "forward_s": seconds,
                "dgrad_s": seconds * 1.1,
                "wgrad_s": seconds * 1.2 if trained else 0.0,
                "recompute_s": seconds if again else 0.0,
            }
        return ModuleCost(
            name=name,
            type=kind,
            calls=0 if status == "unused" else 1,
            parameters_count=parameters,
            bytes_moved=8 * tokens * width,
            status=status,
            **costs,
        )

    linear = 2 * tokens * width * width
    yield module("embedding", "Embedding", 0, 0.002, 1000 * width)
    for i in range(layers):
        slower = 1 + i / 100
        yield module(f"blocks.{i}.norm", "LayerNorm", 0, 0.0005 * slower, 2 * width)
        yield module(f"blocks.{i}.attention", "Attention", linear, linear / PEAK * 1.25 * slower, width * width)
        yield module(f"blocks.{i}.up", "Linear", 4 * linear, 4 * linear / PEAK * 1.25 * slower, 4 * width * width)
    yield module("loss", "Loss", 2 * tokens * width * 1000, 2 * tokens * width * 1000 / PEAK * 1.5, 0)
    yield module("probe", "Linear", 0, 0.0, 77, status="unused")


def _duration(median: float) -> Duration:
    return Duration(
        median_s=median, p10_s=0.95 * median, p90_s=1.1 * median, samples_s=[0.95 * median, median, 1.1 * median]
    )


def _op(op: str, kind: str, calls: int, flops: int, pointwise: int, n_bytes: int, seconds: float | None) -> OpCost:
    work = flops + pointwise
    return OpCost(
        op=op,
        kind=kind,
        calls=calls,
        flops=flops,
        pointwise_flops=pointwise,
        bytes_moved=n_bytes,
        intensity=work / n_bytes if n_bytes else None,
        bound="compute" if work / max(n_bytes, 1) > PEAK / BANDWIDTH else "memory",
        duration_s=seconds,
        predicted_s=max(work / PEAK, n_bytes / BANDWIDTH),
    )


def _ops(flops: FlopCounts, tokens: int, width: int, *, timed: bool) -> list[OpCost]:
    def seconds(value: float) -> float | None:
        return value if timed else None

    rows = [
        _op("mm", kind, 9, n, 0, max(n // 100, 1), seconds(n / PEAK * 1.3))
        for kind, n in (
            ("forward", flops.forward_flops),
            ("dgrad", flops.dgrad_flops),
            ("wgrad", flops.wgrad_flops),
            ("recompute", flops.recompute_flops),
        )
        if n
    ]
    few, again = tokens * width, flops.recompute_flops > 0
    return [
        *rows,
        _op("embedding", "forward", 1, 0, 0, 8 * few, seconds(0.0001)),
        _op("embedding_dense_backward", "wgrad", 1, 0, few, 12 * few, seconds(0.0096)),
        _op("native_layer_norm", "forward", 2, 0, 8 * few, 8 * few, seconds(0.001)),
        *([_op("native_layer_norm", "recompute", 2, 0, 8 * few, 8 * few, seconds(0.0005))] if again else []),
        _op("_fused_adamw_", "optimizer", 1, 0, flops.optimizer_flops, 4 * flops.optimizer_flops, seconds(0.004)),
    ]


def _flops(modules: list[ModuleCost]) -> FlopCounts:
    def total(key: str) -> int:
        return sum(getattr(module, key) for module in modules)

    forward, dgrad, wgrad = (total(f"{kind}_flops") for kind in ("forward", "dgrad", "wgrad"))
    return FlopCounts(
        forward_flops=forward,
        dgrad_flops=dgrad,
        wgrad_flops=wgrad,
        recompute_flops=total("recompute_flops"),
        optimizer_flops=15 * sum(module.parameters_count for module in modules),
        backward_over_forward=(dgrad + wgrad) / forward,
    )


def _times(modules: list[ModuleCost], *, recomputes: bool) -> PhaseTimes:
    """A tenth longer each than the modules' own."""

    def total(*kinds: str) -> float:
        seconds: float = sum(getattr(module, f"{kind}_s") for module in modules for kind in kinds)
        return 1.1 * seconds

    forward, backward, again = total("forward"), total("dgrad", "wgrad"), total("recompute")
    return PhaseTimes(
        step=_duration(forward + backward + again + 0.007),
        data=_duration(0.001),
        forward=_duration(forward),
        recompute=_duration(again) if recomputes else None,
        backward=_duration(backward),
        clip=_duration(0.001),
        optimizer=_duration(0.005),
        backward_over_forward=backward / forward,
        backward_over_forward_low=0.97 * backward / forward,
        backward_over_forward_high=1.04 * backward / forward,
    )


_ROOFLINE = Roofline(
    device="this machine",
    flops_per_s=PEAK,
    flops_source="measured: fp32 matrix products of 2048 x 2048",
    bytes_per_s=BANDWIDTH,
    bytes_source="measured: a copy of 256 MiB",
    ridge=PEAK / BANDWIDTH,
)


def _phases(flops: FlopCounts, few: int) -> list[PhaseCounts]:
    counts = {
        "data": (0, 0),
        "forward": (flops.forward_flops, 9 * few),
        "recompute": (flops.recompute_flops, few if flops.recompute_flops else 0),
        "backward": (flops.dgrad_flops + flops.wgrad_flops, 20 * few),
        "clip": (0, flops.optimizer_flops // 5),
        "optimizer": (0, flops.optimizer_flops - flops.optimizer_flops // 5),
    }
    return [
        PhaseCounts(phase=name, flops=n, pointwise_flops=m, bytes_moved=n // 50 + 4 * m)
        for name, (n, m) in counts.items()
        if n or m or name == "data"
    ]


def _predicted(flops: FlopCounts, times: PhaseTimes | None, tokens: int) -> PredictedTime:
    expected = {
        "forward": flops.forward_flops / PEAK,
        "backward": (flops.dgrad_flops + flops.wgrad_flops) / PEAK,
        **({"recompute": flops.recompute_flops / PEAK} if flops.recompute_flops else {}),
        "optimizer": flops.optimizer_flops * 4 / BANDWIDTH,
    }

    def phase(name: str, seconds: float) -> PredictedPhase:
        measured = getattr(times, name).median_s if times else None
        error = seconds / measured - 1 if measured else None
        return PredictedPhase(phase=name, predicted_s=seconds, measured_s=measured, relative_error=error)

    step = sum(expected.values())
    return PredictedTime(
        basis="each operation at the roofline of this machine: 100.0 GFLOP/s and 20.0 GB/s, both measured",
        step_s=step,
        units_per_s=tokens / step,
        phases=[phase(name, seconds) for name, seconds in expected.items()],
    )


def _terms(modules: list[ModuleCost], flops: FlopCounts) -> list[RatioTerm]:
    attention = sum(m.dgrad_flops - m.forward_flops for m in modules) / flops.forward_flops
    frozen = -sum(m.forward_flops - m.wgrad_flops for m in modules) / flops.forward_flops
    return [
        RatioTerm(name="attention's backward", excess_over_two=attention, detail="five products for two: blocks.*"),
        RatioTerm(name="frozen parameters", excess_over_two=frozen, detail="no wgrad in the loss"),
        RatioTerm(name="embeddings", excess_over_two=0.0, detail="no FLOPs, forward or backward"),
    ]


def _conventions(flops: FlopCounts, tokens: int, seconds: float | None, parameters: int) -> list[Convention]:
    done = (flops.forward_flops + flops.dgrad_flops + flops.wgrad_flops) / tokens

    def one(name: str, formula: str, counts: str, per_token: float, headline: bool = False) -> Convention:
        mfu = per_token * tokens / seconds / PEAK if seconds else None
        return Convention(
            name=name, formula=formula, counts=counts, flops_per_unit=per_token, mfu=mfu, headline=headline
        )

    return [
        one("parameters alone", "6N", "weights in matrix products; Kaplan et al. 2020", 6.0 * parameters),
        one("PaLM", "6N + 12 L H Q T", "and all T x T scores; nanoGPT, torchtitan", done, headline=True),
        one("causal", "6N + 6 L H Q T", "and the scores that are not masked; FlashAttention's figures", 0.9 * done),
        one("executed", "counted", "what this step does, recomputation left out", done),
    ]


def small_profile(changes: Mapping[str, Any] | None = None, *, recomputes: bool = True) -> ProfileResult:
    """Three timed steps of a model of four layers, with `changes` on top."""
    tokens, width = 512, 256
    modules = list(_modules(4, width, tokens, timed=True, recomputes=recomputes))
    return _profile(modules, tokens, width, changes or {}, recomputes=recomputes, timed=True)


def deep_profile(changes: Mapping[str, Any] | None = None) -> ProfileResult:
    """A model of 126 layers, counted for a GPU that is not there."""
    modules = list(_modules(126, 16384, 8192, timed=False, recomputes=False))
    figures = {
        "target": "llama3-405b",
        "device": "cuda",
        "gpu": "h100",
        "extrapolated_from_layers": [2, 3, 4],
        "peak_flops_source": "data sheet of h100, dense bf16",
    }
    return _profile(modules, 8192, 16384, {**figures, **(changes or {})}, recomputes=False, timed=False)


def _profile(
    modules: list[ModuleCost], tokens: int, width: int, changes: Mapping[str, Any], *, recomputes: bool, timed: bool
) -> ProfileResult:
    flops, parameters = _flops(modules), sum(module.parameters_count for module in modules)
    times = _times(modules, recomputes=recomputes) if timed else None
    step = times.step.median_s if times else None
    conventions = _conventions(flops, tokens, step, parameters)
    all_flops = flops.forward_flops + flops.dgrad_flops + flops.wgrad_flops + flops.recompute_flops
    figures: dict[str, Any] = {
        "target": "tiny",
        "settings": [],
        "device": "cpu",
        "gpu": None,
        "parameters_count": parameters,
        "trainable_parameters_count": parameters - 77,
        "unit": "tokens",
        "units_per_step": tokens,
        "flops": flops,
        "phases": _phases(flops, tokens * width),
        "time": times,
        "tokens_per_s": tokens / step if step else None,
        "mfu": conventions[1].mfu,
        "hfu": all_flops / step / PEAK if step else None,
        "peak_flops_per_s": PEAK,
        "peak_flops_source": "measured here: matmul in fp32",
        "ratio_terms": _terms(modules, flops),
        "recompute_terms": [
            RecomputeTerm(
                name="not recomputed", excess_over_one=flops.recompute_flops / flops.forward_flops - 1, detail="loss"
            )
        ]
        if recomputes
        else [],
        "conventions": conventions,
        "modules": modules,
        "ops": _ops(flops, tokens, width, timed=timed),
        "unexplained": _unexplained(times) if times else [],
        "recorder_overhead": 0.031 if timed else None,
        "roofline": _ROOFLINE,
        "predicted": _predicted(flops, times, tokens),
        "finite_differences": _differences(times, parameters) if times else None,
        "memory": [
            PhaseMemory(phase="forward", peak_allocated_bytes=3 * 2**28),
            PhaseMemory(phase="backward", peak_allocated_bytes=2**30),
        ],
        "compiled": False,
        "extrapolated_from_layers": [],
        "assumptions": ["Causal attention is counted in full: all T x T scores."],
        "warnings": [],
        "interrupted": False,
    }
    return ProfileResult(**{**figures, **changes})


def _unexplained(times: PhaseTimes) -> list[Unexplained]:
    phases = {"forward": times.forward, "recompute": times.recompute, "backward": times.backward}
    return [
        Unexplained(
            phase=name,
            measured_s=duration.median_s,
            operations_s=duration.median_s / 1.1,
            outside_s=0.08 * duration.median_s,
            unexplained_s=duration.median_s - duration.median_s / 1.1 - 0.08 * duration.median_s,
        )
        for name, duration in phases.items()
        if duration is not None
    ]


def _differences(times: PhaseTimes, parameters: int) -> FiniteDifferences:
    gradients = times.backward.median_s + (times.recompute.median_s if times.recompute else 0.0)
    forward = times.forward.median_s
    return FiniteDifferences(
        parameters_count=parameters - 77,
        gradients_s=gradients,
        forward_s=forward,
        forwards=gradients / forward,
        finite_differences_s=2 * (parameters - 77) * forward,
    )


def hostile_profile() -> ProfileResult:
    """Where a name of the user's can stand, it would break out of a careless page or steer a terminal."""
    plain = small_profile()
    return small_profile(
        {
            "target": HOSTILE,
            "device": HOSTILE,
            "gpu": HOSTILE,
            "unit": HOSTILE,
            "peak_flops_source": HOSTILE,
            "modules": [
                m.model_copy(update={"name": HOSTILE.replace(".", ""), "type": HOSTILE}) for m in plain.modules[:1]
            ]
            + [m.model_copy(update={"name": f"blocks.{HOSTILE}", "type": HOSTILE}) for m in plain.modules[1:3]],
            "ops": [op.model_copy(update={"op": HOSTILE}) for op in plain.ops[:2]],
            "ratio_terms": [RatioTerm(name=HOSTILE, excess_over_two=0.25, detail=HOSTILE)],
            "warnings": [HOSTILE],
            "assumptions": [HOSTILE],
        }
    )
