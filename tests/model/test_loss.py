"""The fused loss against the definition of cross-entropy, and against the allocator's own count of what it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bptool.model import loss
from bptool.model.loss import IGNORED, chunk_tokens, linear_cross_entropy, plain_cross_entropy
from bptool.units import MIB

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

both = pytest.mark.parametrize("cross_entropy", [linear_cross_entropy, plain_cross_entropy])


@pytest.fixture(params=[1, 3, 100])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of a token, chunks that leave a rest, and one chunk for everything."""
    size = int(request.param)
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: size)
    return size


def operands(
    n: int = 8, vocab: int = 11, width: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(n, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (n,), generator=generator)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def by_definition(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-log(exp(l_t) / sum exp(l)) averaged over the valid tokens, in float64, with autograd's gradients."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    valid = targets >= 0
    logits = x[valid] @ weight.T
    chosen = logits[torch.arange(len(logits)), targets[valid]]
    mean = (logits.exp().sum(1).log() - chosen).mean()
    mean.backward()
    assert x.grad is not None
    assert weight.grad is not None
    return mean.detach(), x.grad, weight.grad


def grads(*tensors: Tensor) -> list[Tensor]:
    found = [tensor.grad for tensor in tensors if tensor.grad is not None]
    assert len(found) == len(tensors)
    return found


@both
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_the_definition(cross_entropy: Loss, dtype: torch.dtype, tolerance: float, chunk: int) -> None:
    x, weight, targets = operands(dtype=dtype)
    targets[[1, 4]] = torch.tensor([IGNORED, -1])
    value = cross_entropy(x, weight, targets)
    (2 * value).backward()
    wanted, x_grad, weight_grad = by_definition(x, weight, targets)
    torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance)
    for found, exact in zip(grads(x, weight), (x_grad, weight_grad), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), 2 * exact, rtol=tolerance, atol=tolerance)


@both
def test_extreme_logits_neither_overflow_nor_lose_the_loss(cross_entropy: Loss) -> None:
    x = torch.tensor([[1.0], [1.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1e4], [0.0], [-1e4]], dtype=torch.float64)
    value = cross_entropy(x, weight, torch.tensor([0, 2]))
    assert value.item() == pytest.approx((0.0 + 2e4) / 2, rel=1e-15)  # log softmax: 0 and -20000, to 1e-4343
    value.backward()
    # d loss / d logit is softmax - one_hot: (0, 0, 0) for the first token, (1, 0, -1) for the second.
    assert grads(x)[0].flatten().tolist() == [0.0, (1e4 + 1e4) / 2]


@both
def test_autocast_sums_in_float32_and_returns_the_parameters_dtype(
    cross_entropy: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 keeps 8 bits: one product is good to 0.4%; 128 of them summed in bfloat16 would be good to several %."""
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: 4)
    x, weight, targets = operands(n=512, vocab=7, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = cross_entropy(x, weight, targets)
    value.backward()
    wanted, x_grad, weight_grad = by_definition(x.bfloat16(), weight.bfloat16(), targets)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(wanted.item(), rel=2e-3)
    for found, exact in zip(grads(x, weight), (x_grad, weight_grad), strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).norm() < 5e-3 * exact.norm()


class Casts(TorchDispatchMode):
    """Shapes of what is cast, and the formats that matmuls are done in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[tuple[int, ...]] = []
        self.matmuls: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(out.shape))
        if func is torch.ops.aten.mm.default:
            self.matmuls.add(out.dtype)
        return out


