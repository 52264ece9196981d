"""The user's own module, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Done, checkpoints, curve, invoke, weights

SOURCE = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from bptool import Workload

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))

    def forward(self, x):
        return self.layers(x)  # raising_in_loss

def pairs(generator):
    x = torch.randn(6, 8, generator=generator)
    return {"x": x, "y": x[:, :4].argmax(1)}

def loss(model, batch):
    return cross_entropy(model(batch["x"]), batch["y"])

def vit():
    return Workload(model=Net, batch=pairs, loss=loss, unit="images")

def speaking():
    print("hello from vit")
    return Workload(model=Net, batch=lambda g: print("hello from batch") or pairs(g), loss=loss)

def reading_values():
    def loss_with_item(model, batch):
        value = loss(model, batch)
        return value if value.item() < 1e9 else value * 0
    return Workload(model=Net, batch=pairs, loss=loss_with_item)

def turning_nan():
    calls = iter(range(99))
    def bad_loss(model, batch):
        value = loss(model, batch)
        real = type(value) is torch.Tensor and model.training
        return value * float("nan") if real and next(calls) >= 2 else value
    return Workload(model=Net, batch=pairs, loss=bad_loss)

def raising():
    raise KeyError("no such layer")  # raising

def raising_in_model():
    return Workload(model=lambda: Net(3), batch=pairs, loss=loss)  # raising_in_model

def raising_in_batch():
    return Workload(model=Net, batch=lambda g: 1 / 0, loss=loss)  # raising_in_batch

def raising_in_loss():
    def bad_loss(model, batch):
        return model(batch["x"][:, 1:]).mean()
    return Workload(model=Net, batch=pairs, loss=bad_loss)

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return 2 * x
    @staticmethod
    def backward(context, gradient):
        return undefined * gradient  # raising_in_backward

def raising_in_backward():
    return Workload(model=Net, batch=pairs, loss=lambda m, b: Doubled.apply(loss(m, b)))

def vector():
    return Workload(model=Net, batch=pairs, loss=lambda m, b: m(b["x"]).mean(0))

def detached():
    return Workload(model=Net, batch=pairs, loss=lambda m, b: loss(m, b).detach())

def frozen():
    return Workload(model=lambda: Net().requires_grad_(False), batch=pairs, loss=loss)

number = 3
"""
STEPS = "training.steps=6"


@pytest.fixture
def own(here: Path) -> Path:
    Path("my_model.py").write_text(SOURCE)
    return here


def told(done: Done, code: int, *words: str) -> None:
    assert (done.code, done.out) == (code, ""), done.err
    missing = [word for word in words if word not in done.err]
    assert not missing, done.err


def test_it_trains_and_its_figures_are_what_is_known_of_it(own: Path) -> None:
    done = invoke("train", "my_model.py:vit", STEPS, "--json")
    assert done.code == 0
    result = done.result
    assert (result["run"], result["workload"], result["unit"]) == ("runs/vit", "my_model.py:vit", "images")
    assert result["parameters_count"] == 8 * 16 + 16 + 16 * 4 + 4
    assert (result["mfu"], result["sample"], result["unigram_entropy"]) == (None, None, None)
    assert result["predicted_peak_bytes"] == result["measured_peak_bytes"]
    assert all(
        "perf/mfu" not in line for line in map(json.loads, Path("runs/vit/metrics.jsonl").read_text().splitlines())
    )


def test_its_report_has_its_own_unit_and_no_share_of_a_peak(own: Path) -> None:
    out = invoke("train", "my_model.py:vit", STEPS).out
    assert "images/s" in out
    assert "nats/token" not in out
    assert "n/a (the FLOPs of my_model.py:vit are not known)" in out
    assert out.splitlines()[-1] == "  tensorboard --logdir runs/vit"


def test_a_module_on_the_path_of_python_is_a_target_too(own: Path) -> None:
    Path("my_models").mkdir()
    Path("my_models/vision.py").write_text(SOURCE)
    assert invoke("train", "my_models.vision:vit", STEPS).code == 0


