"""What a forward keeps, in closed form: against the ledger tensor by tensor, and against autograd's own word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product

import pytest
import torch
from small_runs import random_batches, small_config, transformer_step

from bptool.analysis.closed_forms.moments import end_of_forward
from bptool.analysis.closed_forms.saved_tensors import (
    RNG_STATE_BYTES,
    SCALE,
    after_saved,
    before_saved,
    block_saved,
    recomputed_saved,
)
from bptool.analysis.memory.simulation import simulate
from bptool.config.schema import Config
from bptool.training.workload import transformer_workload

GPT: dict[str, object] = {
    "model.norm": "layernorm",
    "model.position": "learned",
    "model.activation": "gelu",
    "model.bias": True,
}
LLAMA: dict[str, object] = {"model.norm": "rmsnorm", "model.position": "rope", "model.activation": "swiglu"}
ARCHITECTURES: list[dict[str, object]] = [
    GPT,
    LLAMA,
    {"model.norm": "layernorm", "model.position": "none", "model.activation": "relu", "model.qk_norm": True},
    {**GPT, "model.attention": "eager", "model.dropout": 0.1},
    {**GPT, "model.dropout": 0.1},
    {**LLAMA, "model.n_kv_heads": 2, "model.head_dim": 6, "model.tied_embeddings": False},
    {**LLAMA, "model.n_kv_heads": 2, "model.qk_norm": True, "model.attention": "eager", "training.loss": "plain"},
]
# No two sizes are alike, so that a tensor is known by its size.
_SHAPE: dict[str, object] = {
    "model.n_layers": 3,
    "model.d_model": 32,
    "model.n_heads": 4,
    "model.d_ff": 48,
    "model.vocab_size": 40,
    "model.context_length": 12,
    "training.micro_batch_size": 3,
}


def shaped(changes: Mapping[str, object]) -> Config:
    return small_config({**_SHAPE, **changes})


def assert_ledger_agrees(config: Config) -> None:
    """Block by block, the same sizes made by the same modules; outside of them the same sizes."""
    trace = simulate(config, transformer_workload(config))
    moment = end_of_forward(trace)
    # torch 2.11 keeps empty tensors of a recomputed block too.
    kept = [a for a in trace.live_at(moment.event) if a.phase == "forward" and a.born >= moment.since and a.n_bytes]
    for index in range(config.model.n_layers):
        block = f"blocks.{index}"
        predicted = Counter((f"{block}.{s.module}".rstrip("."), s.size.n_bytes) for s in block_saved(config, index))
        assert predicted == Counter((a.module, a.n_bytes) for a in kept if f"{a.module}.".startswith(f"{block}."))
    outside = [*before_saved(config), *after_saved(config)]
    assert Counter(s.size.n_bytes for s in outside) == Counter(
        a.n_bytes for a in kept if not a.module.startswith("blocks.")
    )


@pytest.mark.parametrize("mode", ["fp32", "bf16-mixed", "bf16", "fp16-mixed"])
@pytest.mark.parametrize("changes", ARCHITECTURES, ids=lambda changes: "-".join(str(v) for v in changes.values()))
def test_the_ledger_holds_the_same_tensors(changes: dict[str, object], mode: str) -> None:
    assert_ledger_agrees(shaped({**changes, "precision.mode": mode}))


@pytest.mark.parametrize(
    ("policy", "mode"), list(product(["full", "every_k"], ["fp32", "bf16"])), ids=lambda value: str(value)
)
def test_recomputed_blocks_keep_their_input(policy: str, mode: str) -> None:
    assert_ledger_agrees(shaped({**LLAMA, "activation_checkpoint.policy": policy, "precision.mode": mode}))


def test_a_recomputed_blocks_scale_is_kept_from_the_first_time() -> None:
    """The hooks that checkpoint() drops tensors with are not shown a Python number."""
    assert_ledger_agrees(shaped({**ARCHITECTURES[3], "activation_checkpoint.policy": "full"}))


def test_each_micro_batch_keeps_the_same() -> None:
    assert_ledger_agrees(shaped({**LLAMA, "training.gradient_accumulation_steps": 3, "precision.mode": "bf16-mixed"}))


def test_a_recomputed_block_keeps_its_input_and_a_random_state() -> None:
    """4 bytes x 3 sequences x 12 tokens x 32; the paper's 2 bytes are those of a 16-bit stream."""
    config = shaped({"activation_checkpoint.policy": "full"})
    assert [s.size.n_bytes for s in block_saved(config, 1)] == [torch.get_rng_state().nbytes, 4 * 3 * 12 * 32]
    assert torch.get_rng_state().nbytes == RNG_STATE_BYTES
    plain = shaped({})
    assert recomputed_saved(config) == block_saved(plain, 1)[:-1]


def saved_for_backward(config: Config) -> int:
    """Bytes that autograd saves in a real forward, each storage once, parameters and inputs aside.

    Python numbers are not among them: no hook is shown those.
    """
    step = transformer_step(config)
    (batch,) = random_batches(step, 0)
    known = {t.untyped_storage().data_ptr() for t in [*step.model.parameters(), *batch.values()]}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), step.precision.autocast():
        step.workload.loss(step.model, batch)
    return sum(storage.nbytes() for storage in saved.values())


def all_saved(config: Config) -> Iterator[int]:
    blocks = (saved for index in range(config.model.n_layers) for saved in block_saved(config, index))
    for saved in [*before_saved(config), *blocks, *after_saved(config)]:
        if saved.name not in ("loss", SCALE):
            yield saved.size.n_bytes


@pytest.mark.parametrize("mode", ["fp32", "bf16-mixed", "bf16"])
@pytest.mark.parametrize("changes", [GPT, LLAMA, ARCHITECTURES[3]])
def test_autograd_saves_the_same_bytes(changes: dict[str, object], mode: str) -> None:
    """On a CPU that computes, without our ledger."""
    config = shaped({**changes, "precision.mode": mode})
    assert sum(all_saved(config)) == saved_for_backward(config)


def test_a_gpt_layer_in_pure_16_bits_beside_the_paper() -> None:
    """By hand, with written-out attention and dropout, in bf16; the paper's 34 s b h + 5 a s^2 b and what differs.

    The paper: 2 for each norm's input, 2 for q k v's input, 2 each for q, k and v, 2 for the output layer's input, 2
    for the MLP's, 8 for GELU's, 8 for down's, and two masks of 1; here the masks are noise of 2 bytes. Of each score
    the paper has 2 + 1 + 2 bytes; here the softmax is float32, its noise and the rest have 2 each. The scale of the
    scores is a number of 8 bytes.
    """
    config = shaped(
        {**GPT, "model.d_ff": 128, "model.attention": "eager", "model.dropout": 0.1, "precision.mode": "bf16"}
    )
    sbh, scores = 12 * 3 * 32, 4 * 12 * 12 * 3
    statistics, future = 4 * 2 * 12 * 3, 12 * 12
    ours = (34 + 2) * sbh + (4 + 2 + 2) * scores + statistics + future + 8
    assert sum(s.size.n_bytes for s in block_saved(config, 1)) == ours
