"""The README keeps up with the code: every command, preset and exit code is in it, and its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bptool import Workload, errors
from bptool.cli.main import app
from bptool.config.presets import preset_names

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_every_command_is_documented() -> None:
    names = [command.name for command in app.registered_commands]
    assert "train" in names
    assert [name for name in names if f"bptool {name}" not in README] == []


def test_every_preset_is_documented() -> None:
    assert [name for name in preset_names() if f"`{name}`" not in README] == []


def test_every_exit_code_is_documented() -> None:
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "exit_code")}
    codes |= {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert codes == {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}


def test_every_promised_target_exists() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)|`make (\w+)`", README, re.MULTILINE))
    words = {word for pair in targets for word in pair if word}
    assert {"train", "test"} <= words
    assert [word for word in words if f"\n{word}:" not in makefile] == []


def test_the_example_of_an_own_model_is_a_workload() -> None:
    (source,) = re.findall(r"```python\n(# my_model\.py.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(source, "README", "exec"), scope)
    factory = scope["digits"]
    assert callable(factory)
    workload = factory()
    assert isinstance(workload, Workload)
    model = workload.model()
    loss = workload.loss(model, workload.batch(torch.Generator().manual_seed(0)))
    loss.backward()
    assert loss.item() == pytest.approx(2.3, abs=0.5)  # ln 10: ten classes, nothing learned
