"""What does it write? A finished or running run's newest model, continuing a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

from bptool.analysis.result import Result
from bptool.config.overrides import override
from bptool.config.schema import Config
from bptool.data.tokenizer import Tokenizer, load_tokenizer
from bptool.errors import DataError, UsageError
from bptool.hardware import resolve_device
from bptool.model.transformer import Transformer, build
from bptool.training.assembly import load_model
from bptool.training.checkpoint import CheckpointFolder
from bptool.training.material import write_text
from bptool.training.precision import Precision
from bptool.training.run_folder import CHECKPOINTS, TOKENIZER, read_run_config


class SampleResult(Result):
    """Text that a run's model wrote.

    Attributes:
        step: optimizer steps that the model was trained for.
        text: begins with the prompt.
    """

    command: ClassVar[str] = "sample"

    run: str
    step: int
    seed: int
    prompt: str
    text: str


def sample_run(run: Path, changes: Mapping[str, object], *, seed: int, note: Callable[[str], None]) -> SampleResult:
    """Continue a prompt with the newest valid checkpoint of `run`, which may still be training.

    Args:
        changes: dotted keys of the config (`evaluation.prompt`, `evaluation.temperature` ...) and their values.

    Raises:
        ResumeError: there is no run. CheckpointError: it has no valid checkpoint. DataError: it has no tokenizer.
    """
    config = override(read_run_config(run), changes)
    model, step = load_run_model(run, config, note)
    tokenizer = read_tokenizer(run)
    text = write_text(model, tokenizer, config, seed=seed)
    return SampleResult(run=str(run), step=step, seed=seed, prompt=config.evaluation.prompt, text=text)


def load_run_model(run: Path, config: Config, note: Callable[[str], None]) -> tuple[Transformer, int]:
    """The built-in transformer of a run, with its newest weights, and the step that they are of.

    Raises:
        UsageError: the run trains the user's own model.
        CheckpointError: there is no valid checkpoint.
    """
    if config.run.workload:
        raise UsageError(
            f"{run} trains the user's own model ({config.run.workload}), which this command does not know",
            f"read its weights from {run / CHECKPOINTS}: they are plain safetensors",
        )
    device = resolve_device(config.training.device)
    checkpoint = CheckpointFolder(run / CHECKPOINTS, keep=config.checkpoint.keep, warn=note).require_newest()
    dtype = Precision(config.precision, device).parameter_dtype
    model = build(config.model, device=device, seed=0, dtype=dtype)
    load_model(model, checkpoint)
    return model, checkpoint.step


def read_tokenizer(run: Path) -> Tokenizer:
    """The tokenizer that the run's text went through.

    Raises:
        DataError: the run was trained on a token file, which has none.
    """
    if not (run / TOKENIZER).is_file():
        raise DataError(
            f"{run} was trained on token ids, without a tokenizer, so it has no words",
            f"put the tokenizer's tokenizer.json into {run}",
        )
    return load_tokenizer(run / TOKENIZER)