def test_autocast_casts_each_operand_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: 2)
    x, weight, targets = operands(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        linear_cross_entropy(x, weight, targets)
    assert casts.shapes.count((11, 5)) == 1
    assert casts.shapes.count((8, 5)) == 1
    assert casts.shapes.count((2, 5)) == 0
    assert casts.matmuls == {torch.bfloat16}


@both
def test_bfloat16_weights_get_bfloat16_gradients_that_were_summed_in_float32(
    cross_entropy: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "chunk_tokens", lambda *_: 4)
    x, weight, targets = operands(n=512, vocab=7, dtype=torch.bfloat16)
    value = cross_entropy(x, weight, targets)
    value.backward()
    wanted, x_grad, weight_grad = by_definition(x, weight, targets)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(wanted.item(), rel=2e-3)
    for found, exact in zip(grads(x, weight), (x_grad, weight_grad), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - exact).norm() < 6e-3 * exact.norm()


def test_a_low_precision_product_made_in_slices_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_PRODUCT_ROWS", 3)
    x, weight, targets = operands(vocab=11, dtype=torch.bfloat16)
    linear_cross_entropy(x, weight, targets).backward()
    exact = by_definition(x, weight, targets)[2]
    assert (grads(weight)[0] - exact).norm() < 1e-2 * exact.norm()


@both
def test_a_mean_over_nothing_is_zero(cross_entropy: Loss) -> None:
    x, weight, _ = operands()
    value = cross_entropy(x, weight, torch.full((8,), IGNORED))
    value.backward()
    assert value.item() == 0
    assert not any(grad.any() for grad in grads(x, weight))


@pytest.mark.parametrize("kept", ["x", "weight"])
def test_gradients_are_made_for_what_requires_them(kept: str) -> None:
    x, weight, targets = operands()
    exact = dict(zip(("x", "weight"), by_definition(x, weight, targets)[1:], strict=True))
    named = {"x": x, "weight": weight}
    for name, tensor in named.items():
        tensor.requires_grad_(name == kept)
    linear_cross_entropy(x, weight, targets).backward()
    torch.testing.assert_close(grads(named[kept])[0], exact[kept], rtol=1e-12, atol=1e-12)
    assert all(tensor.grad is None for name, tensor in named.items() if name != kept)


def test_a_second_backward_raises() -> None:
    x, weight, targets = operands()
    value = linear_cross_entropy(x, weight, targets)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        value.backward()


def test_a_second_derivative_raises() -> None:
    x, weight, targets = operands()
    factor = torch.ones((), dtype=x.dtype, requires_grad=True)
    value = factor * linear_cross_entropy(x, weight, targets)
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_runs_on_fake_tensors() -> None:
    with FakeTensorMode():
        x = torch.empty(6, 4, requires_grad=True)
        weight = torch.empty(9, 4, requires_grad=True)
        linear_cross_entropy(x, weight, torch.zeros(6, dtype=torch.int64)).backward()
    assert [grad.shape for grad in grads(x, weight)] == [(6, 4), (9, 4)]


N, VOCAB, WIDTH = 1024, 50257, 16
ALL_LOGITS = 4 * N * VOCAB


def peak_bytes(cross_entropy: Loss, *, dtype: torch.dtype = torch.float32, grad: bool = True) -> int:
    """The most that was allocated at once, by the allocator's own events, over forward and backward."""
    x = torch.zeros(N, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.zeros(VOCAB, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.zeros(N, dtype=torch.int64)
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with profiler, torch.set_grad_enabled(grad):
        value = cross_entropy(x, weight, targets)
        if grad:
            value.backward()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events: list[Any] = profiler.profiler.kineto_results.events()
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_never_holds_all_the_logits() -> None:
    chunk_bytes = 4 * VOCAB * chunk_tokens(N, VOCAB, WIDTH)
    weight_bytes = 4 * VOCAB * WIDTH
    assert chunk_bytes <= ALL_LOGITS / 4
    assert peak_bytes(plain_cross_entropy) > 2 * ALL_LOGITS  # the measurement sees what it looks for
    assert chunk_bytes < peak_bytes(linear_cross_entropy) < chunk_bytes + 1.1 * weight_bytes


def test_evaluation_holds_a_chunk_and_nothing_for_gradients() -> None:
    chunk_bytes = 4 * VOCAB * chunk_tokens(N, VOCAB, WIDTH)
    assert peak_bytes(linear_cross_entropy, grad=False) < chunk_bytes + MIB


def test_low_precision_holds_a_chunk_in_float32_and_one_beside_it() -> None:
    chunk_bytes = 4 * VOCAB * chunk_tokens(N, VOCAB, WIDTH)
    float32_sum = 4 * VOCAB * WIDTH
    peak = peak_bytes(linear_cross_entropy, dtype=torch.bfloat16)
    assert peak < 1.5 * chunk_bytes + 1.6 * float32_sum


@given(st.integers(1, 2**20), st.integers(1, 2**18), st.integers(1, 2**14))
def test_chunks_are_bounded_and_alike(n_tokens: int, vocab_size: int, d_model: int) -> None:
    size = chunk_tokens(n_tokens, vocab_size, d_model)
    assert 1 <= size <= n_tokens
    n_chunks = -(-n_tokens // size)
    assert n_chunks * size - n_tokens < n_chunks  # no chunk is more than a token short, on average
    if 4 * size * vocab_size > 64 * MIB and size > 1:
        assert size <= max(d_model, -(-n_tokens // 64))
        assert size <= -(-n_tokens // 8)
    assert n_chunks <= 64  # so that a step's operations are bounded, whatever its batch
    if n_chunks > 1 and size < min(d_model, n_tokens // 8):
        assert 4 * 2 * size * vocab_size >= 64 * MIB - 8 * vocab_size  # nothing is cut finer than is worth it
