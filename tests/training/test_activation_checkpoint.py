"""Every policy gives the gradient of `none` to the bit, and computes again what it is said to, no more and no less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_models import bert, gpt2, llama
from small_runs import CPU, Recorder, random_batches, same_bits, small_config, transformer_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bptool.config.schema import ActivationCheckpointSettings
from bptool.errors import TargetError
from bptool.training.activation_checkpoint import recomputed_blocks
from bptool.training.assembly import build_step
from bptool.training.instrument import Announcer, Instrument, Phase
from bptool.training.step import TrainStep
from bptool.training.workload import Workload

WHOLE: list[tuple[dict[str, object], list[int]]] = [
    ({"policy": "none"}, []),
    ({"policy": "full"}, [0, 1, 2, 3, 4]),
    ({"policy": "every_k"}, [0, 2, 4]),
    ({"policy": "every_k", "every": 3}, [0, 3]),
    ({"policy": "every_k", "every": 9}, [0]),
    ({"policy": "plan", "plan": "full+3*none+full"}, [0, 4]),
]
MIXED_PLAN = {"policy": "plan", "plan": "full+attention+save_matmuls+none+mlp"}
POLICIES: list[dict[str, Any]] = [
    *(settings for settings, _ in WHOLE[1:]),
    *({"policy": policy} for policy in ("attention", "mlp", "save_attention", "offload")),
    *({"policy": policy} for policy in ("save_matmuls", "save_every_other_matmul")),
    MIXED_PLAN,
    {"policy": "plan", "plan": "3*save:addmm-1-4.mm-1-4+2*save:native_dropout-1.addmm-2.mm-2.attention-1"},
]
EXPERTS: dict[str, Any] = {
    "model.moe.n_experts": 4,
    "model.moe.d_expert": 16,
    "model.moe.n_shared": 1,
    "model.moe.n_dense_layers": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model.n_kv_heads": 1, "model.qk_norm": True},
    "gpt": {
        "model.norm": "layernorm",
        "model.position": "learned",
        "model.activation": "gelu",
        "model.bias": True,
    },
    "written out": {"model.attention": "eager", "model.post_norm": True},
    "experts": EXPERTS,
    "latent": {"model.mla.kv_rank": 8, "model.mla.q_rank": 8},
    "autocast": {"precision.mode": "bf16-mixed"},
}


def keys(settings: Mapping[str, object]) -> dict[str, object]:
    return {f"activation_checkpoint.{key}": value for key, value in settings.items()}


def words(settings: object) -> str:
    return " ".join(str(value) for value in settings.values()) if isinstance(settings, dict) else str(settings)


def step_of(changes: Mapping[str, object], *instruments: Instrument) -> TrainStep:
    return transformer_step(small_config({"model.n_layers": 5, **changes}), *instruments)


def gradient(step: TrainStep) -> dict[str, Tensor]:
    """Of two micro-batches."""
    torch.manual_seed(5)  # of the dropout
    step.accumulate(random_batches(step, 1, 2), [1, 1])
    return {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}


class Recomputed(TorchDispatchMode, Instrument):
    """Counts the operations of recomputations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self._recomputing = False

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        return self._phase(name)

    @contextmanager
    def _phase(self, name: Phase) -> Iterator[None]:
        before, self._recomputing = self._recomputing, name == "recompute"
        try:
            yield
        finally:
            self._recomputing = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func.overloadpacket)] += self._recomputing
        return func(*args, **(kwargs or {}))


def recomputed(policy: str, changes: Mapping[str, object] | None = None) -> Counter[str]:
    """Operations that one block's recomputation runs."""
    watch = Recomputed()
    settings = {"model.n_layers": 1, "activation_checkpoint.policy": policy, **(changes or {})}
    step = transformer_step(small_config(settings), watch)
    with watch:
        step.accumulate(random_batches(step, 1), [1])
    return watch.counts