def test_a_resume_names_it_and_continues_to_the_bit(own: Path) -> None:
    constant = ["schedule.name=constant", "training.gradient_accumulation_steps=2"]
    invoke("train", "my_model.py:vit", STEPS, "run.name=unbroken", *constant)
    invoke("train", "my_model.py:vit", "training.steps=4", "run.name=stopped", *constant)
    done = invoke("train", "my_model.py:vit", "--resume", "stopped", STEPS)
    assert done.code == 0, done.err
    assert weights(Path("runs/stopped")) == weights(Path("runs/unbroken"))
    assert curve(Path("runs/stopped"), "train/loss") == curve(Path("runs/unbroken"), "train/loss")


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["--resume", "vit", "training.steps=9"], "bptool train my_model.py:vit --resume vit"),
        (["runs/vit"], "bptool train my_model.py:vit"),
        (["run.workload=my_model.py:vit"], "bptool train my_model.py:vit"),
    ],
)
def test_its_code_runs_only_when_it_is_the_target(own: Path, arguments: list[str], command: str) -> None:
    invoke("train", "my_model.py:vit", STEPS)
    Path("my_model.py").write_text("raise SystemExit('this code was run')\n")
    done = invoke("train", *arguments)
    told(done, 2, "code is run only", command)
    assert "this code was run" not in done.err
    assert [path.name for path in Path("runs").iterdir()] == ["vit"]


@pytest.mark.parametrize("command", ["sample", "export"])
def test_what_needs_the_built_in_model_says_so(own: Path, command: str) -> None:
    invoke("train", "my_model.py:vit", STEPS)
    told(invoke(command, "vit", *(["x"] if command == "export" else [])), 2, "the user's own model (my_model.py:vit)")


def test_its_model_and_data_are_not_settings(own: Path) -> None:
    told(invoke("train", "my_model.py:vit", "model.n_layers=2"), 2, "model.n_layers", "brings its own model")


def test_what_it_prints_stays_out_of_the_result(own: Path) -> None:
    done = invoke("train", "my_model.py:speaking", STEPS, "--json")
    assert done.result["steps"] == 6
    assert "hello from vit\n" in done.err
    assert "hello from batch\n" in done.err


def test_one_that_cannot_be_predicted_trains_all_the_same(own: Path) -> None:
    done = invoke("train", "my_model.py:reading_values", STEPS)
    assert done.code == 0
    assert "note: memory is not predicted" in done.err
    assert "in loss_with_item)" in done.err
    assert "predicted n/a, measured" in done.out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raising", ["KeyError: 'no such layer'", ", in raising)"]),
        ("raising_in_model", ["TypeError"]),
        ("raising_in_batch", ["ZeroDivisionError: division by zero"]),
        ("raising_in_loss", ["RuntimeError", ", in forward)"]),
        ("raising_in_backward", ["NameError", ", in backward)"]),
        ("vector", ["its loss is of shape [4], not a scalar"]),
        ("detached", ["its loss depends on no parameter", "detach()"]),
        ("frozen", ["no parameter requires a gradient"]),
        ("number", ["gave int, not a Workload"]),
        ("vti", ["has no 'vti', did you mean 'vit'?"]),
    ],
)
def test_its_mistakes_are_its_own(own: Path, name: str, words: list[str]) -> None:
    """Where a line of it raises, that line is named; torch's own lines below it are not."""
    lines = [number for number, line in enumerate(SOURCE.splitlines(), 1) if line.endswith(f"# {name}")]
    words = [*words, *(f"my_model.py, line {line}, in " for line in lines)]
    assert bool(lines) == name.startswith("raising")
    told(invoke("train", f"my_model.py:{name}", STEPS), 2, *words)


def test_code_that_python_cannot_read(own: Path) -> None:
    Path("my_model.py").write_text("def vit(:\n")
    told(invoke("train", "my_model.py:vit"), 2, "SyntaxError", "my_model.py, line 1")


def test_a_loss_that_turns_nan_stops_at_its_step(own: Path) -> None:
    done = invoke("train", "my_model.py:turning_nan", STEPS)
    told(done, 1, "step 3: the loss is nan", "update was not applied")
    assert checkpoints(Path("runs/turning_nan")) == [2]
