"""`[model]`: a decoder-only transformer, GPT-2 at one end and Llama at the other, and its neighbours' parts."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from bptool.config.section import AUTO, ConflictError, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

GATED = ("swiglu", "geglu-tanh")
"""The activations that multiply two projections."""


class RopeSettings(Section):
    """`[model.rope]`: rotary position embeddings, read only where `model.position = "rope"`."""

    theta: PositiveFloat = 10000.0
    """Base of the geometric series of wavelengths."""
    local_theta: NonNegativeFloat = 0.0
    """Base in blocks with a sliding window, where wavelengths are never stretched; 0: they are like all the others."""
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """`linear` stretches all wavelengths by `factor`; `llama3` and `yarn` the long ones alone, by the keys below."""
    factor: PositiveFloat = 8.0
    """linear, llama3, yarn: how much the longest wavelengths are stretched."""
    low_frequency_factor: PositiveFloat = 1.0
    """llama3: wavelengths longer than `original_context_length` / this are stretched in full."""
    high_frequency_factor: PositiveFloat = 4.0
    """llama3: wavelengths shorter than `original_context_length` / this are left alone."""
    original_context_length: Positive = 8192
    """llama3, yarn: the context length before stretching, in tokens."""
    beta_fast: PositiveFloat = 32.0
    """yarn: pairs that turn more often than this within `original_context_length` are left alone."""
    beta_slow: PositiveFloat = 1.0
    """yarn: pairs that turn less often than this within `original_context_length` are stretched in full."""
    mscale: NonNegativeFloat = 1.0
    """yarn: queries and keys grow by 1 + 0.1 mscale ln(factor), over the same with `mscale_all_dim`."""
    mscale_all_dim: NonNegativeFloat = 0.0
    """yarn: scores grow by the square of 1 + 0.1 mscale_all_dim ln(factor)."""

    @model_validator(mode="after")
    def _band_is_ordered(self) -> Self:
        bands = {"llama3": ("high_frequency_factor", "low_frequency_factor"), "yarn": ("beta_fast", "beta_slow")}
        if self.scaling in bands:
            high, low = bands[self.scaling]
            if getattr(self, high) <= getattr(self, low):
                raise ConflictError(
                    f"model.rope.{high} = {getattr(self, high)} must exceed model.rope.{low} = {getattr(self, low)}",
                    *(f"model.rope.{key}" for key in (high, low, "scaling")),
                )
        return self


class MlaSettings(Section):
    """`[model.mla]`: DeepSeek's multi-head latent attention, read only where `kv_rank` is not 0."""

    kv_rank: NonNegative = 0
    """Width of the vector that a token's keys and values are made of; 0: plain attention."""
    q_rank: NonNegative = 0
    """The same for its queries; 0: they are made of the token itself."""
    nope_dim: Positive = 32
    """Width of a query's and a key's part that is not rotated; each head has its own."""
    rope_dim: Positive = 16
    """Width of the part that is rotated; all heads have one key's in common."""
    value_dim: Positive = 32
    """Width of a value."""


class MoeSettings(Section):
    """`[model.moe]`: a mixture of experts in the feed-forward's place, read only where `n_experts` is not 0."""

    n_experts: NonNegative = 0
    """Feed-forwards of which each token takes a few; 0: one that all tokens take."""
    n_active: Positive = 2
    """Experts that a token takes: those with the highest scores."""
    d_expert: Positive = 128
    """Inner width of an expert."""
    n_shared: NonNegative = 0
    """Experts besides that all tokens take, as one feed-forward n_shared d_expert wide."""
    n_dense_layers: NonNegative = 0
    """So many first blocks have a plain feed-forward, d_ff wide."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of the router's logits; `sigmoid` chooses by score + a kept correction, as DeepSeek-V3 does."""
    normalized: bool = True
    """Divide the chosen experts' scores by their sum to get their weights."""
    weight_scale: PositiveFloat = 1.0
    """Multiplies the chosen experts' weights."""
    n_groups: Positive = 1
    """The experts in so many equal groups; a token takes experts of its best groups alone."""
    n_active_groups: Positive = 1
    """Groups that a token may take experts of: those whose best two scores have the highest sum."""
    auxiliary_loss: NonNegativeFloat = 0.01
    """Weight in the training loss of what pulls tokens apart evenly over the experts (Switch Transformers)."""

    @model_validator(mode="after")
    def _choice_is_possible(self) -> Self:
        if not self.n_experts:
            return self
        size = self.n_experts // self.n_groups
        if self.n_experts % self.n_groups or (self.n_groups > 1 and size < 2):
            raise ConflictError(
                f"model.moe.n_experts = {self.n_experts} does not make model.moe.n_groups = {self.n_groups} equal"
                " groups of two experts or more",
                *("model.moe.n_groups", "model.moe.n_experts"),
            )
        if self.n_active_groups > self.n_groups:
            raise ConflictError(
                f"model.moe.n_active_groups = {self.n_active_groups} exceeds model.moe.n_groups = {self.n_groups}",
                *("model.moe.n_active_groups", "model.moe.n_groups"),
            )
        if self.n_active > size * self.n_active_groups:
            raise ConflictError(
                f"model.moe.n_active = {self.n_active} exceeds the {size * self.n_active_groups} experts that a token"
                " can choose of",
                *(f"model.moe.{key}" for key in ("n_active", "n_experts", "n_groups", "n_active_groups")),
            )
        return self


