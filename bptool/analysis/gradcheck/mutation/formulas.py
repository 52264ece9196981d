"""Bugs that people write into the backwards of normalisations, activations, lookups and losses.

Each is another function of the same inputs, whose derivative is the wrong one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bptool.analysis.gradcheck.mutation.calls import Call, Formula


@dataclass(frozen=True)
class FormulaBug:
    """A wrong derivative.

    Attributes:
        ops: names of the functions that can have it.
    """

    name: str
    ops: tuple[str, ...]
    formula: Formula


def scaled_slope(x: Tensor, factor: Tensor | float) -> Tensor:
    """x, whose gradient is multiplied."""
    return x.detach() + (x - x.detach()) * factor


@dataclass(frozen=True)
class _Norm:
    """A call of layer_norm or rms_norm: over which dimensions, and its statistics."""

    x: Tensor
    dims: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centers: bool

    @classmethod
    def of(cls, call: Call) -> _Norm:
        x, centers = call.argument(0, "input"), "layer" in call.function.__name__
        shape = call.argument(1, "normalized_shape")
        dims = tuple(range(-(len(shape) if not isinstance(shape, int) else 1), 0))
        weight, bias = call.argument(2, "weight"), call.argument(3, "bias") if centers else None
        eps = call.argument(4 if centers else 3, "eps")
        given = (1e-5 if centers else torch.finfo(x.dtype).eps) if eps is None else float(eps)
        return cls(x, dims, weight, bias, given, centers)

    @property
    def centered(self) -> Tensor:
        return self.x - self.x.mean(self.dims, keepdim=True) if self.centers else self.x

    def inverse(self, *, eps: float | None = None, unbiased: bool = False) -> Tensor:
        squares = self.centered.square()
        mean = squares.mean(self.dims, keepdim=True)
        n = squares.numel() // mean.numel()
        return (mean * (n / (n - 1) if unbiased else 1.0) + (self.eps if eps is None else eps)).rsqrt()

    def output(self, normal: Tensor, weight: Tensor | None) -> Tensor:
        scaled = normal if weight is None else normal * weight
        return scaled if self.bias is None else scaled + self.bias


def _norm(made: Callable[[_Norm], Tensor | None]) -> Formula:
    def formula(call: Call) -> Tensor | None:
        norm = _Norm.of(call)
        normal = made(norm)
        return None if normal is None else norm.output(normal, norm.weight)

    return formula


def _scale_forgotten(call: Call) -> Tensor | None:
    norm = _Norm.of(call)
    if norm.weight is None:
        return None
    return norm.output((norm.centered * norm.inverse()).detach(), norm.weight) + norm.centered * norm.inverse()


def _raw_input(call: Call) -> Tensor | None:
    norm = _Norm.of(call)
    if norm.weight is None or not norm.weight.requires_grad:
        return None
    return norm.output(norm.centered * norm.inverse(), norm.weight.detach()) + norm.x.detach() * norm.weight


def _other_rows(norm: _Norm) -> Tensor | None:
    """The statistics of all rows together, as they are left where a buffer is shared."""
    inverse = norm.inverse()
    if inverse.numel() == 1:
        return None
    return norm.centered * inverse.mean().expand_as(inverse)


def _layer(made: Callable[[_Norm], Tensor | None]) -> Formula:
    return _norm(lambda norm: made(norm) if norm.centers else None)


def _of_x(made: Callable[[Tensor, Call], Tensor | None]) -> Formula:
    def formula(call: Call) -> Tensor | None:
        x = call.argument(0, "input")
        return made(x, call) if isinstance(x, Tensor) and x.is_floating_point() else None

    return formula


def _gelu(x: Tensor, call: Call) -> Tensor:
    approximate = call.argument(1, "approximate", "none")
    return F.gelu(x, approximate="none" if approximate == "tanh" else "tanh")


def _other_dropout(x: Tensor, call: Call) -> Tensor | None:
    """The generator goes on, so that this is another mask."""
    if torch.equal(x, call.right):
        return None
    other: Tensor = call.function(*call.args, **call.kwargs)
    return other


def _dropout_not_rescaled(x: Tensor, call: Call) -> Tensor | None:
    return None if torch.equal(x, call.right) else x * (call.right != 0)


def _softmax(x: Tensor, call: Call) -> Tensor | None:
    dim = call.argument(1, "dim")
    if not isinstance(dim, int):
        return None
    logarithm = x - x.detach().logsumexp(dim, keepdim=True)
    return logarithm if "log" in call.function.__name__ else logarithm.exp()


def _embedding(changed: Callable[[Tensor, Tensor], Tensor]) -> Formula:
    def formula(call: Call) -> Tensor | None:
        ids: Tensor = call.argument(0, "input")
        return changed(ids, call.argument(1, "weight"))

    return formula


def _overwritten(ids: Tensor, weight: Tensor) -> Tensor:
    """Of an id that comes several times the last place alone counts."""
    flat = ids.flatten()
    last = torch.full((len(weight),), -1, device=ids.device).scatter_reduce(
        0, flat, torch.arange(len(flat), device=ids.device), "amax"
    )
    counts = last[flat] == torch.arange(len(flat), device=ids.device)
    return F.embedding(ids, weight) * counts.view(*ids.shape, 1)


def _cross_entropy(changed: Callable[[Call, Tensor, Tensor], Tensor | None]) -> Formula:
    def formula(call: Call) -> Tensor | None:
        scores, targets = call.argument(0, "input"), call.argument(1, "target")
        return None if targets.is_floating_point() or scores.dim() != 2 else changed(call, scores, targets)

    return formula


def _again(call: Call, scores: Tensor, targets: Tensor, **more: Any) -> Tensor:
    """The same loss of other targets, or with other options."""
    options = {key: value for key, value in call.kwargs.items() if key not in ("input", "target")} | more
    found: Tensor = F.cross_entropy(scores, targets, *call.args[2:], **options)
    return found


def _next_target(call: Call, scores: Tensor, targets: Tensor) -> Tensor:
    ignored = call.argument(4, "ignore_index", -100)
    return _again(call, scores, torch.where(targets == ignored, targets, (targets + 1) % scores.shape[1]))


def _sum_for_mean(call: Call, scores: Tensor, targets: Tensor) -> Tensor | None:
    mean = call.argument(6, "reduction", "mean") == "mean" and len(call.args) <= 6
    return _again(call, scores, targets, reduction="sum") if mean else None


def _no_one_hot(call: Call, scores: Tensor, targets: Tensor) -> Tensor | None:
    return call.right + scores.logsumexp(1).mean() if call.right.dim() == 0 else None


def _mul_swapped(call: Call) -> Tensor | None:
    """Each factor's gradient by itself in place of the other: gate and value exchanged."""
    a, b = call.args[:2]
    if not all(isinstance(one, Tensor) and one.requires_grad for one in (a, b)) or a.shape != b.shape or a is b:
        return None
    swapped: Tensor = a * a.detach() + b * b.detach()
    return swapped


