"""Counted FLOPs against closed forms, to the FLOP; and a deep model's from shallow ones against its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from small_runs import question_of, random_batches, small_config, transformer_step
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bptool.analysis.activation_budget.planning import with_plan
from bptool.analysis.like_blocks import Blocks, Lengths, Stretch
from bptool.analysis.machine import Machine, machine_named
from bptool.analysis.profile.counting import count, count_deep
from bptool.analysis.profile.depth import extended
from bptool.analysis.profile.tally import Cost, Place, Tally
from bptool.config.schema import Config
from bptool.model.accounting import flops_per_token
from bptool.model.loss import chunk_tokens
from bptool.training.workload import Workload, transformer_workload

GPT = {
    "model.position": "learned",
    "model.norm": "layernorm",
    "model.activation": "gelu",
    "model.bias": True,
    "model.tied_embeddings": True,
}
LLAMA = {"model.n_heads": 4, "model.n_kv_heads": 2, "model.d_ff": 40}
MIXTURE = {**LLAMA, "model.moe.n_experts": 4, "model.moe.n_active": 2, "model.moe.d_expert": 24}
LATENT = {
    "model.n_heads": 2,
    "model.mla.kv_rank": 8,
    "model.mla.q_rank": 12,
    "model.mla.nope_dim": 8,
    "model.mla.rope_dim": 4,
    "model.mla.value_dim": 6,
}


class Split(NamedTuple):
    forward: int
    backward: int
    recompute: int


def counted(config: Config, machine: Machine | None = None) -> Tally:
    return count(config, transformer_workload(config), machine or Machine())


def split(tally: Tally) -> Split:
    return Split(tally.flops("forward"), tally.flops("dgrad", "wgrad"), tally.flops("recompute"))


def by_hand(config: Config) -> Split:
    """Of GPT and Llama blocks, from the shapes of their matrices.

    A layer's backward is two of its forwards; attention's fused kernel makes the scores again.
    """
    model, training = config.model, config.training
    rows = training.micro_batch_size * training.sequence_length * training.gradient_accumulation_steps
    products = products_of_a_block(config, rows)
    scores = products["scores"]
    others = sum(products.values()) - scores
    head = 2 * rows * model.d_model * model.vocab_size
    backward = 2 * others + scores * 5 // 2 if model.attention == "sdpa" else 2 * (others + scores)
    return Split(
        forward=model.n_layers * (others + scores) + head,
        backward=model.n_layers * backward + 2 * head,
        recompute=sum(made_again(policy, products, config) for policy in policies_of(config)),
    )


def products_of_a_block(config: Config, rows: int) -> dict[str, int]:
    """FLOPs of each in its forward, in order; `scores` are queries by keys and weights by values."""
    model = config.model
    query, kept = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    widths = {"query": (model.d_model, query), "key": (model.d_model, kept), "value": (model.d_model, kept)}
    attention = {name: 2 * rows * a * b for name, (a, b) in widths.items()}
    attention |= {"scores": 2 * 2 * rows * config.training.sequence_length * query}
    attention |= {"output": 2 * rows * query * model.d_model}
    if model.moe.n_experts:
        each = 2 * rows * model.moe.n_active * model.d_model * model.moe.d_expert
        router = 2 * rows * model.d_model * model.moe.n_experts
        return {**attention, "router": router, "gate": each, "up": each, "down": each}
    each = 2 * rows * model.d_model * model.d_ff
    gate = {"gate": each} if model.activation in ("swiglu", "geglu") else {}
    return {**attention, **gate, "up": each, "down": each}


def policies_of(config: Config) -> list[str]:
    """What each block does."""
    settings, depth = config.activation_checkpoint, config.model.n_layers
    if settings.policy == "plan":
        return [term.partition("*")[2] for term in settings.plan.split("+") for _ in range(int(term.partition("*")[0]))]
    if settings.policy == "every_k":
        return ["none" if block % settings.every else "full" for block in range(depth)]
    return [settings.policy] * depth


def made_again(policy: str, products: dict[str, int], config: Config) -> int:
    """FLOPs of a block's recomputation, which stops before the last product of what is recomputed: nothing needs it.

    A mixture's last one is needed, as the router's weights multiply it.
    """
    whole = {name: flops for name, flops in products.items() if name != "down" or config.model.moe.n_experts}
    order = [name for name in products if name != "scores"]
    made = {
        "none": (),
        "offload": (),
        "save_matmuls": (),
        "full": whole,
        "attention": ("query", "key", "value", "scores"),
        "mlp": set(whole) - {"query", "key", "value", "scores", "output"},
        "save_attention": set(whole) - {"scores"},
        "save_every_other_matmul": whole.keys() & set(order[1::2]),
    }
    return sum(products[name] for name in made[policy])


SETTINGS: list[dict[str, Any]] = [
    {**GPT},
    {**GPT, "training.loss": "plain", "model.attention": "eager"},
    {**GPT, "activation_checkpoint.policy": "full", "training.gradient_accumulation_steps": 3},
    {**GPT, "activation_checkpoint.policy": "every_k", "model.n_layers": 3, "precision.mode": "bf16-mixed"},
    {**LLAMA},
    {**LLAMA, "training.loss": "plain", "model.tied_embeddings": True},
    {**LLAMA, "model.attention": "eager", "activation_checkpoint.policy": "full"},
    {**LLAMA, "training.gradient_accumulation_steps": 2, "precision.mode": "bf16", "optimizer.name": "muon"},
    {**MIXTURE, "training.loss": "plain"},
    {**MIXTURE, "activation_checkpoint.policy": "full", "training.gradient_accumulation_steps": 4},
    *(
        {**shape, "activation_checkpoint.policy": policy}
        for shape in (GPT, LLAMA, MIXTURE)
        for policy in ("attention", "mlp", "save_matmuls", "save_every_other_matmul", "save_attention", "offload")
    ),
    {
        **LLAMA,
        "model.n_layers": 4,
        "activation_checkpoint.policy": "plan",
        "activation_checkpoint.plan": "1*full+2*save_attention+1*mlp",
    },
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_flops_are_the_closed_forms(changes: dict[str, Any]) -> None:
    config = small_config(changes)
    tally = counted(config)
    assert split(tally) == by_hand(config)
    assert tally.flops("dgrad") + tally.flops("wgrad") == by_hand(config).backward


def test_a_budget_is_counted_as_the_plan_that_it_is() -> None:
    """One block kept and the others recomputed, or so: what the plan says is what the closed form is of."""
    budget = {"activation_checkpoint.policy": "budget", "activation_checkpoint.budget": "150KiB"}
    config = with_plan(question_of(small_config({**LLAMA, "model.n_layers": 4, **budget}))).config
    assert config.activation_checkpoint.policy == "plan"
    assert len(set(policies_of(config))) > 1
    assert split(counted(config)) == by_hand(config)


def repeated(shape: Sequence[int], heads: int) -> tuple[int, ...]:
    """Of keys or values that several queries share, one for each query: torch 2.11 counts no others."""
    return (shape[0], heads, *shape[2:])


@pytest.mark.parametrize("policy", ["none", "full", "save_attention"])
@pytest.mark.parametrize("shape", [GPT, LLAMA, LATENT], ids=["gpt", "llama", "latent"])
def test_a_real_step_by_pytorchs_own_counter(shape: dict[str, Any], policy: str) -> None:
    """Which needs to be told of a CPU's attention (torch 2.13 counts 0)."""
    config = small_config({**shape, "activation_checkpoint.policy": policy, "training.loss": "plain"})
    step = transformer_step(config)
    kernel = "_scaled_dot_product_flash_attention_for_cpu"

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(q, *(repeated(x, q[1]) for x in (k, v))))

    def backward(slope: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_backward_flop_count(slope, q, *(repeated(x, q[1]) for x in (k, v))))

    formulas = {getattr(torch.ops.aten, kernel): forward, getattr(torch.ops.aten, f"{kernel}_backward"): backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step.accumulate(random_batches(step, 0), [1])
    assert sum(split(counted(config))) == counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [GPT, LLAMA, MIXTURE, LATENT, {**LLAMA, "model.sliding_window": 4, "model.sliding_window_pattern": 2}],
    ids=["gpt", "llama", "mixture", "latent", "window"],
)
def test_a_forward_is_a_third_of_palms_convention(changes: dict[str, Any]) -> None:
    """Attention counted in full, causal or not."""
    config = small_config(changes)
    tokens = config.training.micro_batch_size * config.training.sequence_length
    forward = counted(config).flops("forward")
    assert 3 * forward == tokens * flops_per_token(config.model, config.training.sequence_length)


