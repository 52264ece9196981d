"""How far a row's gradient is from one in float64: same weights, same samples, no dropout in either.

The samples are those of the reference row's first micro-batch. A row with smaller micro-batches splits them, and
weighs each part by what it counts, as its own step would; one with larger ones takes them at once.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map  # what torch itself nests tensors with

from bptool.analysis.activation_budget.planning import with_plan
from bptool.analysis.compare.job import Outcome
from bptool.analysis.compare.same_start import beginning_with, data_of, initial_state, with_shared_weights
from bptool.analysis.memory.fit import is_out_of_memory, predict_peak
from bptool.analysis.question import Question
from bptool.config.overrides import override
from bptool.config.schema import ActivationCheckpointSettings
from bptool.errors import BptoolError
from bptool.hardware import resolve_device
from bptool.training.activation_checkpoint import announced, apply
from bptool.training.assembly import build_model, build_step
from bptool.training.instrument import Announcer
from bptool.training.seeds import seed_step
from bptool.training.step import TrainStep
from bptool.training.user_code import describe
from bptool.training.workload import Batch, Workload, transformer_workload
from bptool.units import format_bytes

Dtype = Literal["float64", "float32"]
Policy = Literal["none", "full"]
_DTYPES: dict[Dtype, torch.dtype] = {"float64": torch.float64, "float32": torch.float32}
_NEGLIGIBLE = 1e-3
_NO_MEMORY = "memory ran out"
_CHUNK = 2**24
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def write_reference(question: Question, folder: Path, file: Path, *, sequences: int) -> Outcome:
    """Write the reference gradient to `file`, in safetensors by parameter; `figures` say its dtype and what went wrong.

    It is in float64 where the model takes that and memory allows it, else in float32; recomputing where it must.
    """
    device = resolve_device(question.machine.device)
    question = _without_dropout(question)
    batch = _samples(question, device, folder, sequences)
    state = initial_state(question.config, question.workload, device)
    workload = beginning_with(state, question.workload)
    refusals: dict[str, str] = {}
    for dtype, policy in _attempts(question, sequences, refusals):
        if dtype in refusals and refusals[dtype] != _NO_MEMORY:
            continue
        try:
            gradient = _gradient_in(dtype, policy, replace(question, workload=workload), device, batch)
        except BptoolError:
            raise
        except Exception as error:  # such as an operation that knows no float64
            refusals[dtype] = _NO_MEMORY if is_out_of_memory(error) else describe(error).splitlines()[0]
        else:
            save_file(gradient, file)
            return Outcome(figures={"reference": dtype}, notes=_notes(refusals, dtype))
        gc.collect()
        torch.cuda.empty_cache()
    return Outcome(figures={"reference": None}, notes=_notes(refusals, None))


def gradient_error(question: Question, folder: Path, file: Path, *, sequences: int) -> Outcome:
    """The figures of a `GradientComparison` with the reference in `file`.

    Raises:
        BptoolError: the gradient cannot be had here.
    """
    device = resolve_device(question.machine.device)
    question = with_plan(_without_dropout(question))
    batch = _samples(question, device, folder, sequences)
    question = with_shared_weights(question, device)
    step = build_step(question.config, question.workload, device, Announcer())
    parts = [batch] if question.code else split(batch, question.config.training.micro_batch_size)
    scale = _accumulate(step, parts, question.config.run.seed)
    with safe_open(file, "pt", device=str(device)) as reference:
        trained = [(name, p) for name, p in step.model.named_parameters() if p.requires_grad]
        distances = [_distance(name, p, scale, reference.get_tensor(name)) for name, p in trained]
    return Outcome(figures={"relative_error": overall(distances), "layers": by_layer(distances)})


@dataclass(frozen=True)
class Distance:
    """Of one parameter's gradient from the reference.

    Attributes:
        error, norm: sums of squares: of the difference, and of the reference.
    """

    name: str
    error: float
    norm: float
    count: int


def overall(distances: Sequence[Distance]) -> float:
    """The distance over the reference's norm, all parameters together."""
    return _ratio(sum(one.error for one in distances), sum(one.norm for one in distances))


def by_layer(distances: Sequence[Distance]) -> dict[str, float]:
    """The same by the module that owns the parameters.

    A gradient that is as good as zero (that of a bias before a normalisation) has no direction to be wrong in: a
    module's norm counts as a thousandth of its share of the whole gradient's, by its number of elements, at least.
    """
    squares, count = sum(one.norm for one in distances), sum(one.count for one in distances)
    layers: dict[str, list[Distance]] = {}
    for one in distances:
        layers.setdefault(one.name.rpartition(".")[0] or "model", []).append(one)
    return {
        name: _ratio(
            sum(one.error for one in own),
            max(sum(one.norm for one in own), _NEGLIGIBLE**2 * squares * sum(one.count for one in own) / count),
        )
        for name, own in layers.items()
    }


def split(batch: Batch, size: int) -> list[Batch]:
    """Parts of `size` sequences; the last one may be smaller."""
    count = len(tree_leaves(batch)[0])
    return [_rows(batch, slice(first, first + size)) for first in range(0, count, size)]


