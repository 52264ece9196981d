"""What a run trains on: a workload with its batches, from the config's corpus or from the user's own code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_map  # what torch itself nests tensors with

from bptool.config.schema import Config
from bptool.config.target import CodeTarget
from bptool.data.batches import TokenBatches, held_out_batches
from bptool.data.dataset import Dataset, open_dataset
from bptool.data.tokenizer import Tokenizer
from bptool.model.accounting import flops_per_token
from bptool.model.sampling import sample
from bptool.model.transformer import Transformer
from bptool.training.loop import BatchSource
from bptool.training.seeds import derive_seed
from bptool.training.user_code import load_workload
from bptool.training.workload import Batch, Workload, transformer_workload


@dataclass(frozen=True)
class Material:
    """A workload and its data.

    Attributes:
        source: the micro-batches of each step.
        held_out: batches that are evaluated on, never trained on.
        fingerprint: changes when the data does.
        description: one line for people.
        unigram_entropy: nats per token; None without a corpus.
        flops_per_unit: model FLOPs of one token, forward and backward; None for a user's own model.
        sampler: given the model, what writes text at step n; None where there is none to write.
    """

    workload: Workload
    source: BatchSource
    held_out: Sequence[Batch]
    fingerprint: str
    description: str
    unigram_entropy: float | None = None
    flops_per_unit: float | None = None
    sampler: Callable[[nn.Module], Callable[[int], str] | None] = lambda model: None


def open_material(config: Config, device: torch.device, *, code: CodeTarget | None, tokenizer_file: Path) -> Material:
    """The user's workload where `code` names one, else the built-in transformer on the config's corpus.

    Args:
        tokenizer_file: where the run keeps its tokenizer; read where it is there, written where it is not.

    Raises:
        TargetError, DataError, StorageError: it cannot be had.
    """
    return _user_material(config, device, code) if code else _token_material(config, device, tokenizer_file)


def _token_material(config: Config, device: torch.device, tokenizer_file: Path) -> Material:
    training = config.training
    dataset = open_dataset(
        config.data,
        vocab_size=config.model.vocab_size,
        sequence_length=training.sequence_length,
        tokenizer_file=tokenizer_file,
    )
    if dataset.tokenizer and not tokenizer_file.exists():
        dataset.tokenizer.save(tokenizer_file)
    batches = TokenBatches(
        dataset.train,
        sequence_length=training.sequence_length,
        micro_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        seed=derive_seed(config.run.seed, "order"),
    )
    held_out = held_out_batches(
        dataset.validation,
        sequence_length=training.sequence_length,
        micro_batch_size=training.micro_batch_size,
        sequences=config.evaluation.sequences,
    )
    return Material(
        workload=transformer_workload(config),
        source=_OnDevice(batches, device),
        held_out=[_to(batch, device) for batch in held_out],
        fingerprint=dataset.fingerprint,
        description=dataset.description,
        unigram_entropy=dataset.unigram_entropy,
        flops_per_unit=flops_per_token(config.model, training.sequence_length),
        sampler=_sampler_of(config, dataset),
    )


def _sampler_of(config: Config, dataset: Dataset) -> Callable[[nn.Module], Callable[[int], str] | None]:
    tokenizer, settings = dataset.tokenizer, config.evaluation

    def sampler(model: nn.Module) -> Callable[[int], str] | None:
        if tokenizer is None or settings.sample_tokens == 0:
            return None
        assert isinstance(model, Transformer), "the built-in workload's model"
        return lambda step: write_text(model, tokenizer, config, seed=derive_seed(config.run.seed, "sample", step))

    return sampler


def write_text(model: Transformer, tokenizer: Tokenizer, config: Config, *, seed: int) -> str:
    """The config's prompt, and what the model makes of it."""
    settings = config.evaluation
    prompt = tokenizer.encode(settings.prompt).tolist() or [tokenizer.end_of_text or 0]
    device = model.embedding.weight.device
    new = sample(
        model,
        prompt,
        settings.sample_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        generator=torch.Generator(device).manual_seed(seed),
    )
    return tokenizer.decode([*prompt, *new])


def _user_material(config: Config, device: torch.device, code: CodeTarget) -> Material:
    workload = load_workload(code)
    source = GeneratedBatches(config, workload, device)
    count = -(-config.evaluation.sequences // config.training.micro_batch_size)
    return Material(
        workload=workload,
        source=source,
        held_out=[source.batch("held-out", index) for index in range(count)],
        fingerprint=str(code),
        description=f"batches of {code}",
    )


@dataclass(frozen=True)
class GeneratedBatches:
    """Micro-batches of a workload's own making, each from a generator of its own."""

    config: Config
    workload: Workload
    device: torch.device

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of step `step`, counted from 0."""
        return [self.batch("batch", step, index) for index in range(self.config.training.gradient_accumulation_steps)]

    def batch(self, *purpose: int | str) -> Batch:
        """The one that is for `purpose`, on the device."""
        generator = torch.Generator().manual_seed(derive_seed(self.config.run.seed, *purpose))
        return _to(self.workload.batch(generator), self.device)


@dataclass(frozen=True)
class _OnDevice:
    """Another source's micro-batches, on the device that computes with them."""

    source: BatchSource
    device: torch.device

    def micro_batches(self, step: int) -> list[Batch]:
        return [_to(batch, self.device) for batch in self.source.micro_batches(step)]


def _to(batch: Batch, device: torch.device) -> Batch:
    return tree_map(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, torch.Tensor) else leaf, batch)
