"""Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values are made of one narrow vector for each token.

Shapes: B batch, T tokens, S tokens attended to (S = T), D model width, H heads, L latent width, N width of a head's
part that is not rotated, R of the one that is, Q head width (N + R), V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bptool.config.schema import ModelSettings
from bptool.model.attention import attend_as
from bptool.model.autocast import cast_once
from bptool.model.normalization import make_inner_norm
from bptool.model.position import Rotation, rotate_interleaved

_EPS = 1e-6  # of the latents' norms, whatever `norm_eps` is, as in the released code


class LatentAttention(nn.Module):
    """Causal self-attention whose keys and values could be kept as L + R numbers for each token.

    In training they are expanded, so this is plain attention with wider keys than values. Where that keeps a fused
    kernel from taking them (on a CPU), the attention weights are held.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        d_model, n_heads, self.mla = settings.d_model, settings.n_heads, settings.mla
        mla, queries = settings.mla, n_heads * settings.head_dim
        if mla.q_rank:
            self.query_down = nn.Linear(d_model, mla.q_rank, bias=False)
            self.query_latent_norm = make_inner_norm(settings, mla.q_rank, _EPS)
            self.query_up = nn.Linear(mla.q_rank, queries, bias=False)
        else:
            self.query = nn.Linear(d_model, queries, bias=False)
        self.key_value_down = nn.Linear(d_model, mla.kv_rank + mla.rope_dim, bias=False)
        self.key_value_latent_norm = make_inner_norm(settings, mla.kv_rank, _EPS)
        self.key_value_up = nn.Linear(mla.kv_rank, n_heads * (mla.nope_dim + mla.value_dim), bias=False)
        self.output = nn.Linear(n_heads * mla.value_dim, d_model, bias=False)
        self.n_heads = n_heads
        self.attend = attend_as(settings)
        self.dropout = settings.dropout

    def forward(self, x_BTD: Tensor, rotation: Rotation | None, mask_TS: Tensor | None = None) -> Tensor:
        """[B, T, D] to [B, T, D]; the arguments are those of `Attention`."""
        mla = self.mla
        query_BTD, key_value_BSD = cast_once(x_BTD, 2)
        q_BHTN, q_BHTR = self._heads(self._queries(query_BTD)).split([mla.nope_dim, mla.rope_dim], dim=-1)
        latent_BSL, k_BSR = self.key_value_down(key_value_BSD).split([mla.kv_rank, mla.rope_dim], dim=-1)
        key_value_BHS = self._heads(self.key_value_up(self.key_value_latent_norm(latent_BSL)))
        k_BHSN, v_BHSV = key_value_BHS.split([mla.nope_dim, mla.value_dim], dim=-1)
        k_B1SR = k_BSR[:, None]
        if rotation is not None:
            q_BHTR, k_B1SR = rotate_interleaved(q_BHTR, rotation), rotate_interleaved(k_B1SR, rotation)
        # Rotating raises low precision to float32; the kernels want all alike.
        q_BHTQ = torch.cat((q_BHTN, q_BHTR.to(q_BHTN.dtype)), dim=-1)
        k_BHSQ = torch.cat((k_BHSN, k_B1SR.to(k_BHSN.dtype).expand(-1, self.n_heads, -1, -1)), dim=-1)
        y_BHTV = self.attend(q_BHTQ, k_BHSQ, v_BHSV, self.dropout if self.training else 0.0, mask_TS)
        y_BTD: Tensor = self.output(y_BHTV.transpose(1, 2).flatten(2))
        return y_BTD

    def _queries(self, x_BTD: Tensor) -> Tensor:
        found: Tensor = (
            self.query_up(self.query_latent_norm(self.query_down(x_BTD))) if self.mla.q_rank else self.query(x_BTD)
        )
        return found

    def _heads(self, x_BT: Tensor) -> Tensor:
        heads_BHT: Tensor = x_BT.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        return heads_BHT