def _rows(batch: Batch, rows: slice) -> Batch:
    return tree_map(lambda leaf: leaf[rows], batch)


def _ratio(error: float, norm: float) -> float:
    """Where both are zero there is no error."""
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / norm)


def _without_dropout(question: Question) -> Question:
    """The built-in transformer's attention draws its own; every module's is turned off once it is built."""
    if question.code:
        return replace(question, workload=_dropout_off(question.workload))
    config = override(question.config, {"model.dropout": 0.0})
    return replace(question, config=config, workload=transformer_workload(config))


def _dropout_off(workload: Workload) -> Workload:
    def model() -> nn.Module:
        built = workload.model()
        for module in built.modules():
            if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
                module.dropout = 0.0
            elif isinstance(module, _DROPOUTS):
                module.p = 0.0
        return built

    return replace(workload, model=model)


def _samples(question: Question, device: torch.device, folder: Path, sequences: int) -> Batch:
    batch_of = {"training.micro_batch_size": sequences, "training.gradient_accumulation_steps": 1}
    config = override(question.config, batch_of)
    workload = question.workload if question.code else transformer_workload(config)
    source, _ = data_of(replace(question, config=config, workload=workload), device, folder)
    return source.micro_batches(0)[0]


def _attempts(question: Question, sequences: int, refusals: dict[str, str]) -> Iterator[tuple[Dtype, Policy]]:
    """Dtypes and policies that should fit, the best first; a dtype that none of them fits is added to `refusals`.

    Float64 is taken to need twice what float32 does.
    """
    policies: tuple[Policy, ...] = ("none",) if question.code else ("none", "full")  # a user's block may not repeat
    available = question.machine.capacity_bytes
    needs = {policy: _predicted(question, policy, sequences) if available else None for policy in policies}
    factors: dict[Dtype, int] = {"float64": 2, "float32": 1}
    for dtype, factor in factors.items():
        fitting = [policy for policy, need in needs.items() if not (need and available and factor * need > available)]
        if not fitting:
            least = min(need for need in needs.values() if need)
            refusals[dtype] = f"needs {format_bytes(factor * least)}, {format_bytes(available or 0)} are there"
        yield from ((dtype, policy) for policy in fitting)


def _notes(refusals: dict[str, str], found: str | None) -> list[str]:
    return [f"no gradient in {dtype}: {why}" for dtype, why in refusals.items() if dtype != found]


def _predicted(question: Question, policy: Policy, sequences: int) -> int | None:
    """Peak in float32; None where fake tensors cannot tell."""
    config = override(
        question.config,
        {
            "activation_checkpoint.policy": policy,
            "precision.mode": "fp32",
            "optimizer.name": "gradient-descent",
            "optimizer.implementation": "auto",
            "training.micro_batch_size": sequences,
            "training.gradient_accumulation_steps": 1,
            "training.compile": False,
        },
    )
    workload = question.workload if question.code else transformer_workload(config)
    try:
        return predict_peak(replace(question, config=config, workload=workload)).peak_bytes
    except Exception:  # whatever it is, the reference itself shall meet it
        return None


def _gradient_in(
    dtype: Dtype, policy: Policy, question: Question, device: torch.device, batch: Batch
) -> dict[str, Tensor]:
    """By parameter, on the host."""
    torch.set_float32_matmul_precision("highest")
    workload, wanted = question.workload, _DTYPES[dtype]
    model = build_model(workload, device, wanted)
    if policy == "full":
        settings = ActivationCheckpointSettings(policy="full")
        apply(workload.blocks(model), settings, announced(Announcer()))
    model.train()
    seed_step(question.config.run.seed, 0)
    workload.loss(model, tree_map(lambda leaf: _cast(leaf, wanted), batch)).backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: (torch.zeros_like(p) if p.grad is None else p.grad).cpu().contiguous() for name, p in trained}


def _cast(leaf: object, dtype: torch.dtype) -> object:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.dtype == torch.float32 else leaf


def _distance(name: str, parameter: nn.Parameter, scale: float, reference: Tensor) -> Distance:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    error = norm = 0.0
    for part, exact in zip(gradient.reshape(-1).split(_CHUNK), reference.reshape(-1).split(_CHUNK), strict=True):
        error += float((part.double() / scale - exact.double()).square().sum())
        norm += float(exact.double().square().sum())
    return Distance(name, error, norm, parameter.numel())


def _accumulate(step: TrainStep, parts: Sequence[Batch], seed: int) -> float:
    """Leaves a finite gradient in `.grad`, and returns the scale that it is times; fp16's may have to come down."""
    weights = [int(step.workload.weight(part)) for part in parts]
    while True:
        seed_step(seed, 0)
        step.accumulate(parts, weights)
        scale = step.precision.loss_scale
        if scale is None:
            return 1.0
        finite = all(torch.isfinite(p.grad).all() for p in step.model.parameters() if p.grad is not None)
        if finite or scale.exhausted:
            return scale.value
        scale.update(finite=False)
        step.optimizers.zero_grad()
