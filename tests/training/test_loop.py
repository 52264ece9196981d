from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Recorder, small_config

from bptool.errors import NonFiniteError
from bptool.training.instrument import Announcer
from bptool.training.interruption import StopRequest
from bptool.training.loop import Listener, LoopHooks, LoopOutcome, TrainingLoop
from bptool.training.step import StepOutcome

QUIET = {
    "evaluation.every": 0,
    "evaluation.sample_every": 0,
    "checkpoint.every": 0,
    "logging.every": 1,
}


class FakeStep:
    """A step whose loss is its number, and whose outcome may be bad."""

    def __init__(self, bad: Mapping[int, StepOutcome]) -> None:
        self.bad = bad
        self.recorder = Recorder()
        self.announcer = Announcer([self.recorder])
        self.drawn: dict[int, float] = {}
        self.batches: dict[int, object] = {}

    def __call__(self, step: int, micro_batches: Sequence[Any]) -> StepOutcome:
        self.drawn[step] = float(torch.rand(()))
        self.batches[step] = micro_batches
        return self.bad.get(step, outcome(loss=float(step)))


def outcome(loss: float = 1.0, grad_norm: float = 2.0, *, finite: bool = True, applied: bool = True) -> StepOutcome:
    return StepOutcome(loss, grad_norm, 0.5, 64, applied, finite)


class Source:
    def micro_batches(self, step: int) -> list[str]:
        return [f"batch {step}"]