MATMUL, ATTENTION = "aten.mm", "aten._scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(("settings", "blocks"), WHOLE, ids=words)
def test_which_blocks(settings: dict[str, Any], blocks: list[int]) -> None:
    """By the settings, and by how often a block's attention really runs in one forward and backward."""
    assert recomputed_blocks(5, ActivationCheckpointSettings(**settings)) == blocks

    step, runs = step_of(keys(settings)), [0] * 5

    def count(index: int) -> None:
        runs[index] += 1

    for index, block in enumerate(step.workload.blocks(step.model)):
        attention = block.get_submodule("attention")
        attention.register_forward_pre_hook(lambda module, inputs, index=index: count(index))
    step.accumulate(random_batches(step, 1), [1])
    assert runs == [2 if index in blocks else 1 for index in range(5)]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_the_same_to_the_bit(family: str, dropout: float) -> None:
    changes = {**FAMILIES[family], "model.dropout": dropout}
    plain = gradient(step_of(changes))
    different = [words(one) for one in POLICIES if not same_bits(gradient(step_of(changes | keys(one))), plain)]
    assert different == []


@pytest.mark.parametrize("foreign", [gpt2, llama, bert], ids=["gpt2", "llama", "bert"])
def test_so_it_is_for_models_of_other_makers(foreign: Callable[[], Workload]) -> None:
    """GPT-2 and BERT drop out, at their own rates."""

    def found(policy: str) -> dict[str, Tensor]:
        config = small_config({"activation_checkpoint.policy": policy})
        return gradient(build_step(config, foreign(), CPU, Announcer()))

    plain = found("none")
    policies = ["full", "attention", "save_matmuls", "save_every_other_matmul", "save_attention", "offload"]
    policies += ["mlp"] if foreign is not bert else []  # which has none: `intermediate` and `output`
    assert [policy for policy in policies if not same_bits(found(policy), plain)] == []


def test_dropout_was_on() -> None:
    step = step_of({"model.dropout": 0.2})
    first = {name: value.clone() for name, value in gradient(step).items()}
    step.optimizers.zero_grad()
    torch.manual_seed(6)
    step.accumulate(random_batches(step, 1, 2), [1, 1])
    assert not same_bits({n: p.grad for n, p in step.model.named_parameters() if p.grad is not None}, first)


def test_parameters_keep_the_plain_models_names() -> None:
    plain, mixed = step_of({}), step_of(keys(MIXED_PLAN))
    assert list(mixed.model.state_dict()) == list(plain.model.state_dict())
    assert [name for name, _ in mixed.model.named_parameters()] == [name for name, _ in plain.model.named_parameters()]


@pytest.mark.parametrize("policy", ["attention", "mlp", "save_attention", "save_matmuls", "save_every_other_matmul"])
def test_a_recomputation_is_a_phase_in_the_backward(policy: str) -> None:
    recorder = Recorder()
    step = step_of({"activation_checkpoint.policy": policy}, recorder)
    step.accumulate(random_batches(step, 1), [1])
    assert recorder.events == ["+forward", "-forward", "+backward", *["+recompute", "-recompute"] * 5, "-backward"]


