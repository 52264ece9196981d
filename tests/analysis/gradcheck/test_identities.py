"""The identities hold on models that are right, and each one fails, alone, on a model that is broken where it looks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import foreign_models
import pytest
import torch
import torch.nn.functional as F
from small_runs import masked_regression, small_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bptool.analysis.gradcheck.identities.check import check_identities, observed_identities
from bptool.analysis.gradcheck.identities.identity import Identities, Identity, agree, agree_as_one
from bptool.model import attention, loss
from bptool.model.transformer import Block, Transformer
from bptool.training import activation_checkpoint
from bptool.training.optimizers import GradientDescent
from bptool.training.step import TrainStep
from bptool.training.workload import Batch, Workload, transformer_workload

NAMES = [
    "logits_gradient",
    "residual_paths",
    "attention_query_gradient",
    "attention_key_gradient",
    "attention_value_gradient",
    "layer_order",
    "accumulation",
    "activation_checkpointing",
    "clipping_norm",
    "gradient_descent_update",
]
GEMMA = {
    "model.attention_softcap": 3.0,
    "model.logit_softcap": 5.0,
    "model.n_kv_heads": 1,
    "model.sliding_window": 5,
    "model.norm": "rmsnorm-offset",
    "model.post_norm": True,
}
DEEPSEEK = {"model.mla.kv_rank": 8, "model.moe.n_experts": 4, "model.moe.router": "sigmoid"}
GPT2 = {"model.norm": "layernorm", "model.position": "learned", "model.bias": True, "model.dropout": 0.2}
MODELS: dict[str, dict[str, object]] = {
    "default": {},
    "gpt2": GPT2,
    "grouped": {"model.n_heads": 4, "model.n_kv_heads": 2, "model.qk_norm": True},
    "gemma": GEMMA,
    "gemma, plain loss": {**GEMMA, "training.loss": "plain"},
    "deepseek": DEEPSEEK,
    "eager": {"model.attention": "eager", "model.tied_embeddings": False},
    "window": {"model.sliding_window": 4, "model.sliding_window_pattern": 2},
    "no residual": {"model.residual": False},
    "no norm": {"model.norm": "none"},
    "scaled": {"model.query_scale_dim": 50, "model.init_std": 0.5},
}


def of_transformer(changes: dict[str, object] | None = None, seed: int = 3) -> Identities:
    config = small_config(changes)
    return check_identities(config, transformer_workload(config), built_in=True, seed=seed)


def failed(found: Identities) -> list[str]:
    return [identity.name for identity in found.identities if not identity.holds]


def named(found: Sequence[Identity], name: str) -> Identity:
    (identity,) = (identity for identity in found if identity.name == name)
    return identity


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_they_hold(changes: dict[str, object]) -> None:
    found = of_transformer(changes)
    assert [identity.name for identity in found.identities] == NAMES
    assert failed(found) == []
    assert all(identity.relative_error <= identity.tolerance for identity in found.identities)
    assert found.left_out == []


def test_tolerances_are_tight() -> None:
    """Float64's rounding, but for clipping, which reads its norm in float32 once."""
    for identity in of_transformer().identities:
        assert identity.tolerance < (2e-7 if identity.name == "clipping_norm" else 1e-11)


