"""One sitting of a run, called as the command calls it; what a user sees of it is in tests/cli."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SMALL
from torch.nn.functional import cross_entropy

from bptool.analysis.result import Result
from bptool.analysis.train import Trainer, TrainResult
from bptool.data.order import WindowOrder
from bptool.hardware import PeakRate
from bptool.model.transformer import build
from bptool.training.assembly import load_model
from bptool.training.checkpoint import CheckpointFolder
from bptool.training.loop import Listener
from bptool.training.opening import open_new
from bptool.training.run_folder import read_run_config
from bptool.training.seeds import derive_seed

RUN, T = Path("runs/tiny"), 32


class Recorder(Listener):
    """Keeps each step's scalars; sends Ctrl-C's signal after one of them."""

    def __init__(self, interrupt_after: int = 0) -> None:
        self.steps: dict[int, Mapping[str, float]] = {}
        self._interrupt_after = interrupt_after

    def step_done(self, step: int, scalars: Mapping[str, float]) -> None:
        self.steps[step] = dict(scalars)
        if step == self._interrupt_after:
            os.kill(os.getpid(), signal.SIGINT)


def sitting(text: Path, *overrides: str, recorder: Recorder | None = None) -> TrainResult:
    opened = open_new(None, [*SMALL, f"data.source={text}", *overrides], print, force=False)
    with opened.folder:
        return Trainer(opened, print).train([recorder or Recorder()])


def plain_loss(text: Path, starts: list[int], *, trained: bool) -> float:
    """Mean cross-entropy of the bytes that follow each of T bytes at `starts`, by the plainest PyTorch there is."""
    config = read_run_config(RUN)
    model = build(config.model, device="cpu", seed=derive_seed(config.run.seed, "weights"))
    if trained:
        load_model(model, CheckpointFolder(RUN / "checkpoints", keep=1).require_newest())
    stream = torch.from_numpy(np.frombuffer(text.read_bytes(), np.uint8).astype(np.int64))
    windows = torch.stack([stream[start : start + T + 1] for start in starts])
    with torch.no_grad():
        logits = model(windows[:, :-1]).double()
    return float(cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def n_train(text: Path) -> int:
    n_bytes = text.stat().st_size
    return n_bytes - int(n_bytes * 0.05)


class TestFigures:
    def test_the_first_loss_is_that_of_the_first_batch_and_the_initial_weights(self, here: Path, text: Path) -> None:
        recorder = Recorder()
        sitting(text, recorder=recorder)
        seed = derive_seed(read_run_config(RUN).run.seed, "order")
        starts = WindowOrder(n_train(text), T, seed).starts(0, 2).tolist()
        assert recorder.steps[1]["train/loss"] == pytest.approx(plain_loss(text, starts, trained=False), rel=1e-5)

    def test_the_held_out_loss_is_that_of_the_final_weights_on_the_tail(self, here: Path, text: Path) -> None:
        result = sitting(text, "evaluation.sequences=2")
        n_windows = (text.stat().st_size - n_train(text) - 1) // T
        starts = [n_train(text) + k * n_windows // 2 * T for k in range(2)]
        assert result.val_loss == pytest.approx(plain_loss(text, starts, trained=True), rel=1e-5)

    def test_the_entropy_is_that_of_counting(self, here: Path, text: Path) -> None:
        counts = Counter(text.read_bytes()[: n_train(text)])
        shares = [count / counts.total() for count in counts.values()]
        expected = -sum(share * math.log(share) for share in shares)
        assert sitting(text).unigram_entropy == pytest.approx(expected, rel=1e-9)

    def test_utilisation_is_model_flops_over_the_peak(
        self, here: Path, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """6 N + 12 L H Q T a token (Chowdhery et al. 2022, appendix B), by hand for `SMALL`."""
        monkeypatch.setattr("bptool.analysis.train.peak_rate", lambda device, mode: PeakRate(2e11, "a test's"))
        result = sitting(text)
        multiplying = 4 * 32 * 32 + 3 * 32 * 128 + 256 * 32  # attention, swiglu, the output projection
        assert result.parameters_count == multiplying + 3 * 32  # and three norms; the embedding is tied
        flops = 6 * multiplying + 12 * 1 * 2 * 16 * T
        assert result.mfu == pytest.approx(result.tokens_per_s * flops / 2e11, rel=1e-9)

    def test_without_a_known_peak_there_is_no_utilisation(
        self, here: Path, text: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bptool.analysis.train.peak_rate", lambda device, mode: PeakRate(None, "an unknown GPU"))
        recorder = Recorder()
        result = sitting(text, recorder=recorder)
        assert (result.mfu, result.peak_flops_per_s, result.peak_flops_source) == (None, None, "an unknown GPU")
        assert all("perf/mfu" not in scalars for scalars in recorder.steps.values())

    @pytest.mark.parametrize(
        ("settings", "unseen"),
        [
            ([], 0),
            (["training.gradient_accumulation_steps=3"], 0),
            (["optimizer.name=muon"], 0),
            (["training.loss=plain", "model.n_layers=2", "activation_checkpoint.policy=full"], 0.01),  # random state
            (["precision.mode=bf16"], 0.1),  # what bf16 kernels allocate and free inside one operation
        ],
    )
    def test_predicted_memory_is_what_is_measured(
        self, here: Path, text: Path, settings: list[str], unseen: float
    ) -> None:
        result = sitting(text, *settings)
        assert result.predicted_peak_bytes is not None
        assert result.measured_peak_bytes is not None
        beyond = result.measured_peak_bytes - result.predicted_peak_bytes
        assert 0 <= beyond <= unseen * result.measured_peak_bytes


class TestInterrupted:
    def test_it_ends_after_the_step_and_is_saved(self, here: Path, text: Path) -> None:
        recorder = Recorder(interrupt_after=2)
        result = sitting(text, recorder=recorder)
        assert (result.status, result.steps, result.total_steps) == ("interrupted", 2, 4)
        assert list(recorder.steps) == [1, 2]
        assert result.checkpoint == "runs/tiny/checkpoints/step-00000002"
        assert math.isnan(result.val_loss)
        assert json.loads((RUN / "result.json").read_text())["result"]["val_loss"] is None

    def test_in_its_last_step_it_is_finished_all_the_same(self, here: Path, text: Path) -> None:
        result = sitting(text, recorder=Recorder(interrupt_after=4))
        assert (result.status, result.steps) == ("finished", 4)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own insides, as they are imported
@pytest.mark.parametrize("compiled", [True, False])
def test_what_the_prediction_leaves_out_is_told(compiled: bool, here: Path, text: Path) -> None:
    notes: list[str] = []
    opened = open_new(None, [*SMALL, f"data.source={text}", f"training.compile={compiled}".lower()], print, force=False)
    with opened.folder:
        Trainer(opened, notes.append)
    assert any("without torch.compile" in note for note in notes) == compiled


def test_a_result_has_no_number_that_json_has_not() -> None:
    class Odd(Result):
        command = "odd"
        numbers: dict[str, list[float]]

    document = Odd(numbers={"a": [1.5, float("nan"), float("inf")]}).document()
    assert document["result"] == {"numbers": {"a": [1.5, None, None]}}
    assert (document["command"], document["schema_version"]) == ("odd", 1)
