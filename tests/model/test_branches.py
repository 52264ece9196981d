"""The parts of a block against closed forms and against arithmetic written out in Python."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bptool.config.schema import ModelSettings
from bptool.model.attention import Attention, eager_attention, fused_attention, window_mask
from bptool.model.feed_forward import FeedForward
from bptool.model.normalization import OffsetRMSNorm, RMSNorm, make_norm
from bptool.model.position import rotation

Attend = Callable[..., Tensor]

CLOSED_FORMS: dict[str, Callable[[float], float]] = {
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu-tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: max(x, 0.0),
    "geglu-tanh": lambda x: CLOSED_FORMS["gelu-tanh"](3 * x) * x,
    "swiglu": lambda x: 3 * x / (1 + math.exp(-3 * x)) * x,  # the gate below is 3
}


@pytest.mark.parametrize("activation", CLOSED_FORMS)
def test_feed_forward(activation: str) -> None:
    """With up = 1, gate = 3 and down = 2 times the identity, each element goes through the activation alone."""
    settings = ModelSettings.model_validate({"d_model": 6, "n_heads": 1, "d_ff": 6, "activation": activation})
    branch = FeedForward(settings, settings.d_ff).double()
    with torch.no_grad():
        branch.up.weight.copy_(torch.eye(6))
        branch.down.weight.copy_(2 * torch.eye(6))
        if branch.gate is not None:
            branch.gate.weight.copy_(3 * torch.eye(6))
    points = [-3.0, -0.7, 0.0, 0.1, 1.3, 4.0]
    wanted = [2 * CLOSED_FORMS[activation](x) for x in points]
    assert branch(torch.tensor(points, dtype=torch.float64)).tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_rmsnorm_and_layernorm() -> None:
    x = torch.tensor([3.0, -1.0, 2.0, 4.0], dtype=torch.float64)
    settings = ModelSettings(d_model=4, n_heads=1, norm_eps=0.5, bias=True)
    rms = make_norm(settings).double()
    assert rms(x).tolist() == pytest.approx([v / math.sqrt(30 / 4 + 0.5) for v in (3, -1, 2, 4)])
    layer = make_norm(settings.model_copy(update={"norm": "layernorm"})).double()
    assert layer(x).tolist() == pytest.approx([(v - 2) / math.sqrt(14 / 4 + 0.5) for v in (3, -1, 2, 4)])
    offset = OffsetRMSNorm(4, eps=0.5).double()
    with torch.no_grad():
        offset.weight.fill_(0.5)
    assert offset(x).tolist() == pytest.approx([1.5 * v / math.sqrt(30 / 4 + 0.5) for v in (3, -1, 2, 4)])
    none = make_norm(settings.model_copy(update={"norm": "none"}))
    assert none(x) is x
    assert [len(list(norm.parameters())) for norm in (rms, layer, none)] == [1, 2, 0]


def test_rmsnorm_takes_narrower_input_in_the_weights_precision() -> None:
    x = torch.tensor([3.0, -1.0, 2.0, 4.0], dtype=torch.bfloat16)
    found = RMSNorm(4, eps=0.5)(x)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([v / math.sqrt(30 / 4 + 0.5) for v in (3, -1, 2, 4)])


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Token by token and head by head; query head h reads key and value head h // (H / K)."""
    batch, heads, tokens, width = q.shape
    shared = heads // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                scores = [float(q[b, h, t] @ k[b, h // shared, s]) / math.sqrt(width) for s in range(t + 1)]
                weights = [math.exp(score) for score in scores]
                for s in range(t + 1):
                    out[b, h, t] += weights[s] / sum(weights) * v[b, h // shared, s]
    return out


def heads(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, n, 5, 8, dtype=dtype)


@pytest.mark.parametrize("attend", [fused_attention, eager_attention])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_attention_is_the_one_written_out(attend: Attend, n_kv_heads: int) -> None:
    q, k, v = heads(4), heads(n_kv_heads), heads(n_kv_heads)
    torch.testing.assert_close(attend(q, k, v, 0.0), attention_by_hand(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_kv_heads", [2, 4])
def test_fused_and_eager_attention_have_equal_gradients(n_kv_heads: int) -> None:
    q, k, v = inputs = [heads(n).requires_grad_() for n in (4, n_kv_heads, n_kv_heads)]
    slope = heads(4)
    fused = torch.autograd.grad(fused_attention(q, k, v, 0.0), inputs, slope)
    eager = torch.autograd.grad(eager_attention(q, k, v, 0.0), inputs, slope)
    for one, other in zip(fused, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("attend", [fused_attention, eager_attention])
@pytest.mark.parametrize("window", [1, 3, 5])
def test_a_window_is_the_last_tokens(attend: Attend, window: int) -> None:
    """The mask's own memory is all there is of it, and a token attends to `window` tokens, itself among them."""
    q, k, v = heads(4), heads(2), heads(2)
    mask = window_mask(5, window, torch.float64, torch.device("cpu"))
    found = attend(q, k, v, 0.0, mask, scale=0.7)
    for t in range(5):
        first = max(0, t - window + 1)
        for h in range(4):
            weights = (0.7 * k[0, h // 2, first : t + 1] @ q[0, h, t]).softmax(0)
            torch.testing.assert_close(found[0, h, t], weights @ v[0, h // 2, first : t + 1])


def test_softcapped_scores() -> None:
    """By hand for the second of two tokens, whose scores are 3 and -8."""
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 1, 2, 1) for x in ([0.0, 1.0], [3.0, -8.0], [1.0, 5.0]))
    first, second = (math.exp(2 * math.tanh(score / 2)) for score in (3, -8))
    wanted = (first * 1 + second * 5) / (first + second)
    assert eager_attention(q, k, v, 0.0, softcap=2.0)[0, 0, 1].item() == pytest.approx(wanted)


@pytest.mark.parametrize("attend", [fused_attention, eager_attention])
def test_dropout_falls_on_attention_weights(attend: Attend) -> None:
    """The first token attends to itself with weight 1, so its output is 0 or 1 / (1 - p) times its value."""
    q, v = torch.zeros(4000, 1, 2, 1), torch.ones(4000, 1, 2, 1)
    first = attend(q, q, v, 0.25)[:, 0, 0, 0]
    kept = first != 0
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 4 / 3))
    assert kept.double().mean().item() == pytest.approx(0.75, abs=5 * math.sqrt(0.25 * 0.75 / 4000))


def test_qk_norm_makes_the_scale_of_queries_and_keys_immaterial() -> None:
    attention = Attention(ModelSettings(d_model=16, n_heads=4, n_kv_heads=2, qk_norm=True, norm_eps=1e-12)).double()
    x, angles = torch.randn(2, 5, 16, dtype=torch.float64), rotation(5, 4, ModelSettings().rope, torch.device("cpu"))
    before = attention(x, angles)
    with torch.no_grad():
        attention.query.weight.mul_(7)
        attention.key.weight.mul_(0.3)
    torch.testing.assert_close(attention(x, angles), before, rtol=1e-6, atol=1e-9)
    assert attention.query_norm is not None
    with torch.no_grad():
        attention.query_norm.weight.mul_(3)
    assert (attention(x, angles) - before).abs().max() > 1e-3


def test_qk_norm_and_rotation_leave_the_kernels_dtype_alone() -> None:
    attention = Attention(ModelSettings(d_model=16, n_heads=4, qk_norm=True))
    seen: list[torch.dtype] = []

    def watched(q_BHTQ: Tensor, k_BKSQ: Tensor, v_BKSQ: Tensor, dropout: float, mask_TS: Tensor | None) -> Tensor:
        seen.extend((q_BHTQ.dtype, k_BKSQ.dtype, v_BKSQ.dtype))
        return v_BKSQ

    attention.attend = watched
    with torch.autocast("cpu", torch.bfloat16):
        attention(torch.randn(1, 5, 16), rotation(5, 4, ModelSettings().rope, torch.device("cpu")))
    assert set(seen) == {torch.bfloat16}