@pytest.mark.parametrize("gpu", ["a100-80gb", "h100"])
def test_a_gpus_kernels_do_the_same_products(gpu: str) -> None:
    config = small_config({**GPT, "precision.mode": "bf16-mixed"})
    tally = counted(config, machine_named("cuda", gpu))
    assert split(tally) == by_hand(config)
    attention = {place.op for place in tally.costs if "attention" in place.op}
    assert attention
    assert not any(op.endswith("_for_cpu") for op in attention)


def test_micro_batches_that_are_not_run_are_counted() -> None:
    """Five, of which two are run, against five of five: the recorder's own sums."""
    config = small_config({"training.gradient_accumulation_steps": 5})
    one = small_config({})
    five, single = counted(config), counted(one)
    assert split(five) == Split(*(5 * flops for flops in split(single)))
    assert five.modules["blocks.0"].calls == 5
    assert five.flops("optimizer") == single.flops("optimizer")
    drawn = [cost for place, cost in five.costs.items() if place.op == "randint"]
    assert [cost.calls for cost in drawn] == [5]
    adds = {
        n: sum(cost.calls for place, cost in tally.costs.items() if place.phase == "backward" and place.op == "add_")
        for n, tally in ((5, five), (1, single))
    }
    parameters = sum(facts.trainable > 0 for facts in single.modules.values())
    assert adds[5] - 5 * adds[1] == 4 * parameters  # each further micro-batch adds to each gradient


