"""The audit: terms beside the ledger's counts, what adds up to the peak, and what it says where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_runs import simulate_on
from small_runs import masked_regression, small_config

from bptool.analysis.closed_forms.explanation import Explanation, explain
from bptool.analysis.machine import THIS_CPU, Machine
from bptool.analysis.memory.simulation import STEADY, simulate
from bptool.config.overrides import override
from bptool.instruments.memory.cpu_scratch import CpuScratch
from bptool.instruments.memory.trace import MemoryTrace
from bptool.training.workload import transformer_workload

GPT = {
    "model.norm": "layernorm",
    "model.position": "learned",
    "model.activation": "gelu",
    "model.bias": True,
    "model.d_ff": 64,
}
STATES = ["weights", "gradients", "optimizer state"]
SMALL_LOSS = {"model.vocab_size": 8, "model.n_layers": 4}
"""The peak is in a block and not in the loss."""
CASES: list[dict[str, object]] = [
    {},
    GPT,
    {"precision.mode": "bf16-mixed", "training.gradient_accumulation_steps": 3},
    {"precision.mode": "bf16", "model.tied_embeddings": False},
    {"training.loss": "plain", "precision.mode": "fp16-mixed", "optimizer.name": "muon"},
    {**SMALL_LOSS, "activation_checkpoint.policy": "full"},
    {**SMALL_LOSS, "activation_checkpoint.policy": "every_k", "optimizer.name": "adafactor"},
    {"training.micro_batch_size": 1, "optimizer.name": "sgd", "optimizer.implementation": "foreach"},
    {**GPT, "model.attention": "eager", "activation_checkpoint.policy": "every_k"},
]


class MatrixScratch(CpuScratch):
    """So many bytes for a product of matrices, and nothing for the rest: what oneDNN takes differs by CPU."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self.n_bytes = n_bytes

    def __call__(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
        return self.n_bytes if func is torch.ops.aten.mm.default else 0


WITHOUT_SCRATCH = Machine(cpu_scratch=MatrixScratch(0))


def traced(changes: Mapping[str, object] | None = None, machine: Machine = THIS_CPU) -> tuple[Explanation, MemoryTrace]:
    config = small_config(changes)
    trace = simulate(config, transformer_workload(config), machine)
    return explain(config, trace), trace


@pytest.mark.parametrize("changes", CASES, ids=lambda changes: "-".join(str(v) for v in changes.values()))
def test_every_term_is_the_ledgers_to_the_byte(changes: dict[str, object]) -> None:
    explanation, _ = traced(changes)
    assert {term.name: term.difference_bytes for term in explanation.terms if term.difference_bytes} == {}
    assert all(part.difference_bytes == 0 for term in explanation.terms for part in term.parts)
    assert len(explanation.terms) >= 8
    assert explanation.no_closed_form == []


@pytest.mark.parametrize("changes", CASES, ids=lambda changes: "-".join(str(v) for v in changes.values()))
def test_the_peak_is_all_there(changes: dict[str, object]) -> None:
    explanation, trace = traced(changes)
    peak = int(trace.live_bytes[trace.peak_event(STEADY)])
    assert explanation.peak_ledger_bytes == peak == sum(term.ledger_bytes for term in explanation.peak)
    assert explanation.peak_predicted_bytes == sum(term.predicted_bytes or 0 for term in explanation.peak)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        GPT,
        {"precision.mode": "bf16-mixed"},
        {"training.loss": "plain"},
        {"precision.mode": "bf16", "model.tied_embeddings": False},
        {"precision.mode": "bf16-mixed", "training.gradient_accumulation_steps": 2},
        {**GPT, "precision.mode": "bf16-mixed", "activation_checkpoint.policy": "full"},
        {"precision.mode": "fp16-mixed", "activation_checkpoint.policy": "every_k"},
    ],
)
def test_a_peak_in_the_loss_is_known_to_a_per_mille(changes: dict[str, object]) -> None:
    """What is left has a few scalars, targets and biases, where no kernel takes scratch."""
    explanation, _ = traced({"model.vocab_size": 256, **changes}, WITHOUT_SCRATCH)
    assert "blocks" not in explanation.peak_instant
    assert explanation.peak_predicted_bytes == pytest.approx(explanation.peak_ledger_bytes, rel=4e-3)


