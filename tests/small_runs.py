"""Small configs, models and steps that several tests share: everything here takes milliseconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from bptool.analysis.machine import THIS_CPU
from bptool.analysis.question import Question
from bptool.config.loading import parse_config
from bptool.config.schema import Config
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer, Instrument, Phase
from bptool.training.step import StepOutcome, TrainStep
from bptool.training.workload import Batch, Workload, transformer_workload

CPU = torch.device("cpu")
_SMALL = {
    "model.n_layers": 2,
    "model.d_model": 16,
    "model.n_heads": 2,
    "model.d_ff": 32,
    "model.vocab_size": 32,
    "model.context_length": 16,
    "training.micro_batch_size": 2,
    "training.device": "cpu",
}


def small_config(changes: Mapping[str, object] | None = None) -> Config:
    """A transformer of two blocks and 16 tokens, with `changes` on top."""
    return parse_config({**_SMALL, **(changes or {})}, "a test")


def question_of(config: Config, workload: Workload | None = None) -> Question:
    """About the step of a workload, or of the built-in transformer, on this CPU."""
    return Question("", (), config, workload or transformer_workload(config), THIS_CPU)


def transformer_step(config: Config, *instruments: Instrument) -> TrainStep:
    """The trainer's own step of the built-in transformer."""
    return build_step(config, transformer_workload(config), CPU, Announcer(instruments))


def random_batches(step: TrainStep, seed: int, count: int = 1) -> list[Batch]:
    """Micro-batches of the step's workload."""
    generator = torch.Generator().manual_seed(seed)
    return [step.workload.batch(generator) for _ in range(count)]


def run_steps(step: TrainStep, count: int, micro_batches: int = 1) -> list[StepOutcome]:
    """Steps 0 to `count` - 1, announced as the loop does."""
    outcomes = []
    for number in range(count):
        with step.announcer.phase("step"):
            with step.announcer.phase("data"):
                batches = random_batches(step, number, micro_batches)
            outcomes.append(step(number, batches))
        del batches  # not in the middle of the next step
    return outcomes


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the tensors are now, whatever becomes of them."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same names, and the same values to the bit (NaN equals itself)."""
    if left.keys() != right.keys():
        return False
    return all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(_bytes(left[name]), _bytes(right[name]))
        for name in left
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class Recorder(Instrument):
    """Writes down `+phase` where one begins and `-phase` where it ends."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        return self._record(name)

    @contextmanager
    def _record(self, name: Phase) -> Iterator[None]:
        self.events.append(f"+{name}")
        try:
            yield
        finally:
            self.events.append(f"-{name}")


class AtOptimizer(Instrument):
    """Keeps a copy of the gradients that the optimizer is about to use."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.model: nn.Module | None = None

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        return self._look(name)

    @contextmanager
    def _look(self, name: Phase) -> Iterator[None]:
        if name == "optimizer" and self.model is not None:
            self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        yield


class Perceptron(nn.Module):
    """Two layers and a tanh: 3 numbers to 2."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5, dtype=dtype)
        self.second = nn.Linear(5, 2, dtype=dtype)

    def forward(self, x_N3: Tensor) -> Tensor:
        y_N2: Tensor = self.second(torch.tanh(self.first(x_N3)))
        return y_N2


def masked_regression(dtype: torch.dtype = torch.float32) -> Workload:
    """Squared error over the rows whose `valid` is true, which are what it counts."""

    def batch(generator: torch.Generator) -> Batch:
        x_N3 = torch.randn(6, 3, generator=generator, dtype=dtype)
        valid_N = torch.rand(6, generator=generator) < 0.6
        valid_N[0] = True
        return {"x": x_N3, "y": torch.randn(6, 2, generator=generator, dtype=dtype), "valid": valid_N}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        error_N2 = model(batch["x"]) - batch["y"]
        result: Tensor = (error_N2.square().mean(1) * batch["valid"]).sum() / batch["valid"].sum()
        return result

    return Workload(
        model=lambda: Perceptron(dtype),
        batch=batch,
        loss=loss,
        weight=lambda batch: int(batch["valid"].sum()),
        blocks=lambda model: [],
        unit="rows",
    )


def joined(batches: Sequence[Batch]) -> Batch:
    """The micro-batches as one batch."""
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