class Log(Listener):
    """Every event, in words."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.scalars: dict[int, dict[str, float]] = {}

    def started(self, *, first_step: int, total_steps: int) -> None:
        self.log.append(f"started {first_step}/{total_steps}")

    def step_done(self, step: int, scalars: Mapping[str, float]) -> None:
        assert step not in self.scalars, "a step is told once"
        self.scalars[step] = dict(scalars)
        self.log.append(f"step {step}" + (" evaluated" if "val/loss" in scalars else ""))

    def sampled(self, step: int, text: str) -> None:
        self.log.append(f"sampled {step}: {text}")

    def saved(self, step: int, folder: Path) -> None:
        self.log.append(f"saved {step}: {folder}")

    def noted(self, message: str) -> None:
        self.log.append(f"noted {message}")


class Run:
    """A loop whose every part is a fake."""

    def __init__(self, changes: Mapping[str, object], *, stop_after: int = 10**9, **bad: StepOutcome) -> None:
        self.log: list[str] = []
        self.listener = Log(self.log)
        self.stop = StopRequest()
        self.step = FakeStep({int(name.removeprefix("step")): value for name, value in bad.items()})
        self.gauged = 0
        self.evaluations: Iterator[float] = iter([100.0, 101.0, 102.0])

        def gauge(outcome: StepOutcome) -> dict[str, float]:
            self.gauged += 1
            if self.gauged == stop_after:
                self.stop.reason = "SIGTERM"
            return {"perf/tokens_per_s": 7.0}

        def evaluate() -> float:
            self.log.append("evaluate")
            return next(self.evaluations)

        def locate(step: int, micro_batches: Sequence[Any]) -> str:
            self.log.append(f"locate {step} {micro_batches}")
            return "the output of head (Linear)"

        hooks = LoopHooks(evaluate, lambda step: f"text {step}", lambda step: Path(f"c{step}"), gauge, locate)
        config = small_config({**QUIET, **changes})
        self.loop = TrainingLoop(config, self.step, Source(), hooks, [self.listener])  # type: ignore[arg-type]

    def run(self, first_step: int = 0) -> LoopOutcome:
        return self.loop.run(first_step, self.stop)


def only(log: list[str], *kinds: str) -> list[str]:
    return [event for event in log if event.startswith(kinds)]


class TestIntervals:
    def test_everything_at_its_steps_and_after_the_last(self) -> None:
        run = Run({"training.steps": 7, "evaluation.every": 3, "evaluation.sample_every": 2, "checkpoint.every": 5})
        result = run.run()
        assert only(run.log, "evaluate") == ["evaluate"] * 3
        assert [step for step, scalars in run.listener.scalars.items() if "val/loss" in scalars] == [3, 6, 7]
        assert only(run.log, "sampled") == [f"sampled {s}: text {s}" for s in (2, 4, 6, 7)]
        assert only(run.log, "saved") == ["saved 5: c5", "saved 7: c7"]
        assert only(run.log, "started") == ["started 0/7"]
        assert result == LoopOutcome(7, "", 6.0, 102.0, "text 7", Path("c7"))

    def test_nothing_but_the_end_where_all_intervals_are_0(self) -> None:
        run = Run({"training.steps": 4})
        run.run()
        assert run.log == [
            "started 0/4",
            "step 1",
            "step 2",
            "step 3",
            "evaluate",
            "step 4 evaluated",
            "sampled 4: text 4",
            "saved 4: c4",
        ]

    def test_a_resumed_run_keeps_the_same_steps(self) -> None:
        changes = {"training.steps": 9, "evaluation.every": 4, "checkpoint.every": 3}
        run = Run(changes)
        run.run(first_step=5)
        assert only(run.log, "started", "step", "saved") == [
            "started 5/9",
            "step 6",
            "saved 6: c6",
            "step 7",
            "step 8 evaluated",
            "step 9 evaluated",
            "saved 9: c9",
        ]

    def test_logging_every_few_steps_and_wherever_there_is_an_evaluation(self) -> None:
        run = Run({"training.steps": 8, "logging.every": 3, "evaluation.every": 4})
        run.run()
        assert list(run.listener.scalars) == [3, 4, 6, 8]

    def test_the_scalars_of_a_step(self) -> None:
        run = Run({"training.steps": 2})
        run.run()
        first = {"train/loss": 0.0, "train/lr": 0.5, "train/grad_norm": 2.0, "perf/tokens_per_s": 7.0}
        assert run.listener.scalars[1] == first
        assert run.listener.scalars[2] == {**first, "train/loss": 1.0, "val/loss": 100.0}

    def test_no_sampler_no_samples(self) -> None:
        run = Run({"training.steps": 2, "evaluation.sample_every": 1})
        hooks = run.loop._hooks
        object.__setattr__(hooks, "sample", None)
        assert run.run().sample is None
        assert only(run.log, "sampled") == []


class TestStep:
    def test_each_gets_its_own_batches_and_random_numbers(self) -> None:
        run = Run({"training.steps": 4})
        run.run()
        again = Run({"training.steps": 4})
        again.run(first_step=2)
        assert again.step.batches == {2: ["batch 2"], 3: ["batch 3"]}
        assert again.step.drawn == {step: run.step.drawn[step] for step in (2, 3)}
        assert len(set(run.step.drawn.values())) == 4

    def test_data_is_a_phase_inside_the_step(self) -> None:
        run = Run({"training.steps": 1})
        run.run()
        assert run.step.recorder.events == ["+step", "+data", "-data", "-step"]


class TestStop:
    def test_the_step_is_finished_and_saved(self) -> None:
        run = Run({"training.steps": 9}, stop_after=3)
        result = run.run()
        assert only(run.log, "step", "saved") == ["step 1", "step 2", "step 3", "saved 3: c3"]
        assert (result.steps_done, result.interrupted_by, result.checkpoint) == (3, "SIGTERM", Path("c3"))
        assert math.isnan(result.val_loss)

    def test_it_is_not_saved_twice(self) -> None:
        run = Run({"training.steps": 9, "checkpoint.every": 3}, stop_after=3)
        run.run()
        assert only(run.log, "saved") == ["saved 3: c3"]

    def test_before_the_first_step_there_is_nothing_to_save(self) -> None:
        run = Run({"training.steps": 9})
        run.stop.reason = "SIGINT"
        result = run.run(first_step=4)
        assert run.log == ["started 4/9"]
        assert (result.steps_done, result.checkpoint) == (4, None)
        assert math.isnan(result.train_loss)

    def test_a_signal_in_the_last_step_interrupts_nothing(self) -> None:
        run = Run({"training.steps": 3}, stop_after=3)
        result = run.run()
        assert (result.steps_done, result.interrupted_by, result.val_loss) == (3, "", 100.0)


class TestNonFinite:
    NAN = outcome(math.nan, finite=False, applied=False)
    INF = outcome(1.0, math.inf, finite=False, applied=False)

    @pytest.mark.parametrize(("bad", "words"), [(NAN, "the loss is nan"), (INF, "the gradient is inf")])
    def test_stop_saves_the_good_weights_and_names_step_and_module(self, bad: StepOutcome, words: str) -> None:
        run = Run({"training.steps": 9}, step3=bad)
        with pytest.raises(NonFiniteError) as caught:
            run.run()
        assert caught.value.message == (
            f"step 4: {words}; first non-finite: the output of head (Linear). The update was not applied"
        )
        assert "after step 3 are saved" in caught.value.remedy
        assert run.log == [
            "started 0/9",
            "step 1",
            "step 2",
            "step 3",
            "saved 3: c3",
            "locate 3 ['batch 3']",
        ]

    def test_in_the_first_step_nothing_is_saved(self) -> None:
        run = Run({"training.steps": 9}, step0=self.NAN)
        with pytest.raises(NonFiniteError) as caught:
            run.run()
        assert only(run.log, "saved") == []
        assert caught.value.remedy.startswith("run again with")

    def test_skip_says_so_and_goes_on(self) -> None:
        run = Run({"training.steps": 5, "gradients.on_nonfinite": "skip"}, step2=self.NAN)
        result = run.run()
        assert only(run.log, "noted") == ["noted step 3: the loss is nan; its update is skipped"]
        assert only(run.log, "locate") == []
        assert list(run.listener.scalars) == [1, 2, 3, 4, 5]
        assert math.isnan(run.listener.scalars[3]["train/loss"])
        assert result.steps_done == 5

    def test_an_overflow_of_the_loss_scale_alone_is_no_event(self) -> None:
        run = Run({"training.steps": 3}, step1=outcome(1.0, math.inf, finite=True, applied=False))
        run.run()
        assert only(run.log, "noted", "locate") == []
        assert list(run.listener.scalars) == [1, 2, 3]

    @pytest.mark.parametrize(("policy", "stops"), [("stop", True), ("skip", False)])
    def test_weights_whose_held_out_loss_is_not_finite_are_not_saved(self, policy: str, stops: bool) -> None:
        run = Run({"training.steps": 4, "evaluation.every": 2, "checkpoint.every": 2, "gradients.on_nonfinite": policy})
        run.evaluations = iter([math.nan, 1.0])
        if stops:
            with pytest.raises(NonFiniteError, match="after step 2: the held-out loss is nan"):
                run.run()
        else:
            assert run.run().val_loss == 1.0
        assert only(run.log, "saved") == ([] if stops else ["saved 2: c2", "saved 4: c4"])
        assert list(run.listener.scalars) == ([1, 2] if stops else [1, 2, 3, 4])

    def test_a_sample_that_cannot_be_drawn_ends_nothing(self) -> None:
        run = Run({"training.steps": 2})

        def fail(step: int) -> str:
            raise NonFiniteError("the model's logits are NaN")

        object.__setattr__(run.loop._hooks, "sample", fail)
        assert run.run().sample is None
        assert only(run.log, "noted") == ["noted no sample at step 2: the model's logits are NaN"]