def _add(factor: float, which: int) -> Formula:
    def formula(call: Call) -> Tensor | None:
        pair = call.args[:2]
        if not all(isinstance(one, Tensor) and one.requires_grad for one in pair) or pair[0].shape != pair[1].shape:
            return None
        other: Tensor = pair[1 - which]
        return scaled_slope(pair[which], factor) + other

    return formula


_NORMS = ("layer_norm", "rms_norm")
FORMULA_BUGS: tuple[FormulaBug, ...] = (
    FormulaBug("eps 10 times too large", _NORMS, _norm(lambda n: n.centered * n.inverse(eps=10 * n.eps))),
    FormulaBug(
        "statistics taken for constants",
        _NORMS,
        _norm(lambda n: (n.x - (n.x - n.centered).detach()) * n.inverse().detach()),
    ),
    FormulaBug("variance's term dropped", ("layer_norm",), _layer(lambda n: n.centered * n.inverse().detach())),
    FormulaBug(
        "mean's term dropped", ("layer_norm",), _layer(lambda n: (n.x - (n.x - n.centered).detach()) * n.inverse())
    ),
    FormulaBug("variance over n - 1", ("layer_norm",), _layer(lambda n: n.centered * n.inverse(unbiased=True))),
    FormulaBug("statistics of another row", _NORMS, _norm(_other_rows)),
    FormulaBug("scale forgotten", _NORMS, _scale_forgotten),
    FormulaBug("scale's gradient of the raw input", _NORMS, _raw_input),
    FormulaBug("derivative of the other form (tanh, erf)", ("gelu",), _of_x(_gelu)),
    FormulaBug("density's term dropped", ("gelu",), _of_x(lambda x, call: x * (call.right / x.detach()))),
    FormulaBug("derivative is the sigmoid alone", ("silu",), _of_x(lambda x, call: x * x.detach().sigmoid())),
    FormulaBug("negative side lets 1% through", ("relu",), _of_x(lambda x, call: F.leaky_relu(x, 0.01))),
    FormulaBug("1 - y for 1 - y^2", ("tanh",), _of_x(lambda x, call: x * (1 - call.right))),
    FormulaBug("y for y (1 - y)", ("sigmoid",), _of_x(lambda x, call: x * call.right)),
    FormulaBug("the input in place of the saved result", ("exp",), _of_x(lambda x, call: x * x.detach())),
    FormulaBug("sum's term dropped", ("softmax", "log_softmax"), _of_x(_softmax)),
    FormulaBug("another mask", ("dropout",), _of_x(_other_dropout)),
    FormulaBug("not rescaled", ("dropout",), _of_x(_dropout_not_rescaled)),
    FormulaBug("repeated ids overwrite each other", ("embedding",), _embedding(_overwritten)),
    FormulaBug("ids off by one", ("embedding",), _embedding(lambda i, w: F.embedding((i + 1) % len(w), w))),
    FormulaBug("targets off by one", ("cross_entropy",), _cross_entropy(_next_target)),
    FormulaBug("sum for the mean", ("cross_entropy",), _cross_entropy(_sum_for_mean)),
    FormulaBug("one-hot forgotten", ("cross_entropy",), _cross_entropy(_no_one_hot)),
    FormulaBug("factors exchanged", ("mul",), _mul_swapped),
    FormulaBug("first branch detached", ("add",), _add(0.0, 0)),
    FormulaBug("second branch detached", ("add",), _add(0.0, 1)),
    FormulaBug("second branch counted twice", ("add",), _add(2.0, 1)),
)
