"""All rows of a grid begin with the same weights and see the same data."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bptool.analysis.question import Question
from bptool.config.overrides import parse_overrides
from bptool.config.schema import Config
from bptool.errors import DataError
from bptool.training.assembly import build_model
from bptool.training.loop import BatchSource
from bptool.training.material import GeneratedBatches, open_material
from bptool.training.precision import Precision
from bptool.training.seeds import derive_seed
from bptool.training.workload import Workload


def initial_state(config: Config, workload: Workload, device: torch.device) -> dict[str, Tensor]:
    """The weights in float32 that the run's seed gives on `device`, on the host; the model itself is gone again."""
    torch.manual_seed(derive_seed(config.run.seed, "weights"))
    return {name: tensor.cpu() for name, tensor in build_model(workload, device, torch.float32).state_dict().items()}


def beginning_with(state: Mapping[str, Tensor], workload: Workload) -> Workload:
    """The same workload, whose model is built with these weights, rounded to its dtype where that is another."""

    def model() -> nn.Module:
        built = workload.model()
        built.load_state_dict(dict(state))
        return built

    return replace(workload, model=model)


def with_shared_weights(question: Question, device: torch.device) -> Question:
    """The same question, with weights that are those of a float32 model of the same seed, rounded.

    A model that is built in a narrower dtype draws other numbers. In float32 nothing is to be done: rows whose
    parameters have the same names and shapes begin alike, as the seed is the same.
    """
    if Precision(question.config.precision, device).parameter_dtype == torch.float32:
        return question
    state = initial_state(question.config, question.workload, device)
    return replace(question, workload=beginning_with(state, question.workload))


def data_of(question: Question, device: torch.device, folder: Path) -> tuple[BatchSource, str]:
    """The micro-batches that `bptool train` would see, and a note where they are others.

    Where the corpus that a preset names cannot be had, they are random tokens.

    Args:
        folder: keeps the tokenizers that were trained on the way.

    Raises:
        DataError: the corpus that the user named cannot be had.
    """
    config = question.config
    generated = GeneratedBatches(config, question.workload, device)
    if question.code:
        return generated, ""
    settings = repr((config.data, config.model.vocab_size))
    tokenizer_file = folder / f"tokenizer-{zlib.crc32(settings.encode()):08x}.json"
    try:
        return open_material(config, device, code=None, tokenizer_file=tokenizer_file).source, ""
    except DataError as error:
        if any(key.startswith("data.") for key in parse_overrides(question.settings)):
            raise
        return generated, f"trained on random tokens: {error.message}"