def test_the_loss_in_chunks_counts_all_of_them() -> None:
    """Of which a count runs the first, for all that are like it, and the last, which is shorter."""
    config = small_config({"model.vocab_size": 1_500_000, "model.n_layers": 1, "model.d_model": 8})
    tally = counted(config)
    assert split(tally) == by_hand(config)
    chunks = -(-32 // chunk_tokens(32, 1_500_000, 8))
    products = {
        place.kind: cost.calls
        for place, cost in tally.costs.items()
        if place.module == "loss" and place.phase == "forward" and place.op in ("mm", "addmm") and cost.flops
    }
    assert chunks > 2
    assert products == {"forward": chunks, "dgrad": chunks, "wgrad": chunks}


class TestUpdate:
    def test_adamws_arithmetic(self) -> None:
        """14 a decayed parameter, 13 a vector's, one a tensor's step counter; clipping: norm 2, scaling 1."""
        config = small_config({"optimizer.name": "adamw", "optimizer.implementation": "fused"})
        tally = counted(config)
        vectors = 5 * 16
        matrices = 32 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32)  # embedding and head are one
        tensors = 1 + 2 * (4 + 3) + 5
        update = sum(cost.pointwise_flops for place, cost in tally.costs.items() if place.phase == "optimizer")
        assert update == 14 * matrices + 13 * vectors + tensors
        clip = sum(cost.pointwise_flops for place, cost in tally.costs.items() if place.phase == "clip")
        assert clip == 3 * (matrices + vectors) + 2 * tensors + CLIP_SCALARS

    def test_implementations_agree(self) -> None:
        found = {
            how: sum(
                cost.pointwise_flops
                for place, cost in counted(small_config({"optimizer.implementation": how})).costs.items()
                if place.phase == "optimizer"
            )
            for how in ("loop", "foreach", "fused")
        }
        assert len(set(found.values())) == 1


