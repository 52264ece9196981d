"""The loop around the step: when to evaluate, sample, save and stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bptool.config.schema import Config
from bptool.errors import NonFiniteError
from bptool.training.interruption import StopRequest
from bptool.training.seeds import seed_step
from bptool.training.step import StepOutcome, TrainStep
from bptool.training.workload import Batch

_CURE = "a lower optimizer.lr, another precision.mode, or gradients.on_nonfinite=skip"


class Listener:
    """Told of what happens in a run; this one does nothing with it."""

    def started(self, *, first_step: int, total_steps: int) -> None:
        """`first_step` optimizer steps are done already."""

    def step_done(self, step: int, scalars: Mapping[str, float]) -> None:
        """Step `step`, counted from 1, is done; `scalars` are its TensorBoard tags, `val/loss` where evaluated."""

    def sampled(self, step: int, text: str) -> None:
        """The model wrote `text`, which begins with the prompt."""

    def saved(self, step: int, folder: Path) -> None:
        """A checkpoint is on the disk."""

    def noted(self, message: str) -> None:
        """Something that the user should know and that stops nothing."""

    def close(self) -> None:
        """The run is over, however it ended."""


class BatchSource(Protocol):
    """Where the micro-batches of step n come from: a function of n alone."""

    def micro_batches(self, step: int) -> Sequence[Batch]:
        """The micro-batches of step `step`, counted from 0."""
        ...


@dataclass(frozen=True)
class LoopHooks:
    """What the loop calls at its intervals.

    Attributes:
        evaluate: the held-out loss.
        sample: text for step n; None where the model writes none.
        save: writes a checkpoint of step n and says where.
        gauge: further scalars of a step (speed, memory), asked for once after each step.
        locate_nonfinite: where a NaN came from, given the step and its micro-batches.
    """

    evaluate: Callable[[], float]
    sample: Callable[[int], str] | None
    save: Callable[[int], Path]
    gauge: Callable[[StepOutcome], Mapping[str, float]]
    locate_nonfinite: Callable[[int, Sequence[Batch]], str]


@dataclass(frozen=True)
class LoopOutcome:
    """How a run ended.

    Attributes:
        steps_done: optimizer steps of the run, earlier sittings included.
        interrupted_by: name of the signal that ended it early, or empty.
        train_loss: of the last step; NaN where no step was run.
        val_loss: of the last evaluation; NaN where there was none.
        sample: the last text; None where there was none.
        checkpoint: the last one's folder; None where none was written.
    """

    steps_done: int
    interrupted_by: str
    train_loss: float
    val_loss: float
    sample: str | None
    checkpoint: Path | None


class TrainingLoop:
    """Repeats the step until the run is done, stopped, or no longer finite."""

    def __init__(
        self,
        config: Config,
        step: TrainStep,
        source: BatchSource,
        hooks: LoopHooks,
        listeners: Sequence[Listener],
    ) -> None:
        self._config = config
        self._step = step
        self._source = source
        self._hooks = hooks
        self._listeners = listeners
        self._train_loss = self._val_loss = math.nan
        self._sample: str | None = None
        self._checkpoint: Path | None = None
        self._saved_step = -1

    def run(self, first_step: int, stop: StopRequest) -> LoopOutcome:
        """Continue after `first_step` steps that are done already.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite and `gradients.on_nonfinite` is `stop`; the weights
                are those before that step, and saved.
            StorageError: a checkpoint could not be written.
        """
        total = self._config.training.steps
        self._tell(lambda listener: listener.started(first_step=first_step, total_steps=total))
        done = self._saved_step = first_step
        if first_step == total:  # it was killed between its last checkpoint and its result
            self._val_loss = self._hooks.evaluate()
            self._write_sample(done)
        while done < total and not stop.reason:
            self._one_step(done)
            done += 1
        self._save(done)
        stopped_by = stop.reason if done < total else ""
        return LoopOutcome(done, stopped_by, self._train_loss, self._val_loss, self._sample, self._checkpoint)

    def _one_step(self, done: int) -> None:
        """Step number `done`, counted from 0, and what is due after it."""
        seed_step(self._config.run.seed, done)
        announce = self._step.announcer.phase
        with announce("step"):
            with announce("data"):
                micro_batches = self._source.micro_batches(done)
            outcome = self._step(done, micro_batches)
        if not outcome.finite:
            self._on_nonfinite(done, outcome, micro_batches)
        self._train_loss = outcome.loss
        scalars = {"train/loss": outcome.loss, "train/lr": outcome.lr, "train/grad_norm": outcome.grad_norm}
        self._after_step(done + 1, {**scalars, **self._hooks.gauge(outcome)})

    def _after_step(self, done: int, scalars: dict[str, float]) -> None:
        settings = self._config
        evaluated = self._due(done, settings.evaluation.every)
        if evaluated:
            scalars["val/loss"] = self._val_loss = self._hooks.evaluate()
        if evaluated or self._due(done, settings.logging.every):
            self._tell(lambda listener: listener.step_done(done, scalars))
        if evaluated and not math.isfinite(self._val_loss) and settings.gradients.on_nonfinite == "stop":
            raise NonFiniteError(
                f"after step {done}: the held-out loss is {self._val_loss}; these weights are not saved",
                f"resume from the last checkpoint, or run again, with {_CURE}",
            )
        if self._due(done, settings.evaluation.sample_every):
            self._write_sample(done)
        if self._due(done, settings.checkpoint.every):
            self._save(done)

    def _write_sample(self, done: int) -> None:
        """Weights that make no sense write no text; whether that ends the run is decided by its next step."""
        if self._hooks.sample is None:
            return
        try:
            text = self._sample = self._hooks.sample(done)
        except NonFiniteError as error:
            message = f"no sample at step {done}: {error.message}"
            self._tell(lambda listener: listener.noted(message))
        else:
            self._tell(lambda listener: listener.sampled(done, text))

    def _due(self, done: int, every: int) -> bool:
        """At each `every`-th step, and always after the last."""
        return done == self._config.training.steps or (every > 0 and done % every == 0)

    def _save(self, done: int) -> None:
        """Write a checkpoint of step `done`, unless the last one is."""
        if done == self._saved_step:
            return
        folder = self._checkpoint = self._hooks.save(done)
        self._saved_step = done
        self._tell(lambda listener: listener.saved(done, folder))

    def _on_nonfinite(self, done: int, outcome: StepOutcome, micro_batches: Sequence[Batch]) -> None:
        """Stop before the update with the culprit's name, or say that the update is skipped."""
        what = "loss" if not math.isfinite(outcome.loss) else "gradient"
        value = outcome.loss if what == "loss" else outcome.grad_norm
        message = f"step {done + 1}: the {what} is {value}"
        if self._config.gradients.on_nonfinite == "skip":
            self._tell(lambda listener: listener.noted(f"{message}; its update is skipped"))
            return
        self._save(done)
        culprit = self._hooks.locate_nonfinite(done, micro_batches)
        raise NonFiniteError(
            f"{message}; first non-finite: {culprit}. The update was not applied",
            f"resume with {_CURE};\n{self._kept(done)}" if done else f"run again with {_CURE}",
        )

    def _kept(self, done: int) -> str:
        """What a resume would begin with, and how to begin further back where those weights are the cause."""
        where = f", in {self._checkpoint}; delete that folder to resume from an earlier one" if self._checkpoint else ""
        return f"the weights after step {done} are saved{where}"

    def _tell(self, event: Callable[[Listener], None]) -> None:
        for listener in self._listeners:
            event(listener)
