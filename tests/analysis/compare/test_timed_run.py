from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Command
from measured_grids import SMALL, job_of, workloads
from small_runs import CPU, question_of, small_config
from torch import Tensor, nn

from bptool.analysis.compare.entries import RowRun
from bptool.analysis.compare.row_process import run_job
from bptool.analysis.compare.same_start import data_of, with_shared_weights
from bptool.analysis.compare.timed_run import timed_run
from bptool.analysis.memory.fit import predict_peak
from bptool.analysis.question import ask
from bptool.config.overrides import override
from bptool.errors import DataError
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer
from bptool.training.workload import Workload, transformer_workload


def policy(name: str, *more: str) -> tuple[str, ...]:
    return (f"activation_checkpoint.policy={name}", *(f"activation_checkpoint.{one}" for one in more))


@pytest.fixture(autouse=True)
def as_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a row's process as here: attention on a CPU has a buffer for each."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


def run_of(question: Any, folder: Path, warmup: int = 2, steps: int = 1) -> RowRun:
    return RowRun(row=0, round=0, status="ok", **timed_run(question, folder, warmup=warmup, steps=steps).figures)


POLICIES = [
    policy("none"),
    policy("full"),
    policy("every_k", "every=2"),
    policy("attention"),
    policy("mlp"),
    policy("save_matmuls"),
    policy("save_every_other_matmul"),
    policy("save_attention"),
    policy("offload"),
    policy("budget", "budget=60KiB"),
    policy("plan", "plan=full+none+save_attention"),
]
MODES: list[tuple[str, ...]] = [
    ("precision.mode=bf16-mixed",),
    ("precision.mode=bf16", "optimizer.name=sgd"),
    ("precision.mode=fp16-mixed", "training.gradient_accumulation_steps=2"),
]


def assert_exact(target: str, settings: Sequence[str], folder: Path) -> None:
    """Predicted on fake tensors here, and measured in a process of its own."""
    job = job_of("run", target, folder, settings)
    outcome = run_job(job, time_limit_s=120, stopped=lambda: False)
    assert outcome is not None
    assert outcome.status == "ok", outcome.reason
    predicted = predict_peak(ask(target, settings, command="compare", device="cpu"))
    assert outcome.figures["peak_bytes"] == predicted.peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("settings", [*POLICIES, *(policy("full") + mode for mode in MODES)], ids=" ".join)
def test_the_measured_peak_is_the_predicted_one_to_the_byte(settings: tuple[str, ...], tmp_path: Path) -> None:
    assert_exact("tiny", [*SMALL, "model.n_layers=3", "model.dropout=0.1", *settings], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "full"])
def test_also_of_the_users_own_model(name: str, tmp_path: Path) -> None:
    assert_exact(f"{workloads(tmp_path)}:plain", ["training.device=cpu", *policy(name)], tmp_path)


@pytest.mark.parametrize("warmup", [2, 4])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_whichever_step_is_measured(warmup: int, accumulation: int, tmp_path: Path) -> None:
    question = question_of(small_config({"training.gradient_accumulation_steps": accumulation}))
    assert run_of(question, tmp_path, warmup).peak_bytes == predict_peak(question).peak_bytes


def test_losses_are_those_of_training(train: Command, text: Path, here: Path) -> None:
    """To the bit, of every step: same weights, data, dropout and learning rate."""
    settings = [*SMALL, f"data.source={text}", "model.dropout=0.2", "training.steps=5"]
    done = train(*settings, "run.name=plain")
    assert done.code == 0, done.err
    lines = (here / "runs" / "plain" / "metrics.jsonl").read_text().splitlines()
    losses = run_of(ask("tiny", settings, command="compare", device="cpu"), here, steps=3).losses
    assert losses == [json.loads(line)["train/loss"] for line in lines]


