"""What a CPU does of each kind of work, measured on the kernel that a step uses, with data where a step has it.

By a roofline all arithmetic runs at the peak, and all bytes come as STREAM's triad gets them. On a CPU neither is near:
a layer's weights are not in a cache, fused attention in bf16 reaches a tenth of the peak and less, an exponential takes
as long as dozens of multiplications, and what is written in place is not read once more before (a triad's result is,
uncounted).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bptool.analysis.profile.tally import Place
from bptool.hardware import typical_seconds
from bptool.instruments.operations.flop_formulas import attention_backward_flops, attention_flops
from bptool.instruments.operations.pointwise_flops import GELU_STEPS
from bptool.instruments.operations.trace import Kind

Clock = Callable[[], float]
_ROWS, _WIDTH, _WEIGHTS_BYTES = 512, 1024, 2**27
_CACHED_ELEMENTS = 2**16  # a few hundred KiB with the result: in the second-level cache of one core
_MOST_TOKENS = 1024  # a longer one's rate is hardly another, and takes seconds to measure
_ELEMENTARY = re.compile(
    r"_?(exp2?|expm1|log(2|10|1p)?|sin|cos|tanh?|erfc?|sigmoid|pow|rsqrt|elu|softplus|logsumexp)_?"
    r"|_?((gelu|silu)(_backward)?|(log_)?softmax)_?"
)
_WRITTEN_ONLY = frozenset({"zero_", "fill_", "copy_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"})


class AttentionShape(NamedTuple):
    """What an attention's rate depends on: tokens of a sequence, width of a head, whether later tokens are hidden."""

    tokens: int = 512
    width: int = 64
    causal: bool = False


TYPICAL = AttentionShape()
"""Where a step's own is not known."""


class ProductRate(NamedTuple):
    """FLOP/s of a layer's three products, whose operands lie differently in memory: x Wᵗ, g W and gᵗ x."""

    forward: float
    dgrad: float
    wgrad: float

    def of(self, kind: Kind) -> float:
        """Of the product that is for this."""
        return self.dgrad if kind == "dgrad" else self.wgrad if kind == "wgrad" else self.forward


class AttentionRate(NamedTuple):
    """FLOP/s, counted over all scores: of the forward, and of its gradients."""

    forward: float
    backward: float


@dataclass(frozen=True)
class KernelRates:
    """FLOP/s by dtype, and bytes/s.

    Attributes:
        products: of activations with the weights of a layer, which come from memory.
        shape: of the attention that was measured; None: none was.
        attention: of PyTorch's fused attention.
        elementary: of operations with an elementary function (exp, tanh, a root), where no memory is waited for.
        in_place_bytes_per_s: of an update that reads what it writes.
    """

    products: Mapping[str, ProductRate]
    shape: AttentionShape | None
    attention: Mapping[str, AttentionRate]
    elementary: Mapping[str, float]
    in_place_bytes_per_s: float

    def products_per_s(self, place: Place) -> float | None:
        """FLOP/s of these products, where it was measured."""
        if "attention" not in place.op:
            of_layer = self.products.get(place.dtype)
            return None if of_layer is None else of_layer.of(place.kind)
        rate = self.attention.get(place.dtype)
        return None if rate is None else rate.backward if place.kind in ("dgrad", "wgrad") else rate.forward

    def pointwise_per_s(self, place: Place) -> float | None:
        """FLOP/s of this arithmetic, where it is slow; any other waits for memory."""
        return self.elementary.get(place.dtype) if _ELEMENTARY.fullmatch(place.op) else None

    def bytes_per_s(self, place: Place) -> float | None:
        """Of these operations, where they write into what they read, as their names tell."""
        in_place = place.op.endswith("_") and place.op not in _WRITTEN_ONLY
        return self.in_place_bytes_per_s if in_place else None

    def joined(self, other: KernelRates) -> KernelRates:
        """With the formats that only the other one knows."""
        return replace(
            self,
            products={**other.products, **self.products},
            attention={**other.attention, **self.attention},
            elementary={**other.elementary, **self.elementary},
        )


