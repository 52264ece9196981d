from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from profile_traces import costs, op_costs, operation

from bptool.analysis.profile import roofline
from bptool.analysis.profile.kernel_rates import AttentionRate, AttentionShape, KernelRates, ProductRate
from bptool.analysis.profile.roofline import (
    OperationSeconds,
    Rates,
    by_roofline,
    cpu_rates,
    gpu_rates,
    matmul_dtypes,
    predicted_s,
    under_roofs,
)
from bptool.gpus import GPUS
from bptool.instruments.operations.trace import Operation


def rates(changes: Mapping[str, Any] | None = None) -> Rates:
    """100 FLOP/s in float32 and 1000 in bfloat16, 10 bytes/s, no overhead."""
    figures: dict[str, Any] = {
        "device": "a machine",
        "flops_per_s": {"float32": 100.0, "bfloat16": 1000.0},
        "step_format": "bfloat16",
        "bytes_per_s": 10.0,
        "operation_s": 0.0,
        "runs_ahead": False,
        "causal_share": 0.5,
        "flops_source": "said so",
        "bytes_source": "too",
        "operation_source": "nothing",
    }
    return Rates(**{**figures, **(changes or {})})


def seconds(*operations: Operation) -> OperationSeconds:
    ((place, cost),) = costs(*operations).items()
    return by_roofline(place, cost, rates())


class TestOneOperation:
    def test_under_the_compute_roof(self) -> None:
        assert seconds(operation(flops=500, bytes_moved=20)) == (5, 2)
        assert seconds(operation(flops=500, bytes_moved=20)).longer == 5

    def test_under_the_memory_roof(self) -> None:
        assert seconds(operation(pointwise_flops=100, bytes_moved=20)).longer == 2

    def test_at_the_rate_of_its_format(self) -> None:
        assert seconds(operation(flops=500, dtype="bfloat16")).compute_s == 0.5
        assert seconds(operation(flops=500, dtype="int64")).compute_s == 5

    def test_a_causal_attention_computes_a_share_of_its_scores(self) -> None:
        whole, half = (seconds(operation(flops=400, causal=causal)).compute_s for causal in (False, True))
        assert (whole, half) == (4, 2)

    def test_a_view_takes_nothing(self) -> None:
        assert seconds(operation("view")).longer == 0


class TestKindsOfWork:
    """Products 80 FLOP/s, attention 50 and 20 in its gradients, a GELU 10; in place 40 bytes/s."""

    ATTENTION = AttentionRate(50.0, 20.0)
    KERNELS = KernelRates(
        {"float32": ProductRate(80.0, 80.0, 80.0)}, AttentionShape(), {"float32": ATTENTION}, {"float32": 10.0}, 40.0
    )

    @pytest.mark.parametrize(
        ("done", "expected"),
        [
            (operation(flops=400, bytes_moved=20), 5),
            (operation(flops=500, dtype="bfloat16"), 0.5),
            (operation("scaled_attention", flops=500), 10),
            (operation("scaled_attention_backward", kind="dgrad", flops=500), 25),
            (operation("gelu", pointwise_flops=100, bytes_moved=20), 10),
            (operation("mul", pointwise_flops=100, bytes_moved=20), 2),
            (operation("mul_", pointwise_flops=100, bytes_moved=80), 2),
            (operation("_fused_adamw_", pointwise_flops=10, bytes_moved=80), 2),
        ],
    )
    def test_each_at_its_own_rate(self, done: Operation, expected: float) -> None:
        ((place, cost),) = costs(done).items()
        assert predicted_s(place, cost, rates({"kernels": self.KERNELS})) == expected

    def test_the_roofs_stay_where_they_are(self) -> None:
        """A GELU in a cache is slower than memory, and is under memory's roof all the same."""
        done = costs(operation("gelu", pointwise_flops=100, bytes_moved=20))
        (found,) = under_roofs(op_costs(("gelu", "forward")), done, rates({"kernels": self.KERNELS}))
        assert (found.predicted_s, found.bound) == (10, "memory")

    def test_rates_of_another_format_join(self) -> None:
        ours = rates({"flops_per_s": {"float32": 1.0}, "kernels": self.KERNELS})
        theirs = rates({"flops_per_s": {"float32": 2.0, "float16": 3.0}, "kernels": self.KERNELS})
        assert ours.joined(theirs).flops_per_s == {"float32": 1.0, "float16": 3.0}
        assert ours.joined(rates()).kernels is self.KERNELS


