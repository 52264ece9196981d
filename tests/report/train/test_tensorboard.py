from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bptool.config.keys import dotted
from bptool.errors import StorageError
from bptool.report.train.tensorboard import TensorBoard


def sitting(folder: Path, first: int, last: int, value: float, *, killed: bool = False) -> None:
    """The events of one sitting of a run of 20 steps; `killed`: it did not close its file."""
    board = TensorBoard(folder, small_config({"training.steps": 20}), first)
    for step in range(first + 1, last + 1):
        board.step_done(step, {"train/loss": value + step, "val/loss": value})
    if not killed:
        board.close()


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.fixture(autouse=True)
def files_named_a_second_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sitting takes seconds to start; these do not."""
    seconds = iter(range(1_700_000_000, 1_800_000_000))
    monkeypatch.setattr("bptool.report.event_file.time.time", lambda: float(next(seconds)))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("resumed_from", [0, 3, 6])
def test_each_step_once_after_a_kill(tmp_path: Path, resumed_from: int) -> None:
    """The second sitting goes back to a checkpoint, or to the start where none was written yet."""
    sitting(tmp_path, 0, 7, value=0.0, killed=True)
    sitting(tmp_path, resumed_from, 20, value=100.0)
    points = [(event.step, event.value) for event in read(tmp_path).Scalars("train/loss")]
    expected = [(step, step + (100.0 if step > resumed_from else 0.0)) for step in range(1, 21)]
    assert points == expected


def test_hyper_parameters_stand_beside_the_last_figures(tmp_path: Path) -> None:
    sitting(tmp_path, 0, 5, value=1.0)
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("hparam/train/loss")] == [(5, 6.0)]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert [key for key in dotted(small_config()) if key.encode() not in content] == []


def test_a_sitting_without_a_step_has_no_figures_to_stand_beside(tmp_path: Path) -> None:
    sitting(tmp_path, 5, 5, value=1.0)
    assert read(tmp_path).Tags()["scalars"] == []


def test_a_sample_keeps_its_line_breaks_and_indents(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, small_config(), 0)
    board.sampled(3, "if x:\n\n    y")
    board.close()
    (sample,) = read(tmp_path).Tensors("sample/text_summary")
    assert sample.step == 3
    assert sample.tensor_proto.string_val[0].decode() == "    if x:\n    \n        y"


class TestHistograms:
    def test_counts_are_those_of_numpy(self, tmp_path: Path) -> None:
        gradient = torch.randn(40, 50)
        board = TensorBoard(tmp_path, small_config(), 0)
        board.gradient("a.weight", gradient, 4)
        board.close()
        (event,) = read(tmp_path).Histograms("gradients/a.weight")
        written = event.histogram_value
        assert (event.step, written.num) == (4, 2000)
        assert written.min == pytest.approx(float(gradient.min()))
        assert written.sum_squares == pytest.approx(float(gradient.square().sum()), rel=1e-5)
        counts, _ = np.histogram(gradient.numpy(), [-np.inf, *written.bucket_limit])
        assert written.bucket == counts.tolist()

    @pytest.mark.parametrize(
        "gradient", [torch.zeros(3, 3), torch.full((2,), 1e-30), torch.ones(2, dtype=torch.bfloat16)]
    )
    def test_odd_ones_are_counted_too(self, tmp_path: Path, gradient: torch.Tensor) -> None:
        board = TensorBoard(tmp_path, small_config(), 0)
        board.gradient("a", gradient, 1)
        board.close()
        (event,) = read(tmp_path).Histograms("gradients/a")
        assert sum(event.histogram_value.bucket) == gradient.numel()

    def test_one_that_is_not_finite_has_none(self, tmp_path: Path) -> None:
        board = TensorBoard(tmp_path, small_config(), 0)
        board.gradient("a", torch.tensor([1.0, float("nan")]), 1)
        board.close()
        assert read(tmp_path).Tags()["histograms"] == []


def test_events_are_on_the_disk_before_the_next_step(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, small_config(), 0)
    board.step_done(1, {"train/loss": 2.0})
    assert [event.value for event in read(tmp_path).Scalars("train/loss")] == [2.0]
    board.close()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"events.out.tfevents.*No such file"):
        TensorBoard(tmp_path / "nowhere", small_config(), 0)
