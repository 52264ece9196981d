"""The model at hand, for checks of a whole training step: in float64 or as it is trained, always from one seed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # no public name tells a fake tensor from a real one
from torch.utils._pytree import tree_map  # what torch itself nests tensors with

from bptool.analysis.activation_budget.planning import settled
from bptool.analysis.machine import THIS_CPU
from bptool.config.overrides import override
from bptool.config.schema import Config, OptimizerSettings, PrecisionSettings
from bptool.training.assembly import build_model, build_step, default_dtype
from bptool.training.instrument import Announcer, Instrument
from bptool.training.optimizers import build_optimizers
from bptool.training.precision import Precision
from bptool.training.seeds import derive_seed
from bptool.training.step import TrainStep
from bptool.training.workload import Batch, Workload, transformer_workload


@dataclass(frozen=True)
class ModelAtHand:
    """A model, its batches and its step.

    Attributes:
        config: of the run; the built-in transformer's sizes are what float64 can afford.
        built_in: whether it is the built-in transformer, whose parts are known.
        seed: weights, batches and dropout are functions of it.
    """

    config: Config
    workload: Workload
    built_in: bool
    seed: int
    device: torch.device

    def changed(self, changes: Mapping[str, object]) -> ModelAtHand:
        """The same under other settings; a model that they do not change is not drawn again."""
        config = override(self.config, changes)
        if not self.built_in:
            return replace(self, config=config)
        workload = transformer_workload(config)
        same = config.model == self.config.model
        workload = replace(workload, model=self.workload.model) if same else drawn_once(workload)
        return replace(self, config=config, workload=workload)

    @property
    def few_tokens(self) -> int:
        """A sequence length for what does not depend on it."""
        return max(self.config.training.sequence_length // 4, 1)

    def batches(self, count: int, dtype: torch.dtype | None) -> list[Batch]:
        """Micro-batches, with floating point in `dtype`, or as the workload makes them."""
        found = []
        for number in range(count):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "gradcheck", "batch", number))
            with default_dtype(torch.float32):  # random numbers of another dtype are others
                batch = self.workload.batch(generator)
            found.append(placed(batch, self.device, dtype))
        return found

    def exact_model(self) -> nn.Module:
        """The model in float64."""
        self.seed_all("weights")
        return build_model(self.workload, self.device, torch.float64).to(torch.float64)

    def exact_step(self, *instruments: Instrument) -> TrainStep:
        """The trainer's step on a float64 model, with plain gradient descent."""
        model, settings = self.exact_model(), OptimizerSettings(name="gradient-descent", lr=self.config.optimizer.lr)
        return TrainStep(
            model=model,
            workload=self.workload,
            optimizers=build_optimizers(model, [], settings),
            precision=Precision(PrecisionSettings(), self.device),
            learning_rate=lambda step: settings.lr,
            clip_norm=self.config.training.clip_norm,
            announcer=Announcer(instruments),
        )

    def trained_step(self, *instruments: Instrument) -> TrainStep:
        """The trainer's step as it is, in the config's precision."""
        config, workload, _ = settled(self.config, self.workload, THIS_CPU)
        self.seed_all("weights")
        return build_step(config, workload, self.device, Announcer(instruments))

    def seed_all(self, purpose: str) -> None:
        """Make what PyTorch's global generators draw next a function of the seed and its purpose."""
        torch.manual_seed(derive_seed(self.seed, "gradcheck", purpose))


def drawn_once(workload: Workload) -> Workload:
    """The same workload, whose weights are drawn once for each dtype and copied after.

    A dozen steps begin from the same weights, and drawing them takes about as long as a forward.
    """
    drawn: dict[torch.dtype, nn.Module] = {}

    def model() -> nn.Module:
        here = torch.empty(0)
        if isinstance(here, FakeTensor) or here.is_meta:  # as a plan's prediction has it: these have no weights
            return workload.model()
        if here.dtype not in drawn:
            drawn[here.dtype] = workload.model()
        return copy.deepcopy(drawn[here.dtype])

    return replace(workload, model=model)


def placed(batch: Batch, device: torch.device, dtype: torch.dtype | None) -> Batch:
    """The batch on a device, its floating point in `dtype` (None: as it is)."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else None)

    return tree_map(moved, batch)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """A copy of each trained parameter's gradient."""
    named = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: None if gradient is None else gradient.clone() for name, gradient in named.items()}
