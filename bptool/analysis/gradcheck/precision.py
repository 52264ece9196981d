"""What a number format does to each gradient: the trainer's own step in that format beside float64.

Both have the same weights (those of the format), the same batch and the same dropout. "Underflow" is a number that is
not 0 in float64 and exactly 0 in the format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bptool.analysis.gradcheck.model_at_hand import ModelAtHand, gradients
from bptool.analysis.gradcheck.random_state import random_state_kept
from bptool.analysis.result import Record
from bptool.config.overrides import of_mode
from bptool.config.schema import Config
from bptool.training.assembly import default_dtype
from bptool.training.step import TrainStep
from bptool.training.workload import Workload

Gradients = Mapping[str, Tensor | None]

_NOTHING = 1e-12
"""A gradient so much smaller than all of them together is float64's own rounding of what is 0 by structure."""


class FormatError(Record):
    """How far a gradient in some format is from float64's.

    Attributes:
        relative_error: norm of the difference over float64's norm; None where that is 0.
        cosine: of the angle between the two; None where either is 0.
        underflow_share: of the elements that are not 0 in float64, how many are exactly 0 in the format.
        nonfinite_share: of all elements, how many are NaN or infinite in the format.
    """

    relative_error: float | None
    cosine: float | None
    underflow_share: float
    nonfinite_share: float


class TensorPrecision(FormatError):
    """One parameter's gradient.

    Attributes:
        gradient_norm: in float64.
        structurally_zero: in float64 it is nothing but rounding (a key bias under softmax), so its error says nothing.
        without_scaling: the same without a loss scale; None where the format has none.
    """

    name: str
    shape: list[int]
    gradient_norm: float
    structurally_zero: bool
    without_scaling: FormatError | None = None


class PrecisionCheck(Record):
    """All gradients of one step in one format beside float64's.

    Attributes:
        loss_scale: fp16's, halved until every gradient was finite, as training does; None where the format has none.
        loss, loss_float64: of the step's one micro-batch.
        whole: all gradients as one vector.
        tensors: one for each parameter, those that lose most first; what is structurally zero comes last.
        detail: a sentence with the figures.
        notes: what is not as it is in training, and why.
    """

    mode: str
    device: str
    loss_scale: float | None
    loss: float
    loss_float64: float
    whole: FormatError
    whole_without_scaling: FormatError | None
    tensors: list[TensorPrecision]
    detail: str
    notes: list[str]


def check_precision(
    config: Config,
    workload: Workload,
    mode: str,
    *,
    built_in: bool,
    seed: int,
    device: torch.device | None = None,
) -> PrecisionCheck:
    """One forward and backward in the format `mode` (as `precision.mode`), and one in float64.

    Args:
        config: of sizes that float64 can afford.
        seed: weights, batch and dropout are functions of it.

    Raises:
        DeviceError: the device cannot do this format (tf32 needs CUDA).
    """
    at_hand = ModelAtHand(config, workload, built_in, seed, device or torch.device("cpu"))
    with random_state_kept(at_hand.device):
        return _compared_with_float64(at_hand, mode)


def _compared_with_float64(at_hand: ModelAtHand, mode: str) -> PrecisionCheck:
    changes = of_mode(mode) | {"training.compile": False}
    notes = []
    if at_hand.device.type != "cpu" and not at_hand.built_in:
        notes.append("a GPU draws other dropout masks in each format, so a model with dropout seems to lose more")
    elif at_hand.device.type != "cpu" and at_hand.config.model.dropout:
        notes.append("dropout was off: a GPU draws other masks in each format")
        changes["model.dropout"] = 0.0
    at_hand = at_hand.changed(changes)
    step = at_hand.trained_step()
    exact, exact_loss = _in_float64(at_hand, step.model)
    found, loss = _scaled_until_finite(at_hand, step)
    scale = step.precision.loss_scale
    unscaled = None
    if scale is not None:
        used, scale.value = scale.value, 1.0
        unscaled, _ = _gradient(at_hand, step)
        scale.value = used
    tensors = _ranked(found, exact, unscaled)
    whole = _compared(list(found.values()), list(exact.values()))
    whole_unscaled = _compared(list(unscaled.values()), list(exact.values())) if unscaled is not None else None
    return PrecisionCheck(
        mode=mode,
        device=at_hand.device.type,
        loss_scale=None if scale is None else scale.value,
        loss=loss,
        loss_float64=exact_loss,
        whole=whole,
        whole_without_scaling=whole_unscaled,
        tensors=tensors,
        detail=_sentence(mode, whole, whole_unscaled, tensors),
        notes=notes,
    )