def measured_kernel_rates(dtypes: Iterable[str], shape: AttentionShape | None, *, seconds: float) -> KernelRates:
    """This CPU's, measured now.

    Args:
        dtypes: such as `bfloat16`.
        shape: of the step's attention; None: it has none.
        seconds: for which bandwidth is measured; each rate of a dtype takes a third.
    """
    formats = {name: getattr(torch, name) for name in sorted(dtypes)}
    asked = None if shape is None else shape._replace(tokens=min(shape.tokens, _MOST_TOKENS))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        return KernelRates(
            products={name: product_rate(one, seconds=seconds / 3) for name, one in formats.items()},
            shape=asked,
            attention={name: attention_rate(one, asked, seconds=2 * seconds / 3) for name, one in formats.items()}
            if asked
            else {},
            elementary={name: elementary_rate(one, seconds=seconds / 3) for name, one in formats.items()},
            in_place_bytes_per_s=in_place_bandwidth(seconds=seconds),
        )


def product_rate(dtype: torch.dtype, *, seconds: float, clock: Clock = time.perf_counter) -> ProductRate:
    """Of 512 rows with matrices of 1024 x 1024 that no cache holds all of."""
    x, gradient = (torch.ones(_ROWS, _WIDTH, dtype=dtype) for _ in range(2))
    count = _WEIGHTS_BYTES // (_WIDTH**2 * dtype.itemsize)
    weights = cycle(torch.ones(count, _WIDTH, _WIDTH, dtype=dtype).unbind())
    products: list[Callable[[], Tensor]] = [
        lambda: torch.mm(x, next(weights).t()),
        lambda: torch.mm(gradient, next(weights)),
        lambda: torch.mm(gradient.t(), x, out=next(weights)),
    ]
    flops = 2 * _ROWS * _WIDTH**2
    return ProductRate(*(flops / typical_seconds(product, seconds / len(products), clock) for product in products))


def attention_rate(
    dtype: torch.dtype, shape: AttentionShape, *, seconds: float, clock: Clock = time.perf_counter
) -> AttentionRate:
    """Of one sequence with a head for each thread, each direction by itself."""
    sizes = (1, torch.get_num_threads(), shape.tokens, shape.width)
    query, key, value = (torch.randn(sizes, dtype=dtype).requires_grad_() for _ in range(3))

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=shape.causal)

    result = attend()
    slope = torch.ones_like(result)

    def differentiate() -> object:
        return torch.autograd.grad(result, (query, key, value), slope, retain_graph=True)

    forward_s, backward_s = (typical_seconds(action, seconds / 2, clock) for action in (attend, differentiate))
    flops, of_gradients = (count(sizes, sizes, sizes) for count in (attention_flops, attention_backward_flops))
    return AttentionRate(flops / forward_s, of_gradients / backward_s)


def elementary_rate(dtype: torch.dtype, *, seconds: float, clock: Clock = time.perf_counter) -> float:
    """Of a GELU (its tanh form) and its gradient over an array that the caches hold, each step of it a FLOP."""
    x = torch.randn(_CACHED_ELEMENTS, dtype=dtype).requires_grad_()
    slope = torch.ones_like(x)

    def both() -> object:
        return torch.autograd.grad(F.gelu(x, approximate="tanh"), x, slope)

    return sum(GELU_STEPS["tanh"]) * x.numel() / typical_seconds(both, seconds, clock)


def in_place_bandwidth(
    *, n_bytes: int = 2**26, parts: int = 8, seconds: float, clock: Clock = time.perf_counter
) -> float:
    """Of PyTorch's fused AdamW over parts of four arrays of `n_bytes` each: it reads all and writes three."""
    updates = cycle([_update(n_bytes // parts) for _ in range(parts)])
    return 7 * (n_bytes // parts) / typical_seconds(lambda: next(updates)(), seconds, clock)


def _update(n_bytes: int) -> Callable[[], object]:
    """Of one weight, whose optimizer has its state already."""
    weight = torch.zeros(n_bytes // 4, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()
    return optimizer.step
