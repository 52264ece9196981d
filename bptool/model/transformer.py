"""The transformer: decoder-only, pre-norm, GPT-2 at one end of its settings and Llama at the other.

Shapes: B batch, T tokens, D model width, V vocabulary, N tokens of all sequences (B T).
"""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bptool.config.schema import ModelSettings, RopeSettings
from bptool.model.attention import Attention, window_mask
from bptool.model.autocast import matmul_dtype
from bptool.model.experts import MixtureOfExperts
from bptool.model.feed_forward import FeedForward
from bptool.model.latent_attention import LatentAttention
from bptool.model.loss import LossName, NextTokenLoss, softcapped
from bptool.model.normalization import make_norm
from bptool.model.position import Rotation, rotation

_BRANCH_OUTPUTS = ("attention.output.weight", "feed_forward.down.weight", "experts.down.weight", "shared.down.weight")


class Block(nn.Module):
    """Attention, then feed-forward, each normalised before (with `post_norm` after it too) and added.

    With `residual` off each branch's output takes its input's place, which shows what the addition is for.
    """

    def __init__(self, settings: ModelSettings, number: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(settings)
        self.attention = LatentAttention(settings) if settings.mla.kv_rank else Attention(settings)
        self.attention_post_norm = make_norm(settings) if settings.post_norm else nn.Identity()
        self.feed_forward_norm = make_norm(settings)
        experts = settings.has_experts(number)
        self.feed_forward = MixtureOfExperts(settings) if experts else FeedForward(settings, settings.d_ff)
        self.feed_forward_post_norm = make_norm(settings) if settings.post_norm else nn.Identity()
        self.dropout = nn.Dropout(settings.dropout)
        self.residual = settings.residual

    def forward(
        self, x_BTD: Tensor, rotation: Rotation | None, mask_TS: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, T, D] to [B, T, D]; a block with experts also says how unevenly they are taken.

        Args:
            x_BTD: the residual stream.
            rotation: the positions' angles; None where the model has no rope.
            mask_TS: the sliding window's; None: attention is causal and nothing else.
        """
        branch_BTD = self.attention(self.attention_norm(x_BTD), rotation, mask_TS)
        x_BTD = self._joined(x_BTD, self.attention_post_norm(branch_BTD))
        found = self.feed_forward(self.feed_forward_norm(x_BTD))
        if isinstance(found, Tensor):
            return self._joined(x_BTD, self.feed_forward_post_norm(found))
        branch_BTD, uneven = found
        return self._joined(x_BTD, self.feed_forward_post_norm(branch_BTD)), uneven

    def _joined(self, x_BTD: Tensor, branch_BTD: Tensor) -> Tensor:
        branch_BTD = self.dropout(branch_BTD)
        return x_BTD + branch_BTD if self.residual else branch_BTD


class Transformer(nn.Module):
    """A language model with the parameters and the arithmetic that `settings` name.

    With tied embeddings there is no head: the logits are made with the token embedding, which the state dict holds
    once. Built under `torch.device("meta")` it takes no memory, whatever its size.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        learned = settings.position == "learned"
        self.settings = settings
        self.embedding = nn.Embedding(settings.vocab_size, settings.d_model)
        self.position = nn.Embedding(settings.context_length, settings.d_model) if learned else None
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(Block(settings, number) for number in range(settings.n_layers))
        self.final_norm = make_norm(settings)
        tied = settings.tied_embeddings
        self.head = None if tied else nn.Linear(settings.d_model, settings.vocab_size, bias=False)
        self.loss = NextTokenLoss(settings.logit_softcap)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, *, loss: LossName = "plain") -> Tensor:
        """Logits [B, T, V]; with targets, the mean cross-entropy over those that are not negative, a scalar.

        In training, a model with experts adds `moe.auxiliary_loss` times their imbalance, the blocks' mean.

        Args:
            tokens_BT: token ids; T is at most `settings.context_length`.
            targets_BT: the id that follows each token, or a negative number (`loss.IGNORED`) where none counts.
            loss: `fused` never holds all the logits, `plain` does; the numbers are the same.
        """
        x_BTD, imbalance = self._hidden(tokens_BT)
        weight_VD, softcap = (self.head or self.embedding).weight, self.settings.logit_softcap
        if targets_BT is None:
            return softcapped(F.linear(x_BTD, weight_VD), softcap)
        result: Tensor = self.loss(x_BTD.flatten(0, 1), weight_VD, targets_BT.flatten(), loss)
        if imbalance is not None and self.training and self.settings.moe.auxiliary_loss:
            n_uneven = sum(self.settings.has_experts(block) for block in range(len(self.blocks)))
            result = result + imbalance * (self.settings.moe.auxiliary_loss / n_uneven)
        return result

    def _hidden(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """The last norm's output, [B, T, D], and the imbalance of all the blocks that have experts."""
        n_tokens = tokens_BT.shape[1]
        assert n_tokens <= self.settings.context_length, "a sequence is longer than the model's context"
        x_BTD = self.embedding(tokens_BT)
        if self.settings.scaled_embeddings:
            x_BTD = x_BTD * math.sqrt(self.settings.d_model)
        if self.position is not None:
            x_BTD = x_BTD + self.position.weight[:n_tokens]
        x_BTD = self.dropout(x_BTD)
        far = self._angles(x_BTD, self.settings.rope), None
        near = self._near(x_BTD, far[0]) if self.settings.sliding_window else far
        total: Tensor | None = None
        for number, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, *(near if self.settings.slides(number) else far))
            if not isinstance(x_BTD, Tensor):
                x_BTD, imbalance = x_BTD
                total = imbalance if total is None else total + imbalance
        normed_BTD: Tensor = self.final_norm(x_BTD)
        return normed_BTD, total

    def _near(self, x_BTD: Tensor, angles: Rotation | None) -> tuple[Rotation | None, Tensor | None]:
        """The positions' angles and the mask for blocks with a sliding window, from the other blocks' angles."""
        n_tokens, window, rope = x_BTD.shape[1], self.settings.sliding_window, self.settings.rope
        if rope.local_theta:
            angles = self._angles(x_BTD, RopeSettings(theta=rope.local_theta))
        masked = window < n_tokens  # else attention is causal and nothing else
        return angles, window_mask(n_tokens, window, matmul_dtype(x_BTD), x_BTD.device) if masked else None

    def _angles(self, x_BTD: Tensor, rope: RopeSettings) -> Rotation | None:
        if self.settings.position != "rope":
            return None
        return rotation(x_BTD.shape[1], self.settings.rotary_dim, rope, x_BTD.device)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fill the parameters as GPT-2 does (Radford et al. 2019).

        Matrices are normal with standard deviation `init_std`, over sqrt(2 n_layers) where they end a branch, so that
        the residual stream's variance does not grow with depth; biases are 0, norms scale by 1. Each parameter is drawn
        from `seed` and its own name, so it is the same whatever else is built, in whatever order.
        """
        branch_std = self.settings.init_std / math.sqrt(2 * self.settings.n_layers)
        norm_weight = 0.0 if self.settings.norm == "rmsnorm-offset" else 1.0
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(norm_weight if name.endswith(".weight") else 0.0)
                continue
            generator = torch.Generator(parameter.device)
            generator.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            std = branch_std if name.endswith(_BRANCH_OUTPUTS) else self.settings.init_std
            parameter.normal_(0.0, std, generator=generator)


def build(
    settings: ModelSettings, *, device: torch.device | str, seed: int, dtype: torch.dtype = torch.float32
) -> Transformer:
    """A transformer with random weights on `device`; on `meta`, one without any.

    Weights named by `settings.weights` are the caller's to load (`bptool.interop.huggingface.load_weights`).
    """
    with torch.device("meta"):
        model = Transformer(settings)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # Not `to_empty`: it swaps tensors, which fake ones refuse.
            trained = parameter.requires_grad
            own = torch.empty_like(parameter, device=device, dtype=dtype if trained else parameter.dtype)
            setattr(module, name, nn.Parameter(own, requires_grad=trained))
    if torch.device(device).type != "meta":
        model.initialize(seed)
    return model