def _in_float64(at_hand: ModelAtHand, model: nn.Module) -> tuple[dict[str, Tensor | None], float]:
    """The gradient of the same weights, and the loss."""
    step = at_hand.exact_step()
    step.model.load_state_dict(model.state_dict())  # widened, which rounds nothing
    at_hand.seed_all("dropout")
    with default_dtype(torch.float64):
        loss = step.accumulate(at_hand.batches(1, torch.float64), [1])
    return gradients(step.model), float(loss)


def _gradient(at_hand: ModelAtHand, step: TrainStep) -> tuple[dict[str, Tensor | None], float]:
    """The gradient in the step's own format, without the loss scale, in float64 to compare with; and the loss."""
    step.optimizers.zero_grad()
    at_hand.seed_all("dropout")
    loss = step.accumulate(at_hand.batches(1, None), [1])
    scale = 1.0 if step.precision.loss_scale is None else step.precision.loss_scale.value
    found = {name: None if g is None else g.double() / scale for name, g in gradients(step.model).items()}
    return found, float(loss)


def _scaled_until_finite(at_hand: ModelAtHand, step: TrainStep) -> tuple[dict[str, Tensor | None], float]:
    """The gradient at the first loss scale that lets it be finite, as the trainer comes by it."""
    while True:
        found, loss = _gradient(at_hand, step)
        finite = all(bool(gradient.isfinite().all()) for gradient in found.values() if gradient is not None)
        scale = step.precision.loss_scale
        if finite or scale is None or scale.exhausted:
            return found, loss
        scale.update(finite=False)


def _ranked(found: Gradients, exact: Gradients, unscaled: Gradients | None) -> list[TensorPrecision]:
    """One record for each parameter, the largest relative error first."""
    whole = math.sqrt(sum(float(gradient.square().sum()) for gradient in exact.values() if gradient is not None))
    records = []
    for name, right in exact.items():
        if right is None:
            continue
        norm = float(right.norm())
        records.append(
            TensorPrecision(
                name=name,
                shape=list(right.shape),
                gradient_norm=norm,
                structurally_zero=norm <= _NOTHING * whole,
                without_scaling=None if unscaled is None else _compared([unscaled[name]], [right]),
                **_compared([found[name]], [right]).model_dump(),
            )
        )
    return sorted(records, key=_loss_order)


def _loss_order(record: TensorPrecision) -> tuple[bool, float]:
    error = record.relative_error
    lost = 0.0 if error is None else math.inf if math.isnan(error) else error
    return record.structurally_zero, -lost


def _compared(found: list[Tensor | None], exact: list[Tensor | None]) -> FormatError:
    """Several gradients as one vector, in the format and in float64."""
    right = torch.cat([x.double().flatten() for x in exact if x is not None] or [torch.zeros(0, dtype=torch.float64)])
    pairs = [(x, like) for x, like in zip(found, exact, strict=True) if like is not None]
    flat = [(torch.zeros_like(like) if x is None else x).double().flatten() for x, like in pairs]
    left = torch.cat(flat or [torch.zeros(0, dtype=torch.float64)])
    norm, other, nonzero = float(right.norm()), float(left.norm()), int(right.count_nonzero())
    lost = int(((left == 0) & (right != 0)).sum())
    return FormatError(
        relative_error=float((left - right).norm()) / norm if norm else None,
        cosine=float((left / other) @ (right / norm)) if norm and other else None,
        underflow_share=lost / nonzero if nonzero else 0.0,
        nonfinite_share=1 - int(left.isfinite().sum()) / left.numel() if left.numel() else 0.0,
    )


def _sentence(mode: str, whole: FormatError, unscaled: FormatError | None, tensors: list[TensorPrecision]) -> str:
    text = f"in {mode} the whole gradient is off by {_percent(whole.relative_error)}"
    if whole.nonfinite_share:
        text += f", {whole.nonfinite_share:.2%} of it is NaN or infinite"
    text += f", {_share(whole.underflow_share)} of it underflows to 0"
    if unscaled is not None:
        text += f" ({_share(unscaled.underflow_share)} without loss scaling)"
    if not tensors:
        return text
    worst = tensors[0]
    return f"{text}; {worst.name} loses most: {_percent(worst.relative_error)}"


def _percent(share: float | None) -> str:
    if share is None:
        return "an unknown share (it is 0 in float64)"
    return f"{share:.2g} of its norm" if share < 1e-3 else f"{share:.2%}"


def _share(share: float) -> str:
    if share == 0:
        return "none"
    return f"{share:.2%}" if share >= 1e-4 else f"{share:.1e}"
