"""A Llama of `transformers`: no mask is simulated where a real step makes none."""

from __future__ import annotations

from typing import Any

import torch
from allocator_events import measured_peak
from small_runs import small_config
from torch import nn

from bptool.analysis.memory.simulation import STEADY, simulate
from bptool.instruments.packed_sequences import taken_for_unpacked
from bptool.training.workload import Workload


def llama() -> Workload:
    from transformers import LlamaConfig, LlamaForCausalLM

    def batch(generator: torch.Generator) -> dict[str, Any]:
        ids = torch.randint(100, (2, 48), generator=generator)
        return {"input_ids": ids, "labels": ids}

    def loss(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        value: torch.Tensor = model(**batch).loss
        return value

    shape = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "use_cache": False, "attn_implementation": "sdpa"}
    return Workload(model=lambda: LlamaForCausalLM(LlamaConfig(**shape, **heads)), batch=batch, loss=loss)


def test_the_prediction_is_the_allocators() -> None:
    config, workload = small_config(), llama()
    trace = simulate(config, workload)
    assert not [a for a in trace.allocations if a.tensor.endswith("[2, 1, 48, 48]")]
    assert int(trace.live_bytes[trace.peak_event(STEADY)]) == measured_peak(config, workload)


def test_afterwards_it_looks_again() -> None:
    from transformers import masking_utils

    packed = torch.tensor([[0, 1, 2, 0, 1]])
    with taken_for_unpacked():
        assert masking_utils.find_packed_sequence_indices(packed) is None
    assert masking_utils.find_packed_sequence_indices(packed).tolist() == [[0, 0, 0, 1, 1]]