def test_a_kernels_scratch_is_in_the_rest() -> None:
    explanation, _ = traced({"model.vocab_size": 256}, Machine(cpu_scratch=MatrixScratch(100 * 1024)))
    rest = next(term for term in explanation.peak if term.name == "rest")
    assert explanation.peak_instant == "forward, aten.mm in loss"
    assert 100 * 1024 < rest.ledger_bytes < 101 * 1024
    assert rest.why.startswith("no closed form: aten.mm in loss (100.00 KiB)")


def test_scratch_can_move_the_peak_within_the_loss() -> None:
    """By hand: to a 16-bit product for the weights' gradient, beside the masked input; float32 logits are gone."""
    changes = {"model.vocab_size": 256, "precision.mode": "bf16-mixed"}
    explanation, _ = traced(changes, Machine(cpu_scratch=MatrixScratch(100 * 1024)))
    differences = {term.name: term.difference_bytes for term in explanation.peak}
    assert differences["logits"] == -4 * 32 * 256
    assert differences["the loss's operands"] == 2 * (32 * 16 + 256 * 16)
    operands = next(term for term in explanation.peak if term.name == "the loss's operands")
    assert operands.why == "the loss is at another of its products"


def test_a_peak_in_the_backward_of_a_recomputed_block() -> None:
    """By hand: 4 blocks' inputs and one block's worth; what the block at work has released is all that is missing."""
    explanation, _ = traced({**SMALL_LOSS, "activation_checkpoint.policy": "full"})
    assert explanation.peak_instant.startswith("backward")
    assert "blocks.0" in explanation.peak_instant
    blocks = next(term for term in explanation.peak if term.name == "blocks")
    worth = next(t for t in traced(SMALL_LOSS)[0].terms if t.name.startswith("activations of blocks."))
    stream = 4 * 2 * 16 * 16
    assert worth.predicted_bytes is not None
    assert blocks.predicted_bytes == worth.predicted_bytes - stream + 5056
    assert -worth.predicted_bytes < (blocks.difference_bytes or 0) < 0
    assert blocks.why.startswith("blocks.0 is at work")
    covered = [(t.predicted_bytes, t.ledger_bytes) for t in explanation.peak if t.predicted_bytes is not None]
    share = sum(min(both) for both in covered) / explanation.peak_ledger_bytes  # what is not there is not accounted for
    assert f"they account for {share:.2%} of" in explanation.verdict


def test_what_is_there_before_the_backwards_last_block() -> None:
    """By hand: three blocks' gradients and the last norm's; the embedding's output, the angles and a gradient wait."""
    explanation, _ = traced({**SMALL_LOSS, "activation_checkpoint.policy": "full"})
    predicted = {term.name: term.predicted_bytes for term in explanation.peak}
    block = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
    assert predicted["gradients"] == 4 * (3 * block + 16)
    assert predicted["outside of the blocks"] == 4 * (2 * 16 * 16 + 2 * 16 * 4 + 8 * 16)
    assert predicted["inputs"] == 2 * 8 * 2 * 16
    assert "logits" not in predicted


def test_a_tied_embeddings_gradients_at_its_backward() -> None:
    """A wide vocabulary and few tokens: the output's gradient and the embedding's are the peak, their sum in place."""
    wide = {"model.vocab_size": 200, "model.d_model": 64, "model.context_length": 8}
    explanation, _ = traced({**wide, "training.micro_batch_size": 1})
    assert explanation.peak_instant == "backward, aten.embedding_dense_backward in embedding"
    outside = next(term for term in explanation.peak if term.name == "outside of the blocks")
    assert outside.predicted_bytes == 2 * 4 * 200 * 64
    assert abs(outside.difference_bytes or 0) < 16


