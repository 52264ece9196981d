"""The identities hold on models that are right, and each one fails, alone, on a model that is broken where it looks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import foreign_models
import pytest
import torch
import torch.nn.functional as F
from identity_checks import NAMES, failed, of_transformer
from small_runs import masked_regression, small_config
from torch import Tensor

from bptool.analysis.gradcheck.identities.check import check_identities, observed_identities
from bptool.training.workload import Workload

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


def test_random_state_is_as_it_was() -> None:
    before = torch.get_rng_state()
    of_transformer()
    assert torch.equal(torch.get_rng_state(), before)
