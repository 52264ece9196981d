"""What each kind of work is measured on, by clocks that are told what to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from profile_traces import costs, operation
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from bptool.analysis.profile import kernel_rates
from bptool.analysis.profile.kernel_rates import (
    AttentionRate,
    AttentionShape,
    KernelRates,
    ProductRate,
    attention_rate,
    elementary_rate,
    in_place_bandwidth,
    measured_kernel_rates,
    product_rate,
)
from bptool.analysis.profile.tally import Place

SHAPE = AttentionShape(tokens=16, width=4, causal=True)


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that each reading moves on by so much: what is timed takes that long."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += seconds
        return now

    return clock


def place(op: str, kind: str = "forward", dtype: str = "bfloat16") -> Place:
    ((found, _),) = costs(operation(op, kind=kind, phase="forward", dtype=dtype)).items()
    return found


class TestMeasured:
    def test_products_of_512_rows(self) -> None:
        found = product_rate(torch.float32, seconds=1, clock=ticking(0.25))
        assert set(found) == {2 * 512 * 1024 * 1024 / 0.25}

    def test_the_products_of_a_layer_with_another_ones_weights_each_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its result, its input's gradient and its weights': of three matrices the weights' lies apart each time."""
        seen: list[tuple[tuple[bool, bool], int]] = []

        def watched(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
            assert {left.dtype, right.dtype} == {torch.bfloat16}
            turned = (not left.is_contiguous(), not right.is_contiguous())
            seen.append((turned, (right if out is None else out).data_ptr()))
            return left

        monkeypatch.setattr("torch.mm", watched)
        product_rate(torch.bfloat16, seconds=60, clock=ticking(1))
        assert list(dict.fromkeys(turned for turned, _ in seen)) == [(False, True), (False, False), (True, False)]
        assert len({at for _, at in seen}) == len(seen) > 20

    def test_attention_counted_by_pytorchs_formulas(self) -> None:
        sizes = (1, torch.get_num_threads(), 16, 4)
        found = attention_rate(torch.float32, SHAPE, seconds=1, clock=ticking(0.25))
        assert found.forward == sdpa_flop_count(sizes, sizes, sizes) / 0.25
        assert found.backward == sdpa_backward_flop_count(sizes, sizes, sizes, sizes) / 0.25

    def test_attention_of_that_shape_in_that_format(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []

        def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool) -> torch.Tensor:
            seen.append((*(tuple(x.shape) for x in (q, k, v)), q.dtype, is_causal))
            return scaled_dot_product_attention(q, k, v, is_causal=is_causal)

        monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
        attention_rate(torch.bfloat16, SHAPE, seconds=0)
        assert set(seen) == {(*[(1, torch.get_num_threads(), 16, 4)] * 3, torch.bfloat16, True)}

    def test_a_gelu_and_its_gradient(self) -> None:
        """The tanh form written out: 9 steps, and 18."""
        assert elementary_rate(torch.float32, seconds=1, clock=ticking(0.5)) == (9 + 18) * 2**16 / 0.5

    def test_an_update_reads_four_arrays_and_writes_three(self) -> None:
        assert in_place_bandwidth(n_bytes=4096, parts=1, seconds=1, clock=ticking(0.5)) == 7 * 4096 / 0.5
        assert in_place_bandwidth(n_bytes=4096, parts=4, seconds=1, clock=ticking(0.5)) == 7 * 1024 / 0.5

    def test_all_of_them_leave_the_runs_random_numbers_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel_rates, "in_place_bandwidth", lambda seconds: 1.0)
        before = torch.random.get_rng_state()
        with torch.no_grad():
            found = measured_kernel_rates({"bfloat16", "float32"}, SHAPE._replace(tokens=10**6), seconds=0)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert found.attention.keys() == found.elementary.keys() == found.products.keys() == {"bfloat16", "float32"}
        assert found.shape == SHAPE._replace(tokens=1024)
        assert all(min(rate) > 0 for rate in found.attention.values())

    def test_a_step_without_attention(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel_rates, "in_place_bandwidth", lambda seconds: 1.0)
        found = measured_kernel_rates({"float32"}, None, seconds=0)
        assert found.shape is None
        assert not found.attention
        assert found.elementary.keys() == {"float32"}


class TestChosen:
    LAYER = ProductRate(9.0, 8.0, 6.0)
    RATES = KernelRates({"bfloat16": LAYER}, SHAPE, {"bfloat16": AttentionRate(7.0, 3.0)}, {"bfloat16": 5.0}, 20.0)

    @pytest.mark.parametrize(
        ("op", "kind", "expected"),
        [
            ("_scaled_dot_product_flash_attention_for_cpu", "forward", 7),
            ("_scaled_dot_product_flash_attention_for_cpu", "recompute", 7),
            ("_scaled_dot_product_flash_attention_for_cpu_backward", "dgrad", 3),
            ("mm", "forward", 9),
            ("addmm", "recompute", 9),
            ("mm", "dgrad", 8),
            ("mm", "wgrad", 6),
        ],
    )
    def test_products(self, op: str, kind: str, expected: float | None) -> None:
        assert self.RATES.products_per_s(place(op, kind)) == expected
        assert self.RATES.products_per_s(place(op, kind, "float32")) is None

    @pytest.mark.parametrize(
        ("op", "expected"),
        [("gelu", 5), ("gelu_backward", 5), ("_softmax", 5), ("exp_", 5), ("add", None), ("native_layer_norm", None)],
    )
    def test_arithmetic(self, op: str, expected: float | None) -> None:
        assert self.RATES.pointwise_per_s(place(op)) == expected
        assert self.RATES.pointwise_per_s(place(op, dtype="float32")) is None

    @pytest.mark.parametrize(
        ("op", "expected"),
        [("_fused_adamw_", 20), ("_foreach_mul_", 20), ("add_", 20), ("add", None), ("zero_", None), ("copy_", None)],
    )
    def test_bytes(self, op: str, expected: float | None) -> None:
        assert self.RATES.bytes_per_s(place(op)) == expected

    def test_joined_with_another_format(self) -> None:
        """What is known already stays."""
        attention = {"bfloat16": AttentionRate(1, 1), "float32": AttentionRate(2, 2)}
        other_layer = ProductRate(4, 4, 4)
        other = KernelRates({"bfloat16": other_layer, "float32": other_layer}, SHAPE, attention, {"x": 9.0}, 1.0)
        found = self.RATES.joined(other)
        assert found.products == {"bfloat16": self.LAYER, "float32": other_layer}
        assert found.attention == {"bfloat16": (7, 3), "float32": (2, 2)}
        assert found.elementary == {"bfloat16": 5, "x": 9}
        assert found.in_place_bytes_per_s == 20
