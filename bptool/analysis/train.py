"""Does it learn? One sitting of one run: the step, the instruments around it, and the record at the end."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch

from bptool import __version__
from bptool.analysis.activation_budget.kept_plan import settled_once
from bptool.analysis.activation_budget.operation_costs import Estimated, Measured
from bptool.analysis.machine import machine_named
from bptool.analysis.memory.fit import PeakPrediction, check_fit, check_state_fits, memory_errors
from bptool.analysis.memory.simulation import WITHOUT_COMPILER
from bptool.analysis.question import Question
from bptool.analysis.result import Result
from bptool.config.schema import Config
from bptool.errors import BptoolError, ResumeError
from bptool.hardware import peak_rate, resolve_device, tune_cpu_allocator
from bptool.instruments.first_nonfinite import FirstNonFinite
from bptool.instruments.gradient_histograms import GradientHistograms
from bptool.instruments.memory.peak import PeakMemory
from bptool.instruments.phase_timer import PhaseTimer
from bptool.instruments.speed import SpeedGauge
from bptool.training.assembly import build_step, capture, restore
from bptool.training.checkpoint import CheckpointFolder
from bptool.training.evaluation import evaluate
from bptool.training.instrument import Announcer
from bptool.training.interruption import StopRequest
from bptool.training.loop import Listener, LoopHooks, LoopOutcome, TrainingLoop
from bptool.training.material import Material, open_material
from bptool.training.opening import OpenedRun
from bptool.training.run_folder import RESULT, resume_command
from bptool.training.seeds import seed_step
from bptool.training.step import StepOutcome, TrainStep
from bptool.training.user_code import describe
from bptool.training.workload import Batch, Workload, transformer_workload
from bptool.units import gib


class TrainPlan(Result):
    """What is known of a run before this sitting's first step.

    Attributes:
        workload: the user's own model, as the TARGET named it; None for the built-in transformer.
        data: what it learns from, in words.
        unit: what losses are per and throughput counts, such as tokens.
        first_step: optimizer steps that were done before this sitting.
        predicted_peak_bytes: of a steady step; None where it could not be predicted.
    """

    command: ClassVar[str] = "train"

    run: str
    workload: str | None
    device: str
    data: str
    unit: str
    parameters_count: int
    first_step: int
    total_steps: int
    predicted_peak_bytes: int | None


class TrainResult(TrainPlan):
    """What a run came to.

    Attributes:
        status: `finished`, or `interrupted` (by Ctrl-C or SIGTERM; the run can be resumed).
        steps: optimizer steps done, those of earlier sittings included.
        train_loss, val_loss: of the last step and the last evaluation, nats per token for the built-in workload; NaN
            (null in JSON) where this sitting had none.
        unigram_entropy: the loss of a model that knows only how often each token occurs; None without a corpus.
        duration_s: of this sitting's loop.
        tokens_per_s: of whatever `unit` is; the median over this sitting's steps, without evaluation and checkpoints.
        mfu: model FLOPs per second (6N + 12 L H Q T per token) over `peak_flops_per_s`; None where either is unknown.
        backward_over_forward: median over the steps, in time, recomputation left out unless it is compiled into it.
        measured_peak_bytes: of a steady step; None where the sitting was too short to have one.
        sample: the last text that the model wrote; None where it wrote none.
        checkpoint: the last one's folder; None where this sitting wrote none.
    """

    status: str
    steps: int
    train_loss: float
    val_loss: float
    unigram_entropy: float | None
    duration_s: float
    step_median_s: float
    tokens_per_s: float
    mfu: float | None
    peak_flops_per_s: float | None
    peak_flops_source: str
    backward_over_forward: float
    measured_peak_bytes: int | None
    sample: str | None
    checkpoint: str | None


class Trainer:
    """One sitting of an opened run, ready to train.

    Building it reads the data, predicts the memory, builds the model, and takes over the newest checkpoint.

    Attributes:
        first_step: optimizer steps that are done already.

    Raises:
        BptoolError: whatever makes the run impossible.
    """

    def __init__(self, opened: OpenedRun, note: Callable[[str], None]) -> None:
        config = opened.config
        self.config: Config = config
        self._opened = opened
        self._note = note
        # What fake tensors refuse is told in a line; PyTorch would also log a traceback.
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
        self._device = resolve_device(config.training.device)
        if self._device.type == "cpu":
            tune_cpu_allocator()
        self._machine = machine_named(self._device.type, None)
        if opened.code is None:  # reading the data may take minutes
            check_state_fits(self._question(transformer_workload(config)))
        self._material: Material = open_material(
            config, self._device, code=opened.code, tokenizer_file=opened.folder.tokenizer
        )
        self._settle_budget()
        self._prediction = self._predict()
        self._timer = PhaseTimer(self._device)
        self._announcer = Announcer([self._timer])
        self._checkpoints = CheckpointFolder(opened.folder.checkpoints, keep=config.checkpoint.keep, warn=note)
        with self._memory_errors():
            self._step: TrainStep = build_step(self.config, self._material.workload, self._device, self._announcer)
            self.first_step = self._take_over() if opened.resumed else 0
        opened.keep_config()
        self._watch_memory()
        rate = peak_rate(self._device, config.precision.mode)
        self._speed = SpeedGauge(self._timer, rate, self._material.flops_per_unit)

    @property
    def plan(self) -> TrainPlan:
        """What is known by now."""
        return TrainPlan(
            run=str(self._opened.folder.path),
            workload=self.config.run.workload or None,
            device=str(self._device),
            data=self._material.description,
            unit=self._material.workload.unit,
            parameters_count=sum(p.numel() for p in self._step.model.parameters()),
            first_step=self.first_step,
            total_steps=self.config.training.steps,
            predicted_peak_bytes=self._prediction.peak_bytes if self._prediction else None,
        )

    def write_gradient_histograms(self, write: Callable[[str, torch.Tensor, int], None]) -> None:
        """Have gradients handed to `write(name, gradient, step)` as often as the config asks for them."""
        every = self.config.logging.gradient_histograms_every
        if every:
            histograms = GradientHistograms(self._step.model, every=every, first_step=self.first_step, write=write)
            self._announcer.instruments.append(histograms)

    def train(self, listeners: Sequence[Listener]) -> TrainResult:
        """Run the loop to its end, or to Ctrl-C, and write result.json.

        Raises:
            NonFiniteError: stopped before a bad update.
            OutOfMemory: with the prediction and the overrides that would fit.
        """
        hooks = LoopHooks(
            evaluate=self._evaluate,
            sample=self._material.sampler(self._step.model),
            save=self._save,
            gauge=self._gauge,
            locate_nonfinite=self._locate_nonfinite,
        )
        loop = TrainingLoop(self.config, self._step, self._material.source, hooks, listeners)
        start = time.perf_counter()
        with StopRequest() as stop, self._memory_errors():
            outcome = loop.run(self.first_step, stop)
        result = self._result(outcome, time.perf_counter() - start)
        self._opened.folder.write(RESULT, result.document())
        return result

    def _question(self, workload: Workload) -> Question:
        return Question(self.config.run.name, (), self.config, workload, self._machine, self._opened.code)

    def _settle_budget(self) -> None:
        """From here on the config has a plan where it had a budget for activations."""
        costs = Measured(self._device, Estimated(self._machine.gpu, self.config.precision.mode))
        folder, resumed = self._opened.folder, self._opened.resumed
        self.config, workload, planned = settled_once(
            folder, self.config, self._material.workload, self._machine, costs, resumed=resumed
        )
        self._material = replace(self._material, workload=workload)
        if planned:
            self._note(planned.sentence)

    def _predict(self) -> PeakPrediction | None:
        if self.config.training.compile:
            self._note(WITHOUT_COMPILER)
        try:
            return check_fit(self._question(self._material.workload))
        except BptoolError:
            raise
        except Exception as error:  # a user's model may do what fake tensors cannot; the run itself may still work
            self._note(f"memory is not predicted, as this model does not run on fake tensors: {describe(error)}")
            return None

    def _memory_errors(self) -> AbstractContextManager[None]:
        return memory_errors(self._question(self._material.workload), self._prediction)

    def _take_over(self) -> int:
        """Restore the newest checkpoint; returns its step, or 0 where the run was killed before its first one."""
        if not self._checkpoints.finished():
            self._note("no checkpoint was written yet: the run begins again at step 0")
            return 0
        checkpoint = self._checkpoints.require_newest()
        same_data = checkpoint.state["data_fingerprint"] == self._material.fingerprint
        if not (same_data or self._opened.data_may_change):
            raise ResumeError(
                "the data is not what this run was trained on so far",
                f"restore it, or name it on the command line: data.source={self.config.data.source}",
            )
        steps = self.config.training.steps
        if checkpoint.step > steps or (checkpoint.step == steps and self._has_result(steps)):
            command = resume_command(self._opened.folder.path, self.config.run.workload)
            raise ResumeError(
                f"the run has done all its {checkpoint.step} steps",
                f"ask for more: {command} training.steps={2 * checkpoint.step}",
            )
        restore(self._step, checkpoint)
        return checkpoint.step

    def _has_result(self, steps: int) -> bool:
        """Whether result.json is that of all the steps; else the run was killed on its way from the last one to it."""
        file = self._opened.folder.path / RESULT
        result = json.loads(file.read_text())["result"] if file.exists() else {}
        return (result.get("status"), result.get("steps")) == ("finished", steps)

    def _watch_memory(self) -> None:
        """Measure the second step of this sitting, the first that begins as all later ones do; or the only one."""
        steps = self.config.training.steps - self.first_step
        peak = self._peak = PeakMemory(self._device, self._step.persistent_tensors, measured_step=min(1, steps - 1))
        self._announcer.instruments.insert(0, peak)  # outermost, so that its own work is not timed

    def _evaluate(self) -> float:
        step = self._step
        return evaluate(step.model, step.workload, step.precision, self._material.held_out)

    def _save(self, steps_done: int) -> Path:
        notes = {
            "data_fingerprint": self._material.fingerprint,
            "bptool_version": __version__,
            "torch_version": torch.__version__,
        }
        return self._checkpoints.save(capture(self._step, steps_done, notes))

    def _gauge(self, outcome: StepOutcome) -> dict[str, float]:
        scalars = self._speed.read(outcome.weight)
        if self._peak.peak_bytes is not None:
            scalars["memory/peak_allocated_gib"] = gib(self._peak.peak_bytes)
        return scalars

    def _locate_nonfinite(self, step: int, micro_batches: Sequence[Batch]) -> str:
        """Run the step's forward and backward again, with the same random numbers, and watch every module."""
        watcher = FirstNonFinite(self._step.model)
        weights = [self._step.workload.weight(batch) for batch in micro_batches]
        seed_step(self.config.run.seed, step)
        with watcher.watch():
            self._step.accumulate(micro_batches, weights)
        self._step.optimizers.zero_grad()
        return watcher.finding or "nothing, when the step was run again"

    def _result(self, outcome: LoopOutcome, duration_s: float) -> TrainResult:
        speed, material = self._speed, self._material
        rate = _median(speed.units_per_s)
        return TrainResult(
            **self.plan.model_dump(),
            status="interrupted" if outcome.interrupted_by else "finished",
            steps=outcome.steps_done,
            train_loss=outcome.train_loss,
            val_loss=outcome.val_loss,
            unigram_entropy=material.unigram_entropy,
            duration_s=duration_s,
            step_median_s=_median(speed.step_s),
            tokens_per_s=rate,
            mfu=speed.mfu(rate),
            peak_flops_per_s=speed.peak.flops_per_s,
            peak_flops_source=speed.peak.source,
            backward_over_forward=_median(speed.backward_over_forward),
            measured_peak_bytes=self._peak.peak_bytes,
            sample=outcome.sample,
            checkpoint=str(outcome.checkpoint) if outcome.checkpoint else None,
        )


def _median(values: Sequence[float]) -> float:
    """NaN where a sitting ended before its first step."""
    return statistics.median(values) if values else float("nan")
