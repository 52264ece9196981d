from __future__ import annotations

from typing import Any

import pytest

from bptool.analysis.train import TrainPlan, TrainResult
from bptool.report.train.console import render, render_plan

PLAN: dict[str, Any] = {
    "run": "runs/tiny",
    "workload": None,
    "device": "cpu",
    "data": "text.txt, 1.00 MiB, as bytes",
    "unit": "tokens",
    "parameters_count": 3_277_056,
    "first_step": 0,
    "total_steps": 600,
    "predicted_peak_bytes": 5 * 2**30,
}
RESULT: dict[str, Any] = {
    **PLAN,
    "status": "finished",
    "steps": 600,
    "train_loss": 1.25,
    "val_loss": 1.5,
    "unigram_entropy": 3.0,
    "duration_s": 125.0,
    "step_median_s": 0.25,
    "tokens_per_s": 8192.0,
    "mfu": 0.625,
    "peak_flops_per_s": 1e11,
    "peak_flops_source": "this machine's measured fp32 matmul rate",
    "backward_over_forward": 1.95,
    "measured_peak_bytes": 5 * 2**30,
    "sample": "def f():\n    pass",
    "checkpoint": "runs/tiny/checkpoints/step-00000600",
}
NAN = float("nan")


def report(**changes: Any) -> str:
    return render(TrainResult(**{**RESULT, **changes}))


def row(text: str, label: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"  {label} ")]
    return line.removeprefix(f"  {label}").strip()


def test_the_whole_of_it() -> None:
    assert report() == (
        "finished at step 600 of 600 after 2m 05s on cpu\n"
        "\n"
        "  loss         1.5000 nats/token held out, 1.2500 in training; 3.0000 by token frequencies alone\n"
        "  peak memory  predicted 5.00 GiB, measured 5.00 GiB, equal to the byte\n"
        "  speed        8.19K tokens/s, 250.00 ms a step\n"
        "  MFU          62.5% of 100.0 GFLOP/s, this machine's measured fp32 matmul rate\n"
        "  backward     1.95x the forward's time\n"
        "  model        3.28M parameters\n"
        "  data         text.txt, 1.00 MiB, as bytes\n"
        "  checkpoint   runs/tiny/checkpoints/step-00000600\n"
        "\n"
        "sample\n"
        "  | def f():\n"
        "  |     pass\n"
        "\n"
        "next:\n"
        "  bptool sample runs/tiny --tokens 300\n"
        "  tensorboard --logdir runs/tiny"
    )


@pytest.mark.parametrize(
    ("changes", "memory"),
    [
        ({"measured_peak_bytes": 4 * 2**30}, "predicted 5.00 GiB, measured 4.00 GiB, +25.00%"),
        ({"predicted_peak_bytes": 3 * 2**29}, "predicted 1.50 GiB, measured 5.00 GiB, -70.00%"),
        ({"predicted_peak_bytes": None}, "predicted n/a, measured 5.00 GiB"),
        ({"measured_peak_bytes": None}, "predicted 5.00 GiB, measured n/a"),
    ],
)
def test_memory(changes: dict[str, Any], memory: str) -> None:
    assert row(report(**changes), "peak memory") == memory


@pytest.mark.parametrize(
    ("changes", "mfu"),
    [
        (
            {"peak_flops_per_s": None, "mfu": None, "peak_flops_source": "no peak is known for 'X'"},
            "n/a (no peak is known for 'X')",
        ),
        ({"mfu": None, "workload": "my.py:vit"}, "n/a (the FLOPs of my.py:vit are not known)"),
    ],
)
def test_mfu_that_is_not_known_is_not_a_number(changes: dict[str, Any], mfu: str) -> None:
    assert row(report(**changes), "MFU") == mfu


@pytest.mark.parametrize(
    ("changes", "loss"),
    [
        ({"unigram_entropy": None}, "1.5000 nats/token held out, 1.2500 in training"),
        ({"unigram_entropy": None, "unit": "images"}, "1.5000 held out, 1.2500 in training"),
        (
            {"status": "interrupted", "val_loss": NAN},
            "1.2500 nats/token in training; 3.0000 by token frequencies alone",
        ),
        ({"val_loss": NAN}, "nan nats/token held out, 1.2500 in training; 3.0000 by token frequencies alone"),
        ({"first_step": 600, "train_loss": NAN}, "1.5000 nats/token held out; 3.0000 by token frequencies alone"),
        (
            {"first_step": 600, "train_loss": NAN, "val_loss": NAN, "status": "interrupted", "unigram_entropy": None},
            "n/a",
        ),
    ],
)
def test_losses_that_there_are(changes: dict[str, Any], loss: str) -> None:
    assert row(report(**changes), "loss") == loss


def test_interrupted() -> None:
    text = report(status="interrupted", steps=120, first_step=100, sample=None)
    assert text.startswith("stopped at step 120 of 600 (from step 100) after 2m 05s on cpu\n")
    assert text.endswith("\nnext:\n  bptool train --resume runs/tiny")


def test_interrupted_with_the_users_own_model_and_an_awkward_name() -> None:
    text = report(status="interrupted", run="runs/a run", workload="my models.py:vit")
    assert text.endswith("\n  bptool train 'my models.py:vit' --resume 'runs/a run'")


def test_a_sitting_without_a_step_has_no_speed() -> None:
    text = report(
        first_step=600, train_loss=NAN, step_median_s=NAN, tokens_per_s=NAN, backward_over_forward=NAN, mfu=NAN
    )
    assert "nan" not in text
    assert "speed" not in text


def test_the_plan() -> None:
    assert render_plan(TrainPlan(**PLAN)) == (
        "3.28M parameters on cpu, steps 1 to 600, predicted peak memory 5.00 GiB\ntext.txt, 1.00 MiB, as bytes"
    )
    resumed = TrainPlan(**{**PLAN, "first_step": 200, "predicted_peak_bytes": None})
    assert "steps 201 to 600, predicted peak memory n/a\n" in render_plan(resumed)
    ended = TrainPlan(**{**PLAN, "first_step": 600})
    assert "all 600 steps done, but for the result," in render_plan(ended)
