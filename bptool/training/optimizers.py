"""Update rules. PyTorch's own wherever it has one; all of them behind one small face."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, Optimizer

from bptool.config.schema import Bf16Update, OptimizerSettings
from bptool.errors import ConfigError, ResumeError
from bptool.hardware import acts_as_cuda
from bptool.training.rounding import MASTER, MasterUpdate, StochasticUpdate, WideUpdate

_IMPLEMENTATIONS = {  # the fastest first: `auto` takes it
    "gradient-descent": ("loop",),
    "sgd": ("fused", "foreach", "loop"),
    "adam": ("fused", "foreach", "loop"),
    "adamw": ("fused", "foreach", "loop"),
    "muon": ("fused", "foreach", "loop"),
    "adafactor": ("foreach", "loop"),
}


class GradientDescent(Optimizer):
    """`theta - lr * grad`, to the bit, and nothing else: no momentum, no decay, no state."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "the training step computes its gradients itself"
        for group in self.param_groups:
            for theta in group["params"]:
                if theta.grad is not None:
                    theta.sub_(group["lr"] * theta.grad)  # two roundings, as written; add_(alpha=) may fuse them


class Optimizers:
    """One or more optimizers that together own a model's trainable parameters.

    Its state is a flat mapping from `PARAMETER/KEY` (`blocks.0.attention.query.weight/exp_avg`) to tensors: the same
    names whatever the grouping, the wrapper or the implementation.
    """

    def __init__(self, optimizers: list[Optimizer], names: Mapping[nn.Parameter, str]) -> None:
        self._optimizers = optimizers
        self._names = dict(names)

    def set_learning_rate(self, lr: float) -> None:
        """Before a step."""
        for group in self._groups():
            group["lr"] = lr

    def step(self) -> None:
        """Apply one update."""
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients, and the memory that they hold."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    @property
    def parameters(self) -> list[Tensor]:
        """Every parameter that is updated."""
        return [parameter for group in self._groups() for parameter in group["params"]]

    def state(self) -> dict[str, Tensor]:
        """The optimizers' state, not copied."""
        return {
            f"{self._names[parameter]}/{key}": value
            for optimizer in self._optimizers
            for parameter, entries in _states(optimizer)
            for key, value in entries.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state()` gave; master copies only where there are to be some.

        Raises:
            ResumeError: the state is of a parameter that this model has not.
        """
        owners = {self._names[p]: (o, p) for o in self._optimizers for g in o.param_groups for p in g["params"]}
        for name, value in state.items():
            parameter_name, key = name.rsplit("/", 1)
            if parameter_name not in owners:
                raise ResumeError(f"the optimizer's state is of a parameter that this model has not: {parameter_name}")
            optimizer, parameter = owners[parameter_name]
            if key != MASTER or isinstance(optimizer, MasterUpdate):
                optimizer.state[parameter][key] = _placed(key, value, parameter, optimizer)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]


def build_optimizers(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    settings: OptimizerSettings,
    bf16_update: Bf16Update = "nearest",
) -> Optimizers:
    """The optimizers that `settings` asks for, over the model's trainable parameters.

    Matrices (two dimensions or more) are decayed, vectors are not. Muon takes the two-dimensional weights inside
    `blocks`, as its authors do (embeddings and the output projection are not hidden layers), and AdamW the rest: also
    stacks of matrices, such as experts', as PyTorch's Muon takes them one by one alone. How an update is rounded into
    parameters of bf16 is `bf16_update`'s to say; it changes nothing for others.

    Raises:
        ConfigError: this optimizer has no such implementation (here), or there is nothing to train.
    """
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    if not names:
        raise ConfigError("model", ["no parameter requires a gradient, so there is nothing to train"])
    if bf16_update == "nearest":
        return Optimizers(_rules(list(names), blocks, _without_broken_kernel(settings, names)), names)
    rules = _rules(list(names), blocks, settings)
    return Optimizers([_WIDE_UPDATES[bf16_update](rule) for rule in rules], names)


_WIDE_UPDATES: dict[Bf16Update, type[WideUpdate]] = {"stochastic": StochasticUpdate, "master": MasterUpdate}


def _rules(parameters: list[nn.Parameter], blocks: Iterable[nn.Module], settings: OptimizerSettings) -> list[Optimizer]:
    flags = implementation_flags(settings)
    if settings.name != "muon":
        return [_single(settings, parameters, flags)]
    hidden = {p for block in blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad}
    matrices = [p for p in parameters if p in hidden]
    rest = [p for p in parameters if p not in hidden]
    optimizers = [_muon(settings, matrices)] if matrices else []
    return [*optimizers, *([_adamw(settings, rest, flags)] if rest else [])]


def _without_broken_kernel(settings: OptimizerSettings, parameters: Iterable[Tensor]) -> OptimizerSettings:
    """For 16-bit weights on a CPU, not PyTorch's fused SGD.

    Its vectorised part never stores the weights, and reads its 16-bit momentum as float32, beyond the buffer's end
    (FusedSGDKernel.cpp, `sgd_math`, in PyTorch 2.11 to 2.13).
    """
    broken = any(p.dtype.itemsize == 2 and p.device.type == "cpu" and not acts_as_cuda(p) for p in parameters)
    if settings.name != "sgd" or not broken or settings.implementation not in ("auto", "fused"):
        return settings
    if settings.implementation == "fused":
        raise ConfigError(
            "optimizer",
            ["implementation = 'fused': PyTorch's fused sgd does not update 16-bit weights on a CPU"],
            "set optimizer.implementation=auto, or precision.bf16_update=stochastic",
        )
    return settings.model_copy(update={"implementation": "foreach"})


def _states(optimizer: Optimizer) -> Iterable[tuple[nn.Parameter, dict[str, Tensor]]]:
    """PyTorch's annotations say Tensor for the keys, which are the parameters."""
    return optimizer.state.items()  # type: ignore[return-value]


def _placed(key: str, value: Tensor, parameter: Tensor, optimizer: Optimizer) -> Tensor:
    """A state tensor where and as the optimizer would have made it: like its parameter, but for the step counter."""
    if key != "step":
        dtype = optimizer.state_dtype(parameter) if isinstance(optimizer, WideUpdate) else parameter.dtype
        return value.to(parameter.device, dtype)
    return value.to(parameter.device if optimizer.defaults.get("fused") else "cpu")


def _single(settings: OptimizerSettings, parameters: list[nn.Parameter], flags: dict[str, bool]) -> Optimizer:
    lr, decay = settings.lr, settings.weight_decay
    match settings.name:
        case "gradient-descent":
            return GradientDescent(parameters, lr)
        case "sgd":
            nesterov = settings.nesterov and settings.momentum > 0
            groups = _decay_groups(parameters, decay)
            return SGD(groups, lr=lr, momentum=settings.momentum, nesterov=nesterov, **flags)
        case "adam":
            betas = (settings.beta1, settings.beta2)
            return Adam(_decay_groups(parameters, decay), lr=lr, betas=betas, eps=settings.eps, **flags)
        case "adafactor":
            return Adafactor(_decay_groups(parameters, decay), lr=lr, foreach=flags["foreach"])
        case _:
            return _adamw(settings, parameters, flags)


def _adamw(settings: OptimizerSettings, parameters: list[nn.Parameter], flags: dict[str, bool]) -> Optimizer:
    groups = _decay_groups(parameters, settings.weight_decay)
    betas = (settings.beta1, settings.beta2)
    return AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, **flags)


def _muon(settings: OptimizerSettings, matrices: list[nn.Parameter]) -> Optimizer:
    # match_rms_adamw (Liu et al. 2025, "Muon is scalable for LLM training") gives an update the size of AdamW's, so
    # that one learning rate and one decay serve both.
    return Muon(
        matrices,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        adjust_lr_fn="match_rms_adamw",
    )


def _decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def implementation_flags(settings: OptimizerSettings) -> dict[str, bool]:
    """`fused=` and `foreach=` of torch.optim for the implementation that is asked for."""
    allowed = _IMPLEMENTATIONS[settings.name]
    chosen = allowed[0] if settings.implementation == "auto" else settings.implementation
    if chosen not in allowed:
        raise ConfigError(
            "optimizer",
            [f"implementation = '{chosen}': {settings.name} has only {', '.join(allowed)}"],
            "set optimizer.implementation=auto",
        )
    return {"fused": chosen == "fused", "foreach": chosen == "foreach"}