def test_what_no_closed_form_has_is_named_by_its_operation() -> None:
    explanation, trace = traced({"optimizer.implementation": "foreach", "model.d_model": 64, "model.context_length": 2})
    rest = next(term for term in explanation.peak if term.name == "rest")
    assert explanation.peak_instant.startswith("optimizer, aten._foreach")
    assert (rest.predicted_bytes, rest.difference_bytes, rest.formula) == (None, None, "")
    assert rest.why.startswith("no closed form: aten._foreach")
    assert rest.why in explanation.verdict
    live = trace.live_at(trace.peak_event(STEADY))
    assert max((a for a in live if a.category == "temporaries"), key=lambda a: a.n_bytes).op in rest.why


class TestDisagreement:
    """A ledger that counts otherwise is told of, at the tensor."""

    config = small_config({"precision.mode": "bf16-mixed"})

    def altered(self, op: str, module: str, n_bytes: int) -> Explanation:
        trace = simulate(self.config, transformer_workload(self.config))
        index = max(i for i, a in enumerate(trace.allocations) if (a.op, a.module) == (op, module))
        allocations = list(trace.allocations)
        allocations[index] = replace(allocations[index], n_bytes=n_bytes)
        return explain(self.config, MemoryTrace(allocations, trace.events))

    def test_a_larger_tensor_in_a_block(self) -> None:
        before = 2 * 2 * 16 * 32  # the 16-bit output of silu
        explanation = self.altered("aten.silu", "blocks.0.feed_forward", before + 1000)
        block = next(term for term in explanation.terms if term.name == "activations of blocks.0")
        assert block.difference_bytes == 1000
        missing, unforeseen = (part for part in block.parts if part.difference_bytes != 0)
        assert (missing.ledger_bytes, missing.why.split(":")[0]) == (0, "the ledger has no such tensor")
        assert (unforeseen.ledger_bytes, unforeseen.predicted_bytes) == (before + 1000, None)
        assert unforeseen.why == "aten.silu made it; no closed form has it"
        assert unforeseen.why in block.why
        assert "activations of blocks.0 differs by +1,000 B" in explanation.verdict

    def test_agreement_is_said(self) -> None:
        assert explain(self.config, simulate(self.config, transformer_workload(self.config))).verdict.startswith(
            "8 of 8 closed forms agree with the ledger to the byte. At the peak they account for "
        )


class TestCuda:
    """Under CUDA's stand-in, whose record is rounded up to 512 bytes."""

    @pytest.mark.parametrize("gpu", ["a100-80gb", "h100"])
    @pytest.mark.parametrize(
        "changes",
        [
            {"precision.mode": "bf16-mixed"},
            {"precision.mode": "bf16", "model.n_kv_heads": 1},
            {**GPT, "precision.mode": "bf16-mixed", "model.dropout": 0.1},
            {**GPT, "precision.mode": "fp32", "model.context_length": 20},
            {"precision.mode": "fp32", "model.n_kv_heads": 1, "model.qk_norm": True},
            {**GPT, "precision.mode": "fp16-mixed", "model.attention": "eager", "activation_checkpoint.policy": "full"},
        ],
    )
    def test_each_tensor_is_found(self, gpu: str, changes: dict[str, object]) -> None:
        changes = {"model.vocab_size": 600, **changes}
        config = small_config(changes)
        explanation = explain(config, simulate_on(gpu, transformer_workload(config), changes), "cuda")
        kept = [term for term in explanation.terms if term.name.startswith("activations")]
        parts = [part for term in kept for part in term.parts]
        assert [part.name for part in parts if part.predicted_bytes is None or part.ledger_bytes == 0] == []
        assert all(0 <= (part.difference_bytes or 0) < 512 for part in parts)
        assert all(term.why.startswith("CUDA's allocator rounds") for term in kept if term.difference_bytes)

    def test_heads_that_flash_attention_pads(self) -> None:
        changes = {"model.head_dim": 12, "precision.mode": "bf16"}
        config = small_config(changes)
        explanation = explain(config, simulate_on("a100-80gb", transformer_workload(config), changes), "cuda")
        assert explanation.no_closed_form == [
            "model.head_dim = 12, which CUDA's attention kernels do not take as it is",
        ]
        assert sum(term.ledger_bytes for term in explanation.peak) == explanation.peak_ledger_bytes


