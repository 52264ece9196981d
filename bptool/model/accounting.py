"""What a transformer holds and does, in closed form: parameters, and FLOPs for each token. Nothing is built.

A multiply-add is two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from bptool.config.schema import ModelSettings


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters in each part of a model; with tied embeddings `head` is 0.

    `idle` are those of the blocks' that are of experts which a token does not take.
    """

    embedding: int
    position: int
    blocks: int
    final_norm: int
    head: int
    idle: int = 0

    @property
    def total(self) -> int:
        """All the parameters, each counted once."""
        return self.embedding + self.position + self.blocks + self.final_norm + self.head

    @property
    def active(self) -> int:
        """Those that one token meets."""
        return self.total - self.idle


def count_parameters(settings: ModelSettings) -> ParameterCount:
    """Parameters of `Transformer(settings)`, part by part."""
    d_model, vocab_size = settings.d_model, settings.vocab_size
    return ParameterCount(
        embedding=vocab_size * d_model,
        position=settings.context_length * d_model if settings.position == "learned" else 0,
        blocks=sum(_block_parameters(settings, block) for block in range(settings.n_layers)),
        final_norm=_norm_parameters(settings),
        head=0 if settings.tied_embeddings else vocab_size * d_model,
        idle=sum(_idle_weights(settings, block) for block in range(settings.n_layers)),
    )


def flops_per_token(settings: ModelSettings, sequence_length: int) -> int:
    """Model FLOPs of a forward and its backward, for each token of sequences of `sequence_length` tokens.

    The convention is that of PaLM (Chowdhery et al. 2022, appendix B): 6 N + 12 L H Q T for L blocks of H heads of
    width Q and T tokens (where keys and values differ in width, Q is the mean of the two). N counts the weights that a
    token is multiplied with (2 FLOPs forward, 4 backward), the output projection and the router among them, and of the
    experts those that it takes. Attention's two products are taken over all T positions, not the half that a causal
    mask leaves, nor the fewer of a sliding window. Not counted: embedding lookups, biases, norms, activations, softmax,
    the rotation, the choice of experts and the sum of their outputs, the optimizer, and recomputation. A forward alone
    is a third of it.
    """
    blocks = sum(block_flops_per_token(settings, i, sequence_length).total for i in range(settings.n_layers))
    return 3 * blocks + 6 * settings.vocab_size * settings.d_model


@dataclass(frozen=True)
class BlockFlops:
    """FLOPs of one block's forward, for each token.

    Attributes:
        attention_matrices: queries, keys, values and output.
        scores: attention's two products.
        feed_forward: its matrices, the router's among them.
    """

    attention_matrices: int
    scores: int
    feed_forward: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.attention_matrices + self.scores + self.feed_forward


def block_flops_per_token(settings: ModelSettings, block: int, sequence_length: int) -> BlockFlops:
    """The same convention as `flops_per_token`, of a forward."""
    return BlockFlops(
        attention_matrices=2 * _attention_weights(settings),
        scores=2 * settings.n_heads * (settings.head_dim + settings.value_dim) * sequence_length,
        feed_forward=2 * _taken_weights(settings, block),
    )


def _attention_weights(settings: ModelSettings) -> int:
    if settings.mla.kv_rank:
        return _latent_attention_weights(settings)
    query, kept = settings.n_heads * settings.head_dim, settings.n_kv_heads * settings.head_dim
    return settings.d_model * (2 * query + 2 * kept)


def _latent_attention_weights(settings: ModelSettings) -> int:
    d_model, n_heads, mla = settings.d_model, settings.n_heads, settings.mla
    queries = n_heads * settings.head_dim
    query = mla.q_rank * (d_model + queries) if mla.q_rank else d_model * queries
    down = d_model * (mla.kv_rank + mla.rope_dim)
    return query + down + n_heads * (mla.kv_rank * (mla.nope_dim + mla.value_dim) + mla.value_dim * d_model)


def _taken_weights(settings: ModelSettings, block: int) -> int:
    """The feed-forward's matrices in a block, as many as one token is multiplied with."""
    moe, matrices = settings.moe, _feed_forward_matrices(settings)
    if not settings.has_experts(block):
        return matrices * settings.d_model * settings.d_ff
    return settings.d_model * (moe.n_experts + matrices * moe.d_expert * (moe.n_active + moe.n_shared))


def _idle_weights(settings: ModelSettings, block: int) -> int:
    """The matrices of the experts that a token does not take."""
    if not settings.has_experts(block):
        return 0
    idle = settings.moe.n_experts - settings.moe.n_active
    return idle * _feed_forward_matrices(settings) * settings.d_model * settings.moe.d_expert


def _block_parameters(settings: ModelSettings, block: int) -> int:
    query, kept = settings.n_heads * settings.head_dim, settings.n_kv_heads * settings.head_dim
    inner = (_feed_forward_matrices(settings) - 1) * settings.d_ff
    biases = settings.d_model + inner + settings.d_model if settings.bias else 0
    biases += query + 2 * kept if settings.bias or settings.qkv_bias else 0
    head_norms = 2 * settings.head_dim if settings.qk_norm else 0
    head_norms += settings.mla.q_rank + settings.mla.kv_rank if settings.mla.kv_rank else 0
    corrections = settings.moe.n_experts if settings.has_experts(block) and settings.moe.router == "sigmoid" else 0
    norms = (4 if settings.post_norm else 2) * _norm_parameters(settings)
    weights = _attention_weights(settings) + _taken_weights(settings, block) + _idle_weights(settings, block)
    return weights + biases + corrections + head_norms + norms


def _feed_forward_matrices(settings: ModelSettings) -> int:
    return 3 if settings.gated else 2


def _norm_parameters(settings: ModelSettings) -> int:
    match settings.norm:
        case "layernorm":
            return settings.d_model * (2 if settings.bias else 1)
        case "rmsnorm" | "rmsnorm-offset":
            return settings.d_model
        case "none":
            return 0