class ModelSettings(Section):
    """`[model]`: a decoder-only transformer, GPT-2 at one end and Llama at the other."""

    n_layers: Positive = 4
    """Number of transformer blocks."""
    d_model: Positive = 128
    """Width of the residual stream."""
    n_heads: Positive = 4
    """Number of query heads."""
    n_kv_heads: Positive = AUTO
    """Number of key and value heads; `auto`: as many as query heads. Fewer is grouped-query attention."""
    head_dim: Positive = AUTO
    """Width of one head; `auto`: d_model / n_heads, or `mla.nope_dim` + `mla.rope_dim` where there is a latent."""
    d_ff: Positive = AUTO
    """Inner width of the feed-forward; `auto`: 4 d_model, or 8/3 d_model rounded up to 64 where it is gated."""
    vocab_size: Positive = 256
    """Number of token ids, as the embedding has rows."""
    context_length: Positive = 256
    """Most tokens that the model sees at once."""
    norm: Literal["layernorm", "rmsnorm", "rmsnorm-offset", "none"] = "rmsnorm"
    """Normalisation before each branch and at the end; `rmsnorm-offset` scales by 1 + weight, as Gemma does."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance before its square root."""
    post_norm: bool = False
    """Normalise each branch's output too, before it is added."""
    position: Literal["learned", "rope", "none"] = "rope"
    """How tokens know their place: a learned table, rotation of queries and keys, or not at all."""
    rope: RopeSettings = RopeSettings()
    """Rotary embeddings."""
    sliding_window: NonNegative = 0
    """Tokens that a token attends to, itself and those before it; 0: all of them."""
    sliding_window_pattern: NonNegative = 0
    """Every so many blocks one attends to all tokens whatever the window; 0: none does."""
    query_scale_dim: Positive = AUTO
    """Attention scores are divided by this number's root; `auto`: the width of a query."""
    attention_softcap: NonNegativeFloat = 0.0
    """Attention scores are bent to stay below this, c tanh(s / c), for which attention is `eager`; 0: they are not."""
    activation: Literal["gelu", "gelu-tanh", "relu", "swiglu", "geglu-tanh"] = "swiglu"
    """Non-linearity of the feed-forward; `gelu` is the exact one, `swiglu` and `geglu-tanh` are gated."""
    mla: MlaSettings = MlaSettings()
    """Latent attention."""
    moe: MoeSettings = MoeSettings()
    """Experts."""
    bias: bool = False
    """Biases in linear layers and in LayerNorm."""
    qkv_bias: bool = False
    """Biases in the projections to queries, keys and values, whatever `bias` says."""
    qk_norm: bool = False
    """RMS-normalise each head's queries and keys (with a learned scale) before the rotation."""
    scaled_embeddings: bool = False
    """Multiply the token embeddings by the root of d_model."""
    logit_softcap: NonNegativeFloat = 0.0
    """Logits are bent to stay below this, c tanh(x / c); 0: they are not."""
    tied_embeddings: bool = True
    """The output projection uses the token embedding's weights."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout after the embedding, on attention weights and on each branch's output, while training."""
    residual: bool = True
    """Add each branch to its input; off replaces instead of adding, to show what the addition does."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """`sdpa` is PyTorch's fused attention; `eager` is written out and holds all the attention weights."""
    weights: str = ""
    """A folder with Hugging Face weights (safetensors) to begin from; empty: random weights."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; branch outputs get it divided by sqrt(2 n_layers), as GPT-2's."""

    @model_validator(mode="before")
    @classmethod
    def _resolve_auto(cls, values: Any) -> Any:
        """Replace `auto` by its number wherever the numbers that it needs are there and make sense."""
        if not isinstance(values, dict):
            return values

        def given(key: str) -> Any:
            value = values.get(key, cls.model_fields[key].default)
            return value if type(value) is int and value > 0 else None

        resolved = dict(values)
        d_model, n_heads = given("d_model"), given("n_heads")
        if values.get("n_kv_heads", AUTO) == AUTO and n_heads:
            resolved["n_kv_heads"] = n_heads
        latent = _latent_head_dim(values.get("mla"))
        if values.get("head_dim", AUTO) == AUTO and latent:
            resolved["head_dim"] = latent
        elif values.get("head_dim", AUTO) == AUTO and d_model and n_heads:
            if d_model % n_heads:
                raise ConflictError(
                    f"model.d_model = {d_model} is not divisible by model.n_heads = {n_heads}; "
                    "choose a divisor, or set model.head_dim yourself",
                    *("model.d_model", "model.n_heads", "model.head_dim"),
                )
            resolved["head_dim"] = d_model // n_heads
        if values.get("d_ff", AUTO) == AUTO and d_model:
            gated = values.get("activation", cls.model_fields["activation"].default) in GATED
            resolved["d_ff"] = -(-8 * d_model // 3 // 64) * 64 if gated else 4 * d_model
        width = resolved.get("head_dim")
        if values.get("query_scale_dim", AUTO) == AUTO and type(width) is int and width > 0:
            resolved["query_scale_dim"] = width
        return resolved

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.n_heads % self.n_kv_heads:
            raise ConflictError(
                f"model.n_heads = {self.n_heads} is not divisible by model.n_kv_heads = {self.n_kv_heads}",
                *("model.n_kv_heads", "model.n_heads"),
            )
        if self.position == "rope" and not self.mla.kv_rank and self.head_dim % 2:
            raise ConflictError(
                f"model.head_dim = {self.head_dim} is odd; rope rotates pairs, so it must be even",
                *("model.head_dim", "model.d_model", "model.n_heads", "model.position"),
            )
        return self

    @model_validator(mode="after")
    def _latent_fits(self) -> Self:
        mla = self.mla
        if not mla.kv_rank:
            return self
        if self.head_dim != mla.nope_dim + mla.rope_dim:
            raise ConflictError(
                f"model.head_dim = {self.head_dim} must be model.mla.nope_dim = {mla.nope_dim} and"
                f" model.mla.rope_dim = {mla.rope_dim} together",
                *(f"model.{key}" for key in ("head_dim", "mla.nope_dim", "mla.rope_dim", "mla.kv_rank")),
            )
        if self.position == "rope" and mla.rope_dim % 2:
            raise ConflictError(
                f"model.mla.rope_dim = {mla.rope_dim} is odd; rope rotates pairs, so it must be even",
                *("model.mla.rope_dim", "model.position", "model.mla.kv_rank"),
            )
        for key, only in (("n_kv_heads", self.n_heads), ("qk_norm", False), ("bias", False), ("qkv_bias", False)):
            found = getattr(self, key)
            if found != only:
                raise ConflictError(
                    f"model.{key} = {json.dumps(found)}, but latent attention (model.mla.kv_rank = {mla.kv_rank})"
                    f" needs {json.dumps(only)}",
                    *(f"model.{key}", "model.mla.kv_rank"),
                )
        return self

    @model_validator(mode="after")
    def _experts_have_no_biases(self) -> Self:
        if self.moe.n_experts and self.bias:
            raise ConflictError(
                f"model.bias = true, but experts (model.moe.n_experts = {self.moe.n_experts}) have no biases",
                *("model.bias", "model.moe.n_experts"),
            )
        return self

    def has_experts(self, block: int) -> bool:
        """Whether block number `block`, counted from 0, has experts in the feed-forward's place."""
        return self.moe.n_experts > 0 and block >= self.moe.n_dense_layers

    def slides(self, block: int) -> bool:
        """Whether attention in block number `block`, counted from 0, is kept within the sliding window."""
        everywhere = self.sliding_window_pattern and (block + 1) % self.sliding_window_pattern == 0
        return self.sliding_window > 0 and not everywhere

    @property
    def rotary_dim(self) -> int:
        """Width of the part of a head that rope rotates."""
        return self.mla.rope_dim if self.mla.kv_rank else self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of a head's values."""
        return self.mla.value_dim if self.mla.kv_rank else self.head_dim

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies two projections."""
        return self.activation in GATED


def _latent_head_dim(mla: Any) -> int | None:
    """Width of a query of latent attention, from a section or a table, wherever its numbers make sense."""
    if isinstance(mla, MlaSettings):
        mla = mla.model_dump()
    if not isinstance(mla, dict):
        return None
    fields = MlaSettings.model_fields
    rank, *dims = (mla.get(key, fields[key].default) for key in ("kv_rank", "nope_dim", "rope_dim"))
    return sum(dims) if all(type(number) is int and number > 0 for number in (rank, *dims)) else None
