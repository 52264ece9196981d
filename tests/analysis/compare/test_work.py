"""What goes wrong in a job is an outcome, of the right kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from measured_grids import SMALL, job_of, workloads

from bptool.analysis.compare import work
from bptool.analysis.compare.job import JobKind
from bptool.analysis.gradient_equality import changed_by_recomputation
from bptool.config.block_plan import parse_plan
from bptool.config.schema import Config
from bptool.training.workload import Workload


@pytest.mark.parametrize("kind", ["run", "gradient"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["precision.mode=tf32"], "tf32"),
        (["activation_checkpoint.policy=budget", "activation_checkpoint.budget=1KiB"], "1KiB"),
        (["optimizer.name=adafactor", "optimizer.implementation=fused"], "adafactor"),
    ],
)
def test_what_device_or_settings_are_against(kind: JobKind, settings: list[str], said: str, tmp_path: Path) -> None:
    outcome = work.done(job_of(kind, "tiny", tmp_path, [*SMALL, *settings]))
    assert outcome.status == "unsupported"
    assert said in outcome.reason


def test_what_the_model_is_against(tmp_path: Path) -> None:
    """Its blocks are linear layers, with nothing in them."""
    outcome = work.done(job_of("run", f"{workloads(tmp_path)}:plain", tmp_path, ["activation_checkpoint.policy=mlp"]))
    assert outcome.status == "unsupported"


def test_a_corpus_that_is_not_there(tmp_path: Path) -> None:
    outcome = work.done(job_of("run", "tiny", tmp_path, [*SMALL, "data.source=none.txt"]))
    assert outcome.status == "failed"
    assert "none.txt" in outcome.reason


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "out_of_memory"),
        (RuntimeError("CUDA error: out of memory"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (RuntimeError("\"add\" not implemented for 'Half'"), "unsupported"),
        (RuntimeError("shapes differ"), "failed"),
        (SystemExit("no"), "failed"),
        (KeyboardInterrupt(), "failed"),
    ],
    ids=repr,
)
def test_errors_are_told_apart(
    error: BaseException, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(config: Config, workload: Workload) -> list[str]:
        raise error

    monkeypatch.setattr(work, "changed_by_recomputation", raises)
    outcome = work.done(job_of("equality", "tiny", tmp_path, SMALL))
    assert outcome.status == status
    assert str(error) in outcome.reason


FULL = ("activation_checkpoint.policy=full",)
PLAN = ("activation_checkpoint.policy=plan", "activation_checkpoint.plan=3*full+5*none+4*save_attention")
BUDGET = ("activation_checkpoint.policy=budget", "activation_checkpoint.budget=6MiB")


@pytest.mark.parametrize("settings", [FULL, PLAN, BUDGET], ids=["full", "plan", "budget"])
def test_of_a_gpus_model_a_few_blocks_are_compared(
    settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every treatment that some block has; the batch is a small one."""
    seen: list[Config] = []
    compare = changed_by_recomputation

    def noting(config: Config, workload: Workload) -> list[str]:
        seen.append(config)
        assert workload.n_layers == config.model.n_layers
        return compare(config, workload)

    monkeypatch.setattr(work, "changed_by_recomputation", noting)
    large = ["model.n_layers=12", "model.context_length=512", "training.micro_batch_size=4"]
    job = job_of("equality", "tiny", tmp_path, [*SMALL, *large, *settings]).model_copy(update={"device": "cuda"})
    outcome = work.done(job)
    assert (outcome.status, outcome.figures) == ("ok", {"changed": []})
    (config,) = seen
    assert config.model.n_layers <= 4
    assert (config.training.micro_batch_size, config.training.sequence_length) == (1, 128)
    if settings == PLAN:
        assert set(parse_plan(config.activation_checkpoint.plan)) == {"full", "none", "save_attention"}
    else:
        assert config.activation_checkpoint.policy != "none"