class TestWhatIsComputedAgain:
    """A block has seven products (query, key, value, output, gate, up, down); the last one's result no backward reads,
    so a recomputation stops before it."""

    @pytest.mark.parametrize(
        ("policy", "matmuls", "attentions"),
        [
            ("none", 0, 0),
            ("full", 6, 1),
            ("save_attention", 6, 0),
            ("save_matmuls", 0, 0),
            ("save_every_other_matmul", 3, 0),
            ("attention", 3, 1),
            ("mlp", 2, 0),
        ],
    )
    def test_products_and_attention(self, policy: str, matmuls: int, attentions: int) -> None:
        found = recomputed(policy)
        assert (found[MATMUL], found[ATTENTION]) == (matmuls, attentions)

    def test_selective_policies_do_compute_the_rest(self) -> None:
        assert recomputed("save_matmuls")["aten.silu"] == recomputed("full")["aten.silu"] == 1

    def test_attention_written_out_is_products(self) -> None:
        """Scores, and their sum of values."""
        eager = {"model.attention": "eager"}
        assert recomputed("full", eager)["aten.bmm"] == recomputed("save_attention", eager)["aten.bmm"] == 2
        assert recomputed("save_matmuls", eager)["aten.bmm"] == 0

    def test_experts_have_products_too(self) -> None:
        """One for the router, and three for the experts; the last of these is read by their weighted sum."""
        experts = {"model.moe.n_experts": 4, "model.moe.d_expert": 16}
        assert recomputed("full", experts)["bptool.grouped_linear"] == 3
        assert recomputed("save_matmuls", experts)["bptool.grouped_linear"] == 0

    def test_evaluation_keeps_nothing(self) -> None:
        step = step_of({"activation_checkpoint.policy": "save_matmuls"})
        (batch,) = random_batches(step, 1)
        with torch.no_grad():
            loss = step.workload.loss(step.model, batch)
        assert same_bits({"": loss}, {"": step_of({}).workload.loss(step_of({}).model, batch)})


class Named(nn.Module):
    """A block of a user's, with modules of the given names."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.names = list(modules)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = x + torch.tanh(self.get_submodule(name)(x))
        return x


class SelfAttention(nn.Linear):
    """By its class."""


def own(policy: str, block: Callable[[], nn.Module], *instruments: Instrument) -> TrainStep:
    def batch(generator: torch.Generator) -> Tensor:
        return torch.randn(3, 4, generator=generator)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return F.mse_loss(model(x), x)

    workload = Workload(lambda: nn.Sequential(block(), block()), batch, loss)
    config = small_config({"activation_checkpoint.policy": policy})
    return build_step(config, workload, CPU, Announcer(instruments))


class TestSublayersOfAUsersModule:
    @pytest.mark.parametrize("name", ["attn", "self_attn", "attention", "SelfAttention", "cross_attention"])
    def test_attention_is_found_by_its_name(self, name: str) -> None:
        self.check("attention", lambda: Named(attn_norm=nn.LayerNorm(4), **{name: nn.Linear(4, 4)}))

    @pytest.mark.parametrize("name", ["mlp", "feed_forward", "ffn", "ff", "moe", "block_sparse_moe", "experts"])
    def test_so_is_the_feed_forward(self, name: str) -> None:
        self.check("mlp", lambda: Named(ln_mlp=nn.LayerNorm(4), **{name: nn.Linear(4, 4)}))

    def test_or_by_its_class_and_further_down(self) -> None:
        self.check("attention", lambda: Named(norm=nn.LayerNorm(4), layer=nn.Sequential(SelfAttention(4, 4))))

    @staticmethod
    def check(policy: str, block: Callable[[], nn.Module]) -> None:
        """One linear layer is computed again in each block, and no norm."""
        watch = Recomputed()
        step = own(policy, block, watch)
        with watch:
            found = gradient(step)
        assert watch.counts["aten.native_layer_norm"] == 0
        assert watch.counts["aten.addmm"] == 0  # its result is not read, so nothing is left to do
        assert watch.counts["aten.t"] == 2 * 2
        assert same_bits(found, gradient(own("none", block)))

    def test_where_there_is_none_the_blocks_modules_are_named(self) -> None:
        with pytest.raises(TargetError, match=r"policy=mlp: no module of a Named is called so; it has attn \(Linear\)"):
            own("mlp", lambda: Named(attn=nn.Linear(4, 4)))

    def test_a_plan_of_another_length_is_refused(self) -> None:
        config = small_config({"run.workload": "own.py:model", **keys(MIXED_PLAN)})
        workload = Workload(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), lambda g: None, lambda m, b: m(b))
        with pytest.raises(TargetError, match="is for 5 blocks; the model has 2"):
            build_step(config, workload, CPU, Announcer())