class TestLogits:
    def test_the_figure_is_the_gradients_norm(self) -> None:
        """By hand: the logits of an untrained model are nearly 0, so softmax - one-hot is nearly 1/V - one-hot."""
        vocabulary, tokens = 32, 2 * 16
        counted = tokens - math.ceil(tokens / 5)
        norm = math.sqrt((1 - 1 / vocabulary) ** 2 + (vocabulary - 1) / vocabulary**2) / math.sqrt(counted)
        identity = named(of_transformer().identities, "logits_gradient")
        assert identity.figures["gradient_norm"] == pytest.approx(norm, rel=0.01)
        assert identity.figures["largest_row_sum"] < 1e-15
        assert f"{counted} counted tokens" in identity.detail

    def test_a_forgotten_token_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The mean over all tokens, the ignored ones too: in the loss and its gradient alike. Accumulation by counted
        tokens is then another gradient, too."""
        monkeypatch.setattr(loss, "_count", lambda targets_N: torch.tensor(targets_N.numel()))
        assert failed(of_transformer()) == ["logits_gradient", "accumulation"]

    @pytest.mark.parametrize("kind", ["plain", "fused"])
    def test_a_scale_of_half_a_thousandth(self, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        right = loss.NextTokenLoss.forward
        monkeypatch.setattr(loss.NextTokenLoss, "forward", lambda *inputs: right(*inputs) * 1.0005)
        found = of_transformer({"training.loss": kind})
        assert failed(found) == ["logits_gradient"]
        assert named(found.identities, "logits_gradient").relative_error == pytest.approx(0.0005, rel=1e-3)

    def test_a_softcap_without_its_slope(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def without(logits_CV: Tensor, targets_C1: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
            return losses_and_slopes(softcap * torch.tanh(logits_CV / softcap), targets_C1)

        losses_and_slopes = loss._losses_and_slopes
        monkeypatch.setattr(loss, "_softcapped_losses_and_slopes", without)
        assert failed(of_transformer({"model.logit_softcap": 0.1})) == ["logits_gradient"]

    def test_a_gradient_for_ignored_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As a fused loss makes where it forgets to mask."""
        right = loss._LinearCrossEntropy.backward

        def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
            x_ND, *rest = right(ctx, slope)
            assert x_ND is not None
            x_ND[0] += 1e-9  # token 0 is ignored
            return x_ND, *rest

        monkeypatch.setattr(loss._LinearCrossEntropy, "backward", staticmethod(backward))
        found = named(of_transformer().identities, "logits_gradient")
        assert not found.holds
        assert "at [0, " in found.detail


class TestResidual:
    def test_the_norms_of_both_paths(self) -> None:
        """By hand: with `down` and attention's output at zero a branch passes nothing back."""

        def silent(model: Transformer) -> Transformer:
            for block in model.blocks:
                block.get_submodule("attention").get_parameter("output.weight").data.zero_()
                block.get_submodule("feed_forward").get_parameter("down.weight").data.zero_()
            return model

        config = small_config()
        workload = transformer_workload(config)
        quiet = replace(workload, model=lambda: silent(workload.model()))  # type: ignore[arg-type]
        found = check_residual(config, quiet)
        assert found.figures["blocks.0.branch_norm"] == 0
        assert found.figures["blocks.0.identity_norm"] == found.figures["blocks.1.identity_norm"] > 0
        assert found.holds

    @pytest.mark.parametrize(
        "joined",
        [
            lambda block, x, branch: x.detach() + branch,
            lambda block, x, branch: x + branch.detach(),
            lambda block, x, branch: x + 0.999 * branch,
            lambda block, x, branch: x * 1.0001 + branch,
        ],
        ids=["identity path cut", "branch cut", "branch scaled", "identity scaled"],
    )
    def test_a_broken_addition(self, monkeypatch: pytest.MonkeyPatch, joined: Callable[..., Tensor]) -> None:
        monkeypatch.setattr(Block, "_joined", joined)
        assert failed(of_transformer())[0] == "residual_paths"

    def test_without_an_identity_path_the_branch_is_all(self) -> None:
        found = named(of_transformer({"model.residual": False}).identities, "residual_paths")
        assert found.figures["blocks.1.identity_norm"] == 0
        assert found.figures["blocks.1.branch_norm"] > 0


def check_residual(config: Any, workload: Workload) -> Identity:
    from bptool.analysis.gradcheck.identities.residual import ResidualPaths
    from bptool.analysis.gradcheck.model_at_hand import ModelAtHand

    at_hand = ModelAtHand(config, workload, True, 0, torch.device("cpu"))
    model = at_hand.exact_model().eval()
    assert isinstance(model, Transformer)
    paths = ResidualPaths(model)
    (batch,) = at_hand.batches(1, torch.float64)
    workload.loss(model, batch).backward()
    paths.close()
    return paths.identity()