DEPTHS: list[dict[str, Any]] = [
    {**GPT, "model.n_layers": 6},
    {**LLAMA, "model.n_layers": 7, "activation_checkpoint.policy": "full", "training.gradient_accumulation_steps": 3},
    {**LLAMA, "model.n_layers": 8, "activation_checkpoint.policy": "every_k"},
    {**LLAMA, "model.n_layers": 11, "activation_checkpoint.policy": "every_k", "activation_checkpoint.every": 3},
    {**MIXTURE, "model.n_layers": 7},
    {**LLAMA, "model.n_layers": 11, "model.sliding_window": 4, "model.sliding_window_pattern": 3},
    *(
        {**LLAMA, "model.n_layers": 7, "activation_checkpoint.policy": policy}
        for policy in ("attention", "mlp", "save_matmuls", "save_every_other_matmul", "save_attention", "offload")
    ),
    {
        **LLAMA,
        "model.n_layers": 14,
        "activation_checkpoint.policy": "plan",
        "activation_checkpoint.plan": "7*full+7*save_attention",
    },
    {**LATENT, "model.n_layers": 6},
    {"model.n_layers": 6, "optimizer.name": "muon"},
    {"model.n_layers": 6, "optimizer.name": "adafactor", "optimizer.implementation": "loop"},
]


@pytest.mark.parametrize("changes", DEPTHS, ids=str)
def test_shallow_models_tell_what_a_deep_one_does(changes: dict[str, Any]) -> None:
    """Every number of every module and operation."""
    config = small_config(changes)
    workload = transformer_workload(config)
    deep = count_deep(config, workload)
    assert deep.depths
    assert max(deep.depths) < config.model.n_layers
    assert deep.tally == count(config, workload)


DEEP = Blocks((Stretch(20),))


class TestModelsThatAreNotPeriodic:
    @staticmethod
    def tally(cost: int) -> Tally:
        return Tally({Place("forward", "forward", "", "mm"): Cost(cost, 0, 0, 1)}, {})

    def test_are_counted_in_full(self) -> None:
        counts: list[int] = []

        def quadratic(lengths: Lengths) -> Tally:
            counts.append(sum(lengths))
            return self.tally(sum(lengths) ** 2)

        found = extended(DEEP, quadratic)
        assert found.depths == ()
        assert found.tally == self.tally(400)
        assert counts[-1] == 20

    def test_first_and_last_blocks_may_differ(self) -> None:
        def tally(lengths: Lengths) -> Tally:
            depth = sum(lengths)
            flops = [1, *[10] * (depth - 2), 100]
            places = [Place("forward", "forward", f"blocks.{i}.up", "mm") for i in range(depth)]
            return Tally({place: Cost(n, 0, 0, 1) for place, n in zip(places, flops, strict=True)}, {})

        found = extended(DEEP, tally)
        assert found.depths == (2, 3, 4)
        assert found.tally == tally((20,))

    def test_a_straight_line_is_followed(self) -> None:
        found = extended(DEEP, lambda lengths: self.tally(3 * sum(lengths) + 1))
        assert found.tally.flops("forward") == 61
        assert max(found.depths) < 6


def test_a_users_own_model_is_counted_as_it_is() -> None:
    workload = Workload(
        model=lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)),
        batch=lambda generator: torch.randn(5, 8, generator=generator),
        loss=lambda model, x: _sum(model(x)),
    )
    found = count_deep(small_config({"training.gradient_accumulation_steps": 3}), workload)
    first, second = 2 * 15 * 8 * 4, 2 * 15 * 4 * 2
    assert found.depths == ()
    assert split(found.tally) == Split(first + second, first + 2 * second, 0)


CLIP_SCALARS = 1
"""The norm is divided by the loss scale."""


def _sum(x: Tensor) -> Tensor:
    return x.square().sum()
