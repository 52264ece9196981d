"""Predictions for a GPU against what was measured on one, wherever these tests run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measure
import pytest
import torch
from settings import SETTINGS

from bptool.analysis.machine import Machine, machine_named
from bptool.analysis.memory.estimate import Simulated, simulated
from bptool.analysis.question import ask
from bptool.gpus import gpu_reporting
from bptool.training.assembly import build_step

FILES = sorted(Path(__file__).parent.glob("peaks-*.json"))
NONE_MEASURED = (
    "NO GPU WAS MEASURED: the CUDA path is not held to any GPU's own figures. On a machine with a CUDA GPU run"
    " `python tests/cuda_measurements/measure.py` (minutes), and commit the peaks-*.json that it writes"
)
ALLOCATED, RESERVED = 0.01, 0.03
"""How far a prediction may be from the measured figure."""


def predicted(setting: str, machine: Machine) -> Simulated:
    target, *overrides = shlex.split(setting)
    question = ask(target, overrides, command="memory-estimate", device="cpu")
    return simulated(question.config, question.workload, machine)


def machine_of(environment: dict[str, Any]) -> Machine:
    if environment["device"] == "cpu":
        return machine_named("cpu", None)
    gpu = gpu_reporting(environment["device"])
    assert gpu is not None, f"bptool.gpus does not know {environment['device']}; add it"
    return machine_named("cuda", gpu.name)


@pytest.mark.skipif(bool(FILES), reason="there are measured peaks")
def test_a_gpu_was_measured() -> None:
    pytest.skip(NONE_MEASURED)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_was_measured(file: Path) -> None:
    content = json.loads(file.read_text())
    measured = [one for one in content["measured"] if "error" not in one]
    assert len(measured) >= 40
    table = []
    for one in measured:
        step = predicted(one["setting"], machine_of(content["environment"]))
        allocated = step.peak_bytes / one["allocated_bytes"] - 1
        reserved = step.reserved_bytes / one["reserved_bytes"] - 1
        table.append((f"allocated {allocated:+.3%}, reserved {reserved:+.3%}  {one['setting']}", allocated, reserved))
    print("\n".join(["", str(content["environment"]), *(line for line, _, _ in table)]))
    assert [line for line, a, r in table if abs(a) > ALLOCATED or abs(r) > RESERVED] == []


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_is_one(setting: str) -> None:
    """So that no minute on a GPU is lost to a misspelt key."""
    target, *overrides = shlex.split(setting)
    assert ask(target, overrides, command="memory-estimate", device="cpu").config.training.micro_batch_size > 0


def test_there_are_enough_settings() -> None:
    assert len(set(SETTINGS)) == len(SETTINGS) >= 40


SMALL = "tiny model.n_layers=1 model.d_model=32 model.n_heads=2 training.micro_batch_size=2"


def test_the_script_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it but the calls into CUDA; a setting that fails costs none of the others."""
    settings = (f"{SMALL} precision.mode=tf32", SMALL, f"{SMALL} training.gradient_accumulation_steps=2", "other")
    monkeypatch.setattr(measure, "SETTINGS", settings)
    output = tmp_path / "peaks.json"
    assert measure.main(["--device", "cpu", "--only", "tiny", "-o", str(output)]) == 0
    assert "2 measured, 1 failed" in capsys.readouterr().out
    content = json.loads(output.read_text())
    assert content["environment"] == {"torch": torch.__version__.partition("+")[0], "device": "cpu"}
    failed, *measured = content["measured"]
    assert failed["error"].startswith("DeviceError: precision.mode = 'tf32' needs a CUDA device")
    machine = machine_of(content["environment"])
    assert [predicted(one["setting"], machine).peak_bytes for one in measured] == [
        one["allocated_bytes"] for one in measured
    ]


@pytest.mark.skipif(torch.version.cuda is not None, reason="a build for CUDA asks the driver all the same")
def test_the_calls_into_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stood in for one by one, the rest on the CPU: what is asked of CUDA, and in which order."""
    calls: list[str] = []

    def stand_in(name: str, result: object = None) -> None:
        def called(*arguments: object) -> object:
            calls.append(name)
            return result

        monkeypatch.setattr(torch.cuda, name, called)

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        stand_in(name)
    stand_in("is_available", True)
    stand_in("memory_allocated", 64)
    stand_in("max_memory_allocated", 1000)
    stand_in("max_memory_reserved", 2000)
    stand_in("get_device_name", "NVIDIA H100 80GB HBM3")
    stand_in("get_device_capability", (9, 0))
    stand_in("get_device_properties", SimpleNamespace(total_memory=80, multi_processor_count=132))
    monkeypatch.setattr(measure, "SETTINGS", (SMALL,))
    monkeypatch.setattr(measure, "HERE", tmp_path)
    cpu = torch.device("cpu")
    zeros, generator = torch.zeros, torch.Generator
    monkeypatch.setattr(
        measure, "build_step", lambda config, workload, _, told: build_step(config, workload, cpu, told)
    )
    monkeypatch.setattr(torch, "zeros", lambda *shape, **how: zeros(*shape, **{**how, "device": cpu}))
    monkeypatch.setattr(torch, "Generator", lambda device: generator(cpu))
    assert measure.main([]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name == f"peaks-h100-80gb-hbm3-{torch.__version__.partition('+')[0]}.json"
    content = json.loads(file.read_text())
    assert machine_of(content["environment"]).gpu == machine_named("cuda", "h100").gpu
    assert content["environment"]["total_bytes"] == 80
    (one,) = content["measured"]
    assert (one["allocated_bytes"], one["reserved_bytes"], one["allocated_before_bytes"]) == (1000, 2000, 64)
    around = [name for name in calls if "memory" in name or name == "empty_cache"]
    assert around == [
        *("empty_cache", "reset_peak_memory_stats", "memory_allocated"),  # before the model is built
        *("reset_peak_memory_stats", "max_memory_allocated", "max_memory_reserved"),  # around the second step
    ]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measure.main([]) == 3
    assert "no CUDA GPU" in capsys.readouterr().err
