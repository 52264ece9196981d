"""The identities of logits, residual blocks and layers: each fails, alone, where the model is broken there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from identity_checks import failed, named, of_transformer
from small_runs import small_config
from torch import Tensor, nn

from bptool.analysis.gradcheck.identities.identity import Identity
from bptool.model import loss
from bptool.model.transformer import Block, Transformer
from bptool.training.workload import Workload, transformer_workload


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
