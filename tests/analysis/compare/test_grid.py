"""From a command line to rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compare_records import MODE, POLICY

from bptool.analysis.compare.grid import read_grid
from bptool.errors import ConfigError, DeviceError, UsageError

OWN = """
import torch
from bptool import Workload

with open(FILE, "a") as file:
    file.write("x")

def net():
    return Workload(
        model=lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)),
        batch=lambda generator: torch.randn(2, 4, generator=generator),
        loss=lambda model, batch: model(batch).square().mean(),
    )
"""


@pytest.fixture
def own(tmp_path: Path) -> tuple[str, Path]:
    """A model of the user's, and a file that grows by a letter each time that its code is run."""
    file, counter = tmp_path / "net.py", tmp_path / "runs"
    file.write_text(OWN.replace("FILE", repr(str(counter))))
    return f"{file}:net", counter


def test_each_row_has_its_own_settings_and_model() -> None:
    grid = read_grid("tiny", ["training.steps=7", f"{POLICY}=none,every_k:2", "training.micro_batch_size=4,2"])
    assert [row.label for row in grid.rows] == [
        *("none micro_batch_size=4", "none micro_batch_size=2"),
        *("every_k:2 micro_batch_size=4", "every_k:2 micro_batch_size=2"),
    ]
    assert grid.rows[3].settings == {POLICY: "every_k:2", "training.micro_batch_size": 2}
    questions = [row.question for row in grid.rows if row.question]
    assert [q.config.activation_checkpoint.policy for q in questions] == ["none", "none", "every_k", "every_k"]
    assert all(q.config.training.steps == 7 for q in questions)
    assert questions[3].settings == ("training.steps=7", f"{POLICY}=every_k:2", "training.micro_batch_size=2")
    batch = questions[3].workload.batch(torch.Generator())
    assert batch["tokens"].shape[0] == 2
    assert (grid.target, grid.overrides, grid.name) == ("tiny", ["training.steps=7"], "tiny")


def test_what_contradicts_itself_is_a_row_that_says_so() -> None:
    grid = read_grid(None, ["training.sequence_length=64,128", "model.context_length=128,64"])
    assert [row.question is None for row in grid.rows] == [False, False, False, True]
    assert "training.sequence_length = 128 exceeds model.context_length" in grid.rows[3].reason


def test_what_the_device_cannot_do_is_a_row_that_says_so() -> None:
    grid = read_grid(None, [f"{MODE}=fp32,tf32"], device="cpu")
    assert "needs a CUDA device" in grid.rows[1].reason
    grid = read_grid(None, [f"{MODE}=fp32,tf32,bf16,fp16-mixed"], gpu="t4")
    assert [bool(row.reason) for row in grid.rows] == [False, True, True, False]
    assert "t4 has 7.5" in grid.rows[1].reason


def test_all_rows_are_of_one_machine() -> None:
    grid = read_grid(None, [f"{MODE}=fp32,bf16"], gpu="a100-40gb")
    assert [row.question.machine for row in grid.rows if row.question] == [grid.machine] * 2


@pytest.mark.parametrize(
    ("words", "gpu", "count"),
    [([], None, 6), ([], "h100", 9), ([], "t4", 6), ([f"{POLICY}=full"], None, 2), ([f"{MODE}=bf16"], None, 3)],
)
def test_the_usual_grid(words: list[str], gpu: str | None, count: int) -> None:
    grid = read_grid(None, words, device="auto" if gpu else "cpu", gpu=gpu)
    assert len(grid.rows) == count
    assert all(row.question for row in grid.rows)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([f"{POLICY}=full", f"{MODE}=fp32"], "one row only"),
        (["training.device=cpu,cuda"], "--device"),
        (["run.name=a,b"], "changes nothing"),
        (["model.n_heads=3,5"], "not divisible"),
        (["training.sequence_length=128,256", "model.context_length=64"], "exceeds"),
    ],
)
def test_a_grid_without_a_sense_is_refused(words: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        read_grid(None, words, device="cpu")


def test_a_device_that_can_do_none_of_it() -> None:
    with pytest.raises(DeviceError, match="needs a CUDA device"):
        read_grid(None, [f"{MODE}=tf32", f"{POLICY}=none,full"], device="cpu")


class TestOwnModel:
    def test_its_code_is_run_once(self, own: tuple[str, Path]) -> None:
        target, counter = own
        grid = read_grid(target, [f"{POLICY}=none,full", f"{MODE}=fp32,bf16"])
        assert counter.read_text() == "x"
        assert [row.question.config.precision.mode for row in grid.rows if row.question] == ["fp32", "bf16"] * 2
        assert grid.name == "net"

    def test_so_it_is_for_the_usual_grid(self, own: tuple[str, Path]) -> None:
        target, counter = own
        assert len(read_grid(target, [], device="cpu").rows) == 6
        assert counter.read_text() == "x"

    def test_its_shape_is_no_axis(self, own: tuple[str, Path]) -> None:
        with pytest.raises(ConfigError, match="brings its own model and data"):
            read_grid(own[0], ["model.n_layers=1,2"])
        with pytest.raises(ConfigError, match="brings its own batches"):
            read_grid(own[0], ["training.micro_batch_size=1,2"])
