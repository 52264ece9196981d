"""A transformer block whose every operation has a hand-written backward, and the bugs that people write into those.

`Block(width)` is right. `Block(width, bug)` computes the same values, with one of `BUGS` in its backward. Nothing in
bptool knows any of them.

Shapes: B batch, T tokens, D width, H heads, Q width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BUGS = (
    "linear: weight gradient 0.05% too large",
    "linear: weight gradient is zero",
    "linear: weight gradient is None",
    "linear: weight gradient has the wrong sign",
    "linear: weight gradient transposed",
    "linear: weight gradient is a mean over tokens",
    "linear: weight gradient is summed in bfloat16",
    "linear: weight gradient is summed in float32",
    "linear: weight gradient without the last token",
    "linear: one element of the weight gradient is zero",
    "linear: one row of the weight gradient is 1% off",
    "linear: input gradient transposed",
    "linear: bias gradient forgotten",
    "linear: bias gradient is a mean over tokens",
    "layer norm: another eps",
    "layer norm: mean's term dropped",
    "layer norm: variance's term dropped",
    "layer norm: variance over n - 1",
    "layer norm: scale forgotten",
    "layer norm: stale statistics",
    "layer norm: scale's gradient of the raw input",
    "rms norm: projection dropped",
    "gelu: derivative of the tanh form",
    "gelu: density's term dropped",
    "swiglu: gate and value swapped",
    "swiglu: derivative is the sigmoid alone",
    "rope: rotated forward once more",
    "rope: last pair not rotated back",
    "attention: scale dropped in dQ",
    "attention: scale applied twice in dK",
    "attention: sum's term dropped",
    "attention: mask off by one",
    "attention: one head forgotten",
    "attention: dK of K",
    "attention: dV with P not transposed",
    "attention: scores detached",
    "attention: last key forgotten",
    "dropout: another mask",
    "dropout: not rescaled",
    "residual: branch detached",
    "residual: branch counted twice",
    "embedding: repeated ids overwrite each other",
    "embedding: ids off by one",
    "loss: targets off by one",
    "loss: sum for a mean",
)

Backward = Callable[[Any, Tensor], Any]


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, bug: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bug = bug.partition("linear: ")[2]
        return x @ weight.mT + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        x_grad, bias_grad, weight_grad = grad @ weight, rows.sum(0), rows.mT @ inputs
        match ctx.bug:
            case "weight gradient 0.05% too large":
                weight_grad = weight_grad * 1.0005
            case "weight gradient is zero":
                weight_grad = torch.zeros_like(weight)
            case "weight gradient is None":
                return x_grad, None, bias_grad, None
            case "weight gradient has the wrong sign":
                weight_grad = -weight_grad
            case "weight gradient transposed":
                weight_grad = weight_grad.mT if weight.shape[0] == weight.shape[1] else weight_grad
            case "weight gradient is a mean over tokens":
                weight_grad = weight_grad / len(rows)
            case "weight gradient is summed in bfloat16":
                weight_grad = (rows.bfloat16().mT @ inputs.bfloat16()).double()
            case "weight gradient is summed in float32":
                weight_grad = (rows.float().mT @ inputs.float()).double()
            case "weight gradient without the last token":
                weight_grad = rows[:-1].mT @ inputs[:-1]
            case "one element of the weight gradient is zero":
                weight_grad[-1, len(weight_grad[0]) // 2] = 0
            case "one row of the weight gradient is 1% off":
                weight_grad[1] *= 1.01
            case "input gradient transposed":
                x_grad = grad @ weight.mT if weight.shape[0] == weight.shape[1] else x_grad
            case "bias gradient forgotten":
                bias_grad = torch.zeros_like(bias_grad)
            case "bias gradient is a mean over tokens":
                bias_grad = rows.mean(0)
        return x_grad, weight_grad, bias_grad, None


class LayerNorm(torch.autograd.Function):
    EPS = 1e-5

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, bug: str) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.bug = bug.partition("layer norm: ")[2]
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + LayerNorm.EPS).sqrt() * scale + shift

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        n = x.shape[-1]
        eps = 1e-6 if ctx.bug == "another eps" else LayerNorm.EPS
        centered = x - x.mean(-1, keepdim=True)
        variance = centered.square().sum(-1, keepdim=True) / (n - 1 if ctx.bug == "variance over n - 1" else n)
        if ctx.bug == "stale statistics":
            variance = variance.mean(dim=tuple(range(x.dim() - 1)), keepdim=True).expand_as(variance)
        inverse = (variance + eps).rsqrt()
        normal = centered * inverse
        slope = grad if ctx.bug == "scale forgotten" else grad * scale
        mean_term = 0 if ctx.bug == "mean's term dropped" else slope.mean(-1, keepdim=True)
        projection = normal * (slope * normal).mean(-1, keepdim=True)
        x_grad = inverse * (slope - mean_term - (0 if ctx.bug == "variance's term dropped" else projection))
        seen = x if ctx.bug == "scale's gradient of the raw input" else normal
        return x_grad, (grad * seen).flatten(0, -2).sum(0), grad.flatten(0, -2).sum(0), None


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bug: str) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.bug = bug.partition("rms norm: ")[2]
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        inverse = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        normal, slope = x * inverse, grad * scale
        projection = normal * (slope * normal).mean(-1, keepdim=True)
        x_grad = inverse * (slope - (0 if ctx.bug == "projection dropped" else projection))
        return x_grad, (grad * normal).flatten(0, -2).sum(0), None


class Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bug: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bug = bug.partition("gelu: ")[2]
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if ctx.bug == "derivative of the tanh form":
            root = math.sqrt(2 / math.pi)
            bend = torch.tanh(root * (x + 0.044715 * x**3))
            slope = 0.5 * (1 + bend) + 0.5 * x * (1 - bend.square()) * root * (1 + 3 * 0.044715 * x.square())
            return grad * slope, None
        share = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
        return grad * (share if ctx.bug == "density's term dropped" else share + x * density), None


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor, bug: str) -> Tensor:
        ctx.save_for_backward(gate, value)
        ctx.bug = bug.partition("swiglu: ")[2]
        return gate * gate.sigmoid() * value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, value = ctx.saved_tensors
        share = gate.sigmoid()
        slope = share if ctx.bug == "derivative is the sigmoid alone" else share * (1 + gate * (1 - share))
        found = grad * value * slope, grad * gate * share
        return (*(found[::-1] if ctx.bug == "gate and value swapped" else found), None)


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor, bug: str) -> Tensor:
        ctx.save_for_backward(angles)
        ctx.bug = bug.partition("rope: ")[2]
        return turned(x, angles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (angles,) = ctx.saved_tensors
        back = angles if ctx.bug == "rotated forward once more" else -angles
        if ctx.bug == "last pair not rotated back":
            back = back.clone()
            back[..., -1] = 0
        return turned(grad, back), None, None


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (i, i + Q/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Attention(torch.autograd.Function):
    """Causal attention on [B, H, T, Q]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bug: str) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.bug = bug.partition("attention: ")[2]
        return Attention.weights(q, k, 1) @ v

    @staticmethod
    def weights(q: Tensor, k: Tensor, diagonal: int) -> Tensor:
        future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(diagonal)
        return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf).softmax(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        p = Attention.weights(q, k, 2 if ctx.bug == "mask off by one" else 1)
        v_grad = (p if ctx.bug == "dV with P not transposed" else p.mT) @ grad
        p_grad = grad @ v.mT
        mean = 0 if ctx.bug == "sum's term dropped" else (p_grad * p).sum(-1, keepdim=True)
        s_grad = p * (p_grad - mean)
        if ctx.bug == "scores detached":
            s_grad = torch.zeros_like(s_grad)
        if ctx.bug == "last key forgotten":
            s_grad[..., -1] = 0
        q_grad = s_grad @ k * (1 if ctx.bug == "scale dropped in dQ" else scale)
        k_grad = s_grad.mT @ (k if ctx.bug == "dK of K" else q) * scale
        if ctx.bug == "scale applied twice in dK":
            k_grad = k_grad * scale
        if ctx.bug == "one head forgotten":
            q_grad[:, -1] = 0
        return q_grad, k_grad, v_grad, None


class Dropout(torch.autograd.Function):
    RATE = 0.25

    @staticmethod
    def forward(ctx: Any, x: Tensor, bug: str) -> Tensor:
        mask = (torch.rand_like(x) > Dropout.RATE).to(x.dtype)
        ctx.save_for_backward(mask)
        ctx.bug = bug.partition("dropout: ")[2]
        return x * mask / (1 - Dropout.RATE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        if ctx.bug == "another mask":
            mask = mask.roll(1, -1)
        return grad * mask / (1 if ctx.bug == "not rescaled" else 1 - Dropout.RATE), None


class Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, bug: str) -> Tensor:
        ctx.bug = bug.partition("residual: ")[2]
        return x + branch

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor = {"branch detached": 0, "branch counted twice": 2}.get(ctx.bug, 1)
        return grad.clone(), grad * factor, None


class Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor, bug: str) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.n_rows, ctx.bug = len(table), bug.partition("embedding: ")[2]
        return table[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        rows, flat = grad.flatten(0, -2), ids.flatten()
        total = grad.new_zeros(ctx.n_rows, grad.shape[-1])
        if ctx.bug == "repeated ids overwrite each other":
            total[flat] = rows
        else:
            total.index_add_(0, (flat + 1) % ctx.n_rows if ctx.bug == "ids off by one" else flat, rows)
        return None, total, None


class Loss(torch.autograd.Function):
    """Mean cross-entropy of [N, V] logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, bug: str) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.bug = bug.partition("loss: ")[2]
        return -logits.log_softmax(-1).gather(1, targets[:, None]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets = ctx.saved_tensors
        shown = targets.roll(1) if ctx.bug == "targets off by one" else targets
        slope = logits.softmax(-1) - torch.nn.functional.one_hot(shown, logits.shape[-1])
        return grad * slope / (1 if ctx.bug == "sum for a mean" else len(logits)), None, None


class Layer(nn.Module):
    """A linear layer."""

    def __init__(self, n_in: int, n_out: int, bug: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, dtype=torch.float64) / math.sqrt(n_in))
        self.bias = nn.Parameter(torch.randn(n_out, dtype=torch.float64) / 10)
        self.bug = bug

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Linear.apply(x, self.weight, self.bias, self.bug)  # type: ignore[no-untyped-call]
        return found


class Block(nn.Module):
    """Embedding, attention and two feed-forwards with residuals, and the loss.

    Args:
        bug: one of `BUGS`; empty: none. A linear layer's is in one layer alone.
    """

    N_HEADS, N_TOKENS, N_IDS = 2, 6, 11

    def __init__(self, width: int, bug: str = "") -> None:
        super().__init__()
        self.bug = bug
        self.table = nn.Parameter(torch.randn(self.N_IDS, width, dtype=torch.float64))
        self.query, self.key, self.value = (Layer(width, width, "") for _ in range(3))
        self.output = Layer(width, width, bug)
        self.gate, self.up = Layer(width, width, ""), Layer(width, width, "")
        self.down = Layer(width, width, "")
        self.head = Layer(width, self.N_IDS, "")
        ones = (nn.Parameter(1 + torch.randn(width, dtype=torch.float64) / 10) for _ in range(3))
        self.scale_1, self.scale_2, self.scale_3 = ones
        self.shift = nn.Parameter(torch.randn(width, dtype=torch.float64) / 10)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of ids [B, T]."""
        bug, n_heads = self.bug, self.N_HEADS
        x: Any = Embedding.apply(ids, self.table, bug)  # type: ignore[no-untyped-call]
        normal: Any = LayerNorm.apply(x, self.scale_1, self.shift, bug)  # type: ignore[no-untyped-call]
        q, k, v = (
            layer(normal).unflatten(-1, (n_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        pairs = q.shape[-1] // 2
        angles = torch.arange(q.shape[-2])[:, None] * 100.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        q, k = (Rope.apply(t, angles, bug) for t in (q, k))  # type: ignore[no-untyped-call]
        y: Any = Attention.apply(q, k, v, bug)  # type: ignore[no-untyped-call]
        y = Dropout.apply(self.output(y.transpose(1, 2).flatten(2)), bug)  # type: ignore[no-untyped-call]
        x = Residual.apply(x, y, bug)  # type: ignore[no-untyped-call]
        normal = RMSNorm.apply(x, self.scale_2, bug)  # type: ignore[no-untyped-call]
        h = SwiGLU.apply(self.gate(normal), self.up(normal), bug)  # type: ignore[no-untyped-call]
        x = x + Gelu.apply(self.down(h), bug)  # type: ignore[no-untyped-call]
        last: Any = RMSNorm.apply(x, self.scale_3, "")  # type: ignore[no-untyped-call]
        loss: Tensor = Loss.apply(self.head(last).flatten(0, 1), targets.flatten(), bug)  # type: ignore[no-untyped-call]
        return loss


def ids_and_targets(seed: int) -> tuple[Tensor, Tensor]:
    """Ids of two sequences, with repeats, and what follows each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(Block.N_IDS, (2, Block.N_TOKENS + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]