class HandWritten(torch.autograd.Function):
    """Causal attention with a backward by hand, and a bug in it where one is named."""

    bug = ""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
        p = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf).softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.groups = groups
        y: Tensor = p @ v
        return y

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, p = ctx.saved_tensors
        bug, scale = HandWritten.bug, q.shape[-1] ** -0.5
        dp = slope @ v.mT
        row = (p * dp).sum(-1, keepdim=True)
        ds = p * dp if bug == "no row sum" else p * (dp - row)
        if bug == "mask off by one":
            ds = ds.tril(-1)
        dq = ds @ k * (1 if bug == "no scale in dQ" else scale)
        dk = (ds if bug == "dS not transposed" else ds.mT) @ q * (1 if bug == "no scale in dK" else scale)
        if bug == "K transposed":
            dq = (k.mT.reshape(k.shape).mT @ ds.mT).mT * scale
        dv = (dp if bug == "dP for P" else p).mT @ slope
        if bug == "one element":
            dv[0, 0, 3, 2] *= 1 + 1e-6
        if bug == "one head":
            dq[:, 1] = dq[:, 0]
        if bug == "one key head's sum":
            return dq, dk[:, :: ctx.groups], dv.unflatten(1, (-1, ctx.groups)).sum(2)
        return dq, *(x.unflatten(1, (-1, ctx.groups)).sum(2) for x in (dk, dv))


QUERY, KEY, VALUE = NAMES[2:5]
BUGS: dict[str, list[str]] = {
    "": [],
    "no scale in dQ": [QUERY],
    "no scale in dK": [KEY],
    "K transposed": [QUERY],
    "dS not transposed": [KEY],
    "no row sum": [QUERY, KEY],
    "mask off by one": [QUERY, KEY],
    "dP for P": [VALUE],
    "one element": [VALUE, "accumulation"],  # which row of the batch it is depends on how the batch is cut
    "one head": [QUERY],
    "one key head's sum": [KEY],
}