@pytest.mark.parametrize("changes", [{"activation_checkpoint.policy": "full"}, {"model.attention": "eager"}], ids=str)
def test_rows_begin_with_the_same_loss(changes: dict[str, Any], tmp_path: Path) -> None:
    first, other = (run_of(question_of(small_config(one)), tmp_path).losses for one in ({}, changes))
    assert other[0] == pytest.approx(first[0], rel=1e-6)
    assert other[-1] == pytest.approx(first[-1], rel=1e-4)


def linear() -> Workload:
    """Many uniform numbers are drawn in another way in another dtype, on a CPU too."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        rows: Tensor = model(batch)
        return rows.square().mean()

    return Workload(lambda: nn.Linear(64, 64), lambda generator: torch.ones(2, 64), loss)


@pytest.mark.parametrize("workload", [None, linear()], ids=["built-in", "own"])
def test_weights_in_bf16_are_those_of_float32_rounded(workload: Workload | None) -> None:
    wide, narrow = (question_of(small_config({"precision.mode": mode}), workload) for mode in ("fp32", "bf16"))
    expected = build_step(wide.config, wide.workload, CPU, Announcer()).model.state_dict()
    shared = with_shared_weights(narrow, CPU)
    model = build_step(shared.config, shared.workload, CPU, Announcer()).model
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].to(tensor.dtype))
    assert with_shared_weights(wide, CPU) is wide


def test_times_are_parts_of_the_whole(tmp_path: Path) -> None:
    question = question_of(small_config({"activation_checkpoint.policy": "full"}))
    run = run_of(question, tmp_path, warmup=3, steps=4)
    assert (len(run.steps), len(run.losses)) == (4, 7)
    for step in run.steps:
        assert step.recompute_s is not None
        assert min(step.forward_s, step.recompute_s, step.backward_s) > 0
        assert step.forward_s + step.recompute_s + step.backward_s < step.step_s
        assert step.units == 2 * 16


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own insides
def test_recomputation_that_is_compiled_has_no_time_of_its_own(tmp_path: Path) -> None:
    question = question_of(small_config({"activation_checkpoint.policy": "full", "training.compile": True}))
    run = run_of(question, tmp_path, warmup=3, steps=2)
    assert [step.recompute_s for step in run.steps] == [None, None]


def test_random_tokens_stand_in_for_a_corpus_that_does_not_fit(tmp_path: Path) -> None:
    question = question_of(small_config())  # of 32 ids, where a byte is one of 256
    source, note = data_of(question, CPU, tmp_path)
    assert "random tokens" in note
    assert "256" in note
    assert int(source.micro_batches(0)[0]["tokens"].max()) < 32
    first, again = (data_of(question, CPU, tmp_path)[0].micro_batches(3)[0]["tokens"] for _ in range(2))
    assert torch.equal(first, again)


def test_but_not_for_one_that_the_user_named(tmp_path: Path) -> None:
    question = ask("tiny", [*SMALL, f"data.source={tmp_path / 'none.txt'}"], command="compare", device="cpu")
    with pytest.raises(DataError, match=r"none\.txt"):
        data_of(question, CPU, tmp_path)


def test_a_tokenizer_is_trained_once(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog sat on the cat. " * 40)
    settings = [*SMALL, f"data.source={text}", "data.tokenizer=bpe", "model.vocab_size=300"]
    question = ask("tiny", settings, command="compare", device="cpu")
    first = data_of(question, CPU, tmp_path)[0].micro_batches(0)[0]["tokens"]
    (file,) = tmp_path.glob("tokenizer-*.json")
    before = file.stat().st_mtime_ns
    assert torch.equal(data_of(question, CPU, tmp_path)[0].micro_batches(0)[0]["tokens"], first)
    assert file.stat().st_mtime_ns == before
    other = override(question.config, {"model.vocab_size": 320})
    data_of(question_of(other, transformer_workload(other)), CPU, tmp_path)
    assert len(list(tmp_path.glob("tokenizer-*.json"))) == 2
