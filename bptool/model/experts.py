"""The feed-forward branch as a mixture of experts: each token takes a few of many feed-forwards.

No token is dropped, and no shape depends on which experts are taken: the choices are sorted by expert, and each product
is one over all of them (Gale et al. 2022, "MegaBlocks").

Shapes: B batch, T tokens, N tokens of all sequences (B T), K experts that a token takes, M choices (N K), E experts,
G groups of experts, D model width, F inner width of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bptool.config.schema import ModelSettings
from bptool.model.autocast import matmul_dtype
from bptool.model.feed_forward import FeedForward, activation
from bptool.model.grouped import grouped_linear


class MixtureOfExperts(nn.Module):
    """The weighted sum of the experts that the router chooses, and of those that all tokens share."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        moe = settings.moe
        self.router = Router(settings)
        self.experts = Experts(settings)
        self.shared = FeedForward(settings, moe.n_shared * moe.d_expert) if moe.n_shared else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] to [B, T, D], and how unevenly the tokens are spread over the experts (see `imbalance`)."""
        x_ND = x_BTD.flatten(0, 1)
        choice_NK, weight_NK, uneven = self.router(x_ND)
        y_ND = self.experts(x_ND, choice_NK, weight_NK)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD), uneven


class Router(nn.Module):
    """Scores the experts for each token, chooses, and weighs those that it chose.

    Softmax over all experts, then the best (Switch Transformers, Mixtral); or a sigmoid of each, where the choice, but
    no weight, is corrected by `bias` (DeepSeek-V3, section 2.1.2), which is float32 and has no gradient. DeepSeek moves
    the correction against the load after each step; here it stays as it was loaded (new: 0), and the auxiliary loss
    does the balancing.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.moe = settings.moe
        self.weight = nn.Parameter(torch.empty(self.moe.n_experts, settings.d_model))
        corrected = self.moe.router == "sigmoid"
        correction_E = torch.zeros(self.moe.n_experts, dtype=torch.float32)
        self.bias = nn.Parameter(correction_E, requires_grad=False) if corrected else None

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each token's experts and their weights, [N, K] each, and the imbalance; scores are float32 or better."""
        logits_NE = F.linear(x_ND, self.weight)
        logits_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
        scores_NE = logits_NE.softmax(-1) if self.bias is None else logits_NE.sigmoid()
        choice_NK = self._choice(scores_NE.detach())
        weight_NK = scores_NE.gather(1, choice_NK)
        if self.moe.normalized:
            weight_NK = weight_NK / (weight_NK.sum(-1, keepdim=True) + 1e-20)
        shares_NE = scores_NE if self.bias is None else scores_NE / scores_NE.sum(-1, keepdim=True)
        return choice_NK, weight_NK * self.moe.weight_scale, imbalance(shares_NE, choice_NK)

    def _choice(self, scores_NE: Tensor) -> Tensor:
        if self.bias is not None:
            scores_NE = scores_NE + self.bias
        if self.moe.n_active_groups < self.moe.n_groups:
            scores_NE = self._within_groups(scores_NE)
        return scores_NE.topk(self.moe.n_active, dim=-1).indices

    def _within_groups(self, scores_NE: Tensor) -> Tensor:
        """The scores, with -inf in groups that are not among the token's best (DeepSeek-V3, section 2.1.2)."""
        scores_NGe = scores_NE.unflatten(-1, (self.moe.n_groups, -1))
        best_NG = scores_NGe.topk(2, dim=-1).values.sum(-1)
        kept = best_NG.topk(self.moe.n_active_groups, dim=-1).indices
        left_out_NG1 = torch.ones_like(best_NG, dtype=torch.bool).scatter_(1, kept, False)[..., None]
        kept_NGe: Tensor = scores_NGe.masked_fill(left_out_NG1, -torch.inf)
        return kept_NGe.flatten(1)


def imbalance(shares_NE: Tensor, choice_NK: Tensor) -> Tensor:
    """`E sum_e f_e P_e`, a scalar: K where all experts are taken alike, E where all take the same one alone.

    Equations 4 to 6 of Switch Transformers (Fedus et al. 2021), for K experts a token as transformers counts them: f_e
    is the number of tokens that take e over N, without a gradient, and P_e the mean of its share of the scores.
    """
    n_tokens, n_experts = shares_NE.shape
    taken_E = _counts(choice_NK, n_experts).to(shares_NE.dtype) / n_tokens
    return n_experts * (taken_E * shares_NE.mean(0)).sum()


def _counts(choice: Tensor, n_experts: int) -> Tensor:
    """How often each expert is taken, [E], int32; `bincount` has a shape that fake tensors cannot know."""
    flat_M = choice.flatten()
    one_M = flat_M.new_ones(1, dtype=torch.int32).expand_as(flat_M)
    return flat_M.new_zeros(n_experts, dtype=torch.int32).scatter_add_(0, flat_M, one_M)


class Experts(nn.Module):
    """E feed-forwards without biases, their matrices in one parameter each."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        n_experts, d_model, d_expert = settings.moe.n_experts, settings.d_model, settings.moe.d_expert
        self.gate = GroupedLinear(n_experts, d_model, d_expert) if settings.gated else None
        self.up = GroupedLinear(n_experts, d_model, d_expert)
        self.down = GroupedLinear(n_experts, d_expert, d_model)
        self.activation = activation(settings)

    def forward(self, x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """Each token's weighted sum of its experts' outputs: [N, D]."""
        n_active = choice_NK.shape[1]
        order_M = choice_NK.flatten().argsort(stable=True)
        ends_E = _counts(choice_NK, self.up.weight.shape[0]).cumsum(0, dtype=torch.int32)
        x_MD = x_ND.to(matmul_dtype(x_ND))[order_M // n_active]
        inner_MF = self.activation((self.gate or self.up)(x_MD, ends_E))
        if self.gate is not None:
            inner_MF = inner_MF * self.up(x_MD, ends_E)
        y_MD: Tensor = self.down(inner_MF, ends_E)
        y_NKD: Tensor = y_MD[order_M.argsort()].unflatten(0, (-1, n_active))
        return (y_NKD * weight_NK[..., None].to(y_NKD.dtype)).sum(1)


class GroupedLinear(nn.Module):
    """A linear layer for each expert."""

    def __init__(self, n_experts: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, n_out, n_in))

    def forward(self, x_MI: Tensor, ends_E: Tensor) -> Tensor:
        """Rows sorted by expert, [M, I], to [M, O]; expert e's end at `ends_E[e]`."""
        return grouped_linear(x_MI, self.weight.to(x_MI.dtype), ends_E)