class TestAttention:
    @pytest.mark.parametrize(("bug", "wrong"), BUGS.items())
    def test_a_backward_by_hand(self, monkeypatch: pytest.MonkeyPatch, bug: str, wrong: list[str]) -> None:
        def by_hand(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
            return HandWritten.apply(q, k, v)  # type: ignore[no-untyped-call, no-any-return]

        monkeypatch.setattr(HandWritten, "bug", bug)
        monkeypatch.setattr(attention, "fused_attention", by_hand)
        assert failed(of_transformer({"model.n_kv_heads": 1})) == wrong

    def test_a_forward_without_the_scale(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its gradient is right for what it computes, which is not attention."""
        right = attention.fused_attention
        monkeypatch.setattr(attention, "fused_attention", lambda *inputs, scale: right(*inputs, scale=1.0))
        assert failed(of_transformer()) == [QUERY, KEY, VALUE]

    def test_what_the_forgotten_factor_would_do(self) -> None:
        detail = named(of_transformer().identities, QUERY).detail
        assert "* 0.3536" in detail  # a head is 8 wide
        assert "off by 183%" in detail  # sqrt(8) - 1

    @pytest.mark.parametrize("mask", ["none", "boolean", "added", "causal"])
    @pytest.mark.parametrize("scale", [None, 0.7])
    def test_pytorchs_function_wherever_it_is_called(self, mask: str, scale: float | None) -> None:
        shapes = {"q": (2, 4, 5, 6), "k": (2, 2, 5, 6), "v": (2, 2, 5, 3)}
        q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values())
        seen = torch.rand(5, 5) < 0.5
        seen.fill_diagonal_(True)
        masks = {"boolean": seen, "added": torch.randn(5, 5, dtype=torch.float64)}

        def run() -> Tensor:
            attended = F.scaled_dot_product_attention(
                q, k, v, masks.get(mask), is_causal=mask == "causal", scale=scale, enable_gqa=True
            )
            return (attended * torch.arange(attended.numel()).view_as(attended)).sum() + q.sum()

        found = observed_identities(run)
        assert [identity.name for identity in found] == [QUERY, KEY, VALUE]
        assert all(identity.holds for identity in found)
        assert q.grad is not None  # the sum over both uses, of which the identity saw one

    def test_a_token_that_sees_itself_alone_has_no_gradient_in_its_scores(self) -> None:
        found = of_transformer({"model.sliding_window": 1})
        assert failed(found) == []
        for name in (QUERY, KEY):
            assert named(found.identities, name).figures["blocks.0.attention.gradient_norm"] < 1e-15
            assert named(found.identities, name).tolerance == 0


class TestOrder:
    def test_blocks_the_other_way_round(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = Transformer._hidden

        def reversed_(model: Transformer, tokens_BT: Tensor) -> Any:
            model.blocks = nn.ModuleList(reversed(model.blocks))
            try:
                return right(model, tokens_BT)
            finally:
                model.blocks = nn.ModuleList(reversed(model.blocks))

        monkeypatch.setattr(Transformer, "_hidden", reversed_)
        found = of_transformer()
        assert "layer_order" in failed(found)
        assert (
            "loss -> final_norm -> blocks.0 -> blocks.1 -> embedding" in named(found.identities, "layer_order").detail
        )

    def test_a_block_that_no_gradient_comes_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = Block.forward
        monkeypatch.setattr(Block, "forward", lambda block, x, *rest: x + (right(block, x, *rest) - x).detach())
        assert "residual_paths" in failed(of_transformer())

        monkeypatch.setattr(Block, "forward", lambda block, x, *rest: right(block, x, *rest).detach())  # type: ignore[union-attr]
        found = named(of_transformer().identities, "layer_order")
        assert not found.holds
        assert "none came to blocks.1, blocks.0, embedding" in found.detail


class TestAccumulation:
    def test_a_mean_of_means(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = TrainStep.accumulate
        monkeypatch.setattr(TrainStep, "accumulate", lambda step, parts, weights: right(step, parts, [1] * len(parts)))
        assert failed(of_transformer()) == ["accumulation"]

    def test_a_last_micro_batch_that_is_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = TrainStep.accumulate

        def lost(step: TrainStep, parts: Sequence[Batch], weights: Sequence[int]) -> Tensor:
            return right(step, parts[:2], weights[:2])

        monkeypatch.setattr(TrainStep, "accumulate", lost)
        assert failed(of_transformer()) == ["accumulation"]

    def test_a_users_weight_that_counts_all_rows(self) -> None:
        """Left out with the reason where nothing is accumulated, wrong where something is."""
        workload = replace(masked_regression(), weight=lambda batch: len(batch["valid"]))
        found = check_identities(small_config(), workload, built_in=False, seed=1)
        assert failed(found) == []
        (reason,) = (text for text in found.left_out if text.startswith("accumulation"))
        assert "`weight` is not what the loss averages over" in reason
        several = small_config({"training.gradient_accumulation_steps": 2})
        assert failed(check_identities(several, workload, built_in=False, seed=1)) == ["accumulation"]


class TestTheStep:
    def test_a_recomputation_that_fails(self) -> None:
        """As where a backward reads what was saved twice."""

        class Twice(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx: Any, slope: Tensor) -> Tensor:
                found: Tensor = slope * ctx.saved_tensors[0] + slope * ctx.saved_tensors[0]
                return found

        class Square(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return Twice.apply(self.layer(x))  # type: ignore[no-untyped-call, no-any-return]

        workload = Workload(
            model=lambda: nn.Sequential(Square(), Square()),
            batch=lambda generator: torch.randn(4, 3, generator=generator),
            loss=lambda model, batch: model(batch).square().mean(),
        )
        found = check_identities(small_config(), workload, built_in=False, seed=0)
        assert failed(found) == ["activation_checkpointing"]
        assert "policy full raises CheckpointError" in named(found.identities, "activation_checkpointing").detail

    def test_a_recomputation_that_draws_other_dropout(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(activation_checkpoint, "checkpoint", partial(checkpoint, preserve_rng_state=False))
        found = of_transformer()
        assert failed(found) == ["activation_checkpointing"]
        assert "policy full" in named(found.identities, "activation_checkpointing").detail

    @pytest.mark.parametrize(
        "norm",
        [
            lambda tensors: torch.stack([t.norm() for t in tensors]).sum(),
            lambda tensors: torch.stack([t.norm() for t in tensors]).max(),
            lambda tensors: torch.stack([t.norm() for t in tensors[1:]]).norm(),
        ],
        ids=["sum of norms", "largest norm", "one tensor less"],
    )
    def test_another_norm(self, monkeypatch: pytest.MonkeyPatch, norm: Callable[[list[Tensor]], Tensor]) -> None:
        monkeypatch.setattr(torch.nn.utils, "get_total_norm", norm)
        assert failed(of_transformer()) == ["clipping_norm"]

    @pytest.mark.parametrize("eps", [0.0, 1e-5])
    def test_another_epsilon(self, monkeypatch: pytest.MonkeyPatch, eps: float) -> None:
        def rescale(step: TrainStep, norm: float) -> None:
            factor = min(1.0, step._clip_norm / (norm + eps)) if step._clip_norm else 1.0
            torch._foreach_mul_(step._gradients(), factor)

        monkeypatch.setattr(TrainStep, "_rescale", rescale)
        assert failed(of_transformer()) == ["clipping_norm"]

    @pytest.mark.parametrize("factor", [1 + 1e-6, -1.0])
    def test_another_update(self, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
        def step(optimizer: GradientDescent) -> None:
            for group in optimizer.param_groups:
                for theta in group["params"]:
                    theta.data.sub_(group["lr"] * factor * theta.grad)

        monkeypatch.setattr(GradientDescent, "step", step)
        assert failed(of_transformer()) == ["gradient_descent_update"]


class TestUsersModels:
    @pytest.mark.parametrize(
        "make",
        [foreign_models.gpt2, foreign_models.t5, foreign_models.bert, foreign_models.vision_transformer],
    )
    def test_pytorchs_own_functions_are_found_in_them(self, make: Callable[[], Workload]) -> None:
        found = check_identities(small_config(), make(), built_in=False, seed=1)
        assert failed(found) == []
        names = [identity.name for identity in found.identities]
        assert names == [name for name in NAMES if name != "residual_paths"]
        assert [text.partition(":")[0] for text in found.left_out] == ["residual_paths"]

    @pytest.mark.parametrize("make", [foreign_models.perceptron, foreign_models.convolutional, masked_regression])
    def test_what_has_no_such_part_is_left_out_with_the_reason(self, make: Callable[[], Workload]) -> None:
        found = check_identities(small_config(), make(), built_in=False, seed=1)
        assert failed(found) == []
        told = [identity.name for identity in found.identities] + [text.partition(":")[0] for text in found.left_out]
        assert {"residual_paths", "attention", "accumulation", "layer_order"} <= set(told)

    def test_a_loss_that_is_divided_wrongly(self) -> None:
        """Its gradient is right for what it computes: the identity is about cross-entropy, whatever is made of it."""
        logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
        targets = torch.tensor([0, 1, -100, 3, 4, 4])

        def tripled(reduction: str) -> Tensor:
            return 3 * F.cross_entropy(logits, targets, reduction=reduction)

        for reduction in ("mean", "sum"):
            (found,) = observed_identities(partial(tripled, reduction))
            assert found.name == "logits_gradient"
            assert found.holds


class TestAgreement:
    def test_one_element_of_many(self) -> None:
        expected = torch.ones(1000, 1000, dtype=torch.float64)
        actual = expected.clone()
        actual[7, 5] += 1e-10
        found = agree(actual, expected, 1e-12 * expected, "here")
        assert not found.holds
        assert "at [7, 5]" in found.where
        assert found.relative_error == pytest.approx(1e-13, rel=1e-3)
        assert agree(actual, expected, 2e-10 * expected, "here").holds

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_finite_does_not_agree(self, value: float) -> None:
        expected = torch.ones(3)
        actual = torch.tensor([1.0, value, 1.0])
        assert not agree(actual, expected, expected, "here").holds
        assert not agree_as_one({"a": actual}, {"a": expected}, 1.0).holds

    def test_below_the_smallest_normal_numbers_nothing_is_compared(self) -> None:
        expected = torch.tensor([1e-310, 1.0], dtype=torch.float64)
        actual = torch.tensor([2e-310, 1.0], dtype=torch.float64)
        assert agree(actual, expected, torch.zeros_like(expected), "here").holds
        assert not agree(1e200 * actual, 1e200 * expected, torch.zeros_like(expected), "here").holds

    def test_a_gradient_that_is_missing_is_zero(self) -> None:
        one = torch.ones(4)
        assert agree_as_one({"a": None}, {"a": torch.zeros(4)}, 0.0).holds
        assert agree_as_one({"a": None, "b": one}, {"a": one, "b": one}, 0.1).relative_error == pytest.approx(0.5**0.5)


def test_random_state_is_as_it_was() -> None:
    before = torch.get_rng_state()
    of_transformer()
    assert torch.equal(torch.get_rng_state(), before)