class TestWhatHasNoClosedForm:
    def test_an_unknown_setting(self) -> None:
        """Only what follows from the parameters that the ledger saw.

        The output weights' gradient, which the loss's forward makes, becomes the tied embedding's own.
        """
        explanation, _ = traced({"model.norm": "none", "optimizer.name": "muon"}, WITHOUT_SCRATCH)
        assert explanation.no_closed_form == ["model.norm = 'none'"]
        assert [term.name for term in explanation.terms] == STATES
        assert all(term.difference_bytes == 0 for term in explanation.terms)
        assert explanation.verdict.endswith("No closed form for model.norm = 'none'.")
        held = {term.name: term.predicted_bytes is not None for term in explanation.peak}
        predicted = {"weights": True, "optimizer state": True}
        assert held == {**predicted, **dict.fromkeys(("gradients", "inputs", "activations", "rest"), False)}
        assert sum(term.ledger_bytes for term in explanation.peak) == explanation.peak_ledger_bytes

    def test_a_users_own_module(self) -> None:
        config = override(small_config(), {"run.workload": "my_model.py:perceptron"})
        explanation = explain(config, simulate(config, masked_regression()))
        assert [(t.name, t.predicted_bytes, t.ledger_bytes) for t in explanation.terms] == [
            ("weights", 4 * 32, 4 * 32),
            ("gradients", 4 * 32, 4 * 32),
            ("optimizer state", 8 * 32 + 4 * 4, 8 * 32 + 4 * 4),
        ]
        assert explanation.no_closed_form == ["the activations of my_model.py:perceptron"]
        assert explanation.literature == []

    def test_frozen_parameters_are_why(self) -> None:
        workload = masked_regression()

        def model() -> object:
            perceptron = workload.model()
            next(perceptron.children()).requires_grad_(False)  # 3 x 5 + 5 of 32
            return perceptron

        config = override(small_config(), {"run.workload": "my_model.py:perceptron"})
        explanation = explain(config, simulate(config, replace(workload, model=model)))  # type: ignore[arg-type]
        gradients = explanation.terms[1]
        assert gradients.difference_bytes == -4 * 20
        assert gradients.why.startswith("parameters that are not trained")


class TestLiterature:
    def test_a_gpt_layer_beside_the_papers(self) -> None:
        explanation, _ = traced({**GPT, "precision.mode": "bf16-mixed"})
        sbh = 16 * 2 * 16
        assert [term.predicted_bytes for term in explanation.literature] == [34 * sbh + 5 * 2 * 16 * 16 * 2, 34 * sbh]
        assert explanation.literature[0].why.startswith("fused attention keeps no scores; there is no dropout; ")
        assert (
            "under autocast the residual stream stays float32 (4.00 KiB of such tensors)"
            in explanation.literature[0].why
        )

    def test_recomputed_and_other_layers(self) -> None:
        recomputed, _ = traced({**GPT, "activation_checkpoint.policy": "full"})
        assert [term.predicted_bytes for term in recomputed.literature] == [2 * 16 * 2 * 16]
        assert traced()[0].literature == []


def test_bytes_a_parameter_of_mixed_precision() -> None:
    """Weights of linear layers are copied, embeddings and norms are not."""
    explanation, _ = traced({"precision.mode": "bf16-mixed"})
    *lasting, copies = explanation.bytes_per_parameter
    assert [row.lasting for row in lasting] == [True, True, True]
    linear = 2 * (4 * 16 * 16 + 3 * 16 * 32)
    every = linear + 32 * 16 + 5 * 16
    assert copies.per_parameter_bytes == pytest.approx(2 * linear / every)
    assert not copies.lasting


def test_it_is_json_and_back() -> None:
    explanation, _ = traced(GPT)
    assert Explanation.model_validate_json(explanation.model_dump_json()) == explanation
