"""The trainer's own step, run in earnest."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bptool.analysis.question import Question
from bptool.hardware import resolve_device
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer, Instrument
from bptool.training.loop import BatchSource
from bptool.training.seeds import seed_step
from bptool.training.step import StepOutcome
from bptool.training.workload import Batch


class RealStep:
    """The step of a question, on the question's device.

    Args:
        instruments: who is told of its phases, the first one outermost.
        source: of the micro-batches; None: the workload makes them as they are needed, from `generator`.

    Attributes:
        step: the training step; who else is to be told is appended to its announcer.
        generator: of the batches.
        micro_batches: of each step.

    Raises:
        DeviceError: the device, or the compiler that `training.compile` needs, cannot do this.
    """

    def __init__(self, question: Question, *instruments: Instrument, source: BatchSource | None = None) -> None:
        self._config = question.config
        self.device = resolve_device(question.machine.device)
        self.step = build_step(question.config, question.workload, self.device, Announcer(instruments))
        self.generator = torch.Generator(self.device)
        self.micro_batches = question.config.training.gradient_accumulation_steps
        self._source = source
        self._done = 0

    def run(self) -> StepOutcome:
        """The next step; past the run's last one, that one's learning rate again."""
        number = min(self._done, self._config.training.steps - 1)
        seed_step(self._config.run.seed, self._done)
        with self.step.announcer.phase("step"):
            with self.step.announcer.phase("data"):
                micro_batches = self._next_batches()
            outcome = self.step(number, micro_batches)
        self._done += 1
        return outcome

    def _next_batches(self) -> Sequence[Batch]:
        if self._source:
            return self._source.micro_batches(self._done)
        return [self.step.workload.batch(self.generator) for _ in range(self.micro_batches)]