class TestTable:
    def test_each_operations_longer_side_is_summed(self) -> None:
        """One module's under either roof: 5 + 2 s, though FLOPs and bytes alone are 6 and 4 s."""
        products = costs(
            operation(flops=500, bytes_moved=20, module="a"), operation(flops=100, bytes_moved=20, module="b")
        )
        (found,) = under_roofs(op_costs(("mm", "forward")), products, rates())
        assert (found.predicted_s, found.bound) == (7, "compute")

    def test_by_operation_and_kind(self) -> None:
        done = costs(operation(flops=100), operation(flops=300, kind="wgrad"), operation("add", bytes_moved=50))
        found = under_roofs(op_costs(("mm", "forward"), ("mm", "wgrad"), ("add", "forward")), done, rates())
        assert [(op.predicted_s, op.bound) for op in found] == [(1, "compute"), (3, "compute"), (5, "memory")]

    def test_what_moves_nothing_is_under_no_roof(self) -> None:
        (found,) = under_roofs(op_costs(("view", "forward")), costs(operation("view")), rates())
        assert (found.predicted_s, found.bound) == (0, None)


class TestRates:
    def test_the_ridge(self) -> None:
        line = rates().roofline
        assert (line.flops_per_s, line.bytes_per_s, line.ridge) == (1000, 10, 100)

    @pytest.mark.parametrize(
        ("mode", "dtype", "tflops"),
        [
            ("fp32", "float32", 19.5),
            ("tf32", "float32", 156),
            ("bf16-mixed", "bfloat16", 312),
            ("bf16", "bfloat16", 312),
            ("fp16-mixed", "float16", 312),
        ],
    )
    def test_a_gpus(self, mode: str, dtype: str, tflops: float) -> None:
        found = gpu_rates(GPUS["a100-80gb"], mode)
        assert found.step_format == dtype
        assert found.roofline.flops_per_s == tflops * 1e12
        assert found.roofline.bytes_per_s == pytest.approx(2.039e12)
        assert found.roofline.flops_source == "a100-80gb data sheet, dense"

    def test_float32_products_of_a_mixed_step_are_not_on_the_tensor_cores(self) -> None:
        assert gpu_rates(GPUS["a100-80gb"], "bf16-mixed").flops_per_s["float32"] == 19.5e12

    def test_a_cpus_are_measured_in_each_format(self, monkeypatch: pytest.MonkeyPatch) -> None:
        measured = {"fp32": 5e10, "bf16": 8e10}
        monkeypatch.setattr(roofline, "measured_matmul_rate", lambda mode, seconds: measured[mode])
        monkeypatch.setattr(roofline, "measured_memory_bandwidth", lambda seconds: 2e10)
        monkeypatch.setattr(roofline, "measured_operation_overhead", lambda seconds: 3e-6)
        asked: list[Any] = []
        monkeypatch.setattr(roofline, "measured_kernel_rates", lambda *words, seconds: asked.append((*words, seconds)))
        found = cpu_rates("bf16-mixed", ["float32", "int64"])
        assert found.flops_per_s == {"bfloat16": 8e10, "float32": 5e10}
        assert (found.roofline.ridge, found.operation_s, found.runs_ahead) == (4, 3e-6, False)
        assert found.causal_share == 1
        assert asked == [({"bfloat16", "float32"}, AttentionShape(), 0.6)]
        assert found.flops_source == "this machine's measured bf16 matmul rate"
        assert found.operation_source.startswith("3.0 µs")

    def test_formats_of_a_trace(self) -> None:
        done = costs(operation(flops=1, dtype="bfloat16"), operation("add", pointwise_flops=5, dtype="float64"))
        assert matmul_dtypes(done) == {"bfloat16"}
