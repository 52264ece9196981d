"""Peaks that others measured on GPUs, against the same steps on the stand-in.

The benchmark is the one of transformers' SDPA pull requests: `zero_grad`, a forward in training mode, the sum of the
logits, its backward, again and again, and then `torch.cuda.max_memory_allocated`; their MB is 10^6 bytes. It can be
repeated where the modelling code is what it was: BERT's and DistilBERT's are, and GPT-2's but for two things, which are
put back. Their tables for OPT and GPT-NeoX can't: what these keep for the backward has changed since; ALBERT's is not
reproduced by either of the two ALBERTs that it may be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AttentionInterface,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bptool.gpus import gpu_named
from bptool.instruments.cuda.memory import cublas_workspace_bytes, cuda_scratch
from bptool.instruments.cuda.stand_in import standing_in_for_cuda
from bptool.instruments.memory.ledger import MemoryLedger

PUBLISHED: dict[str, Any] = json.loads(Path(__file__).with_name("published_cuda_peaks.json").read_text())

AttentionInterface.register("sdpa_unmasked", sdpa_attention_forward)  # no mask, as for real tensors without padding


class Bert(nn.Module):
    """Logits of a BERT base."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.model = BertForMaskedLM(BertConfig(attn_implementation=attention))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return (self.model(input_ids=ids).logits,)


class DistilBert(nn.Module):
    """Logits of a DistilBERT base."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.model = DistilBertForMaskedLM(DistilBertConfig(attn_implementation=attention))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        return (self.model(input_ids=ids).logits,)


class GPT2Large(nn.Module):
    """Logits of a GPT-2 large as in 2024: each layer had a mask of its own, and returned its keys and values.

    These were parts of the projection's result, which so outlived the backward.
    """

    def __init__(self, attention: str) -> None:
        super().__init__()
        config = GPT2Config(n_layer=36, n_embd=1280, n_head=20, attn_implementation=attention)
        self.model = GPT2LMHeadModel(config)
        self.returned: list[Tensor] = []
        for block in self.model.transformer.h:
            block.attn.register_buffer("mask", torch.ones(1024, 1024, dtype=torch.bool))
            block.attn.c_attn.register_forward_hook(lambda _, __, result: self.returned.append(result.detach()))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        logits = self.model(input_ids=ids, use_cache=False).logits
        returned, self.returned = self.returned, []
        return (logits, *returned)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def benchmarked_bytes(gpu_name: str, kind: type[nn.Module], *args: Any, shape: tuple[int, int]) -> int:
    """The peak of the second forward and backward; the first one's results live until the second's are there."""
    gpu = gpu_named(gpu_name)
    ledger = MemoryLedger(counts_host=False, scratch=cuda_scratch(gpu))
    with default_dtype(torch.float16), FakeTensorMode(), standing_in_for_cuda(gpu), ledger:
        model = kind(*args).train()
        ids = torch.zeros(shape, dtype=torch.long)
        for _ in range(2):
            begin = len(ledger.trace().events)
            model.zero_grad()
            outputs = model(ids)
            loss = outputs[0].sum()
            loss.backward()
        live = ledger.trace().rounded(512).live_bytes
    return int(live[begin:].max()) + cublas_workspace_bytes(gpu)


def predicted_bytes(model: str, attention: str, batch: int, tokens: int) -> int:
    """The peak of one of the published rows on the GPU that it was measured on."""
    kind = {"bert": Bert, "distilbert": DistilBert, "gpt2-large": GPT2Large}[model]
    implementation = {"eager": "eager", "sdpa": "sdpa_unmasked"}[attention]
    return benchmarked_bytes(PUBLISHED[model]["gpu"], kind, implementation, shape=(batch, tokens))
