"""A run's model in Hugging Face's format, for everything that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

from bptool.analysis.result import Result
from bptool.analysis.sample import load_run_model, read_tokenizer
from bptool.config.huggingface import huggingface_config
from bptool.errors import UsageError
from bptool.files import replacing, writing
from bptool.interop.huggingface import WEIGHTS, save_weights
from bptool.training.run_folder import CONFIG, TOKENIZER, read_run_config

_TOKENIZER_CONFIG = "tokenizer_config.json"


class ExportResult(Result):
    """A folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    Attributes:
        family: the Hugging Face `model_type` that it became.
        step: optimizer steps that the model was trained for.
        files: names of what was written.
    """

    command: ClassVar[str] = "export"

    run: str
    step: int
    folder: str
    family: str
    files: list[str]


def export_run(run: Path, folder: Path, *, force: bool, note: Callable[[str], None]) -> ExportResult:
    """Write config.json, model.safetensors and the tokenizer into `folder`.

    Raises:
        UsageError: `folder` holds something and `force` is not given, or no family can express the model.
        StorageError: it could not be written.
    """
    config = read_run_config(run)
    family = str(huggingface_config(config.model)["model_type"])  # says at once what cannot be expressed
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not force:
        raise UsageError(
            f"{folder} exists and is not an empty folder", "choose another one, or overwrite it with --force"
        )
    model, step = load_run_model(run, config, note)
    tokenizer = _tokenizer_files(run)
    if not tokenizer:
        note("the run has no tokenizer, so the folder has none")
    with writing(folder), ExitStack() as written:  # all of it or, where a file cannot be written, nothing
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in tokenizer.items():
            written.enter_context(replacing(folder / name)).write_text(text, "utf-8")
        save_weights(model.state_dict(), config.model, folder)
    files = [CONFIG, WEIGHTS, *tokenizer]
    return ExportResult(run=str(run), step=step, folder=str(folder), family=family, files=files)


def _tokenizer_files(run: Path) -> dict[str, str]:
    """tokenizer.json, and the file by which `transformers` knows to read it as it is; nothing where there is none."""
    if not (run / TOKENIZER).is_file():
        return {}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if read_tokenizer(run).end_of_text is not None:
        settings["eos_token"] = "<|endoftext|>"
    return {TOKENIZER: (run / TOKENIZER).read_text("utf-8"), _TOKENIZER_CONFIG: json.dumps(settings, indent=1) + "\n"}
