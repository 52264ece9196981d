"""What a transformer holds and does, in closed form: parameters, and FLOPs for each token. Nothing is built.

A multiply-add is two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from bptool.config.schema import ModelSettings


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters in each part of a model; with tied embeddings `head` is 0."""

    embedding: int
    position: int
    blocks: int
    final_norm: int
    head: int

    @property
    def total(self) -> int:
        """All the parameters, each counted once."""
        return self.embedding + self.position + self.blocks + self.final_norm + self.head


def count_parameters(settings: ModelSettings) -> ParameterCount:
    """Parameters of `Transformer(settings)`, part by part."""
    d_model, vocab_size = settings.d_model, settings.vocab_size
    return ParameterCount(
        embedding=vocab_size * d_model,
        position=settings.context_length * d_model if settings.position == "learned" else 0,
        blocks=settings.n_layers * _block_parameters(settings),
        final_norm=_norm_parameters(settings),
        head=0 if settings.tied_embeddings else vocab_size * d_model,
    )


def flops_per_token(settings: ModelSettings, sequence_length: int) -> int:
    """Model FLOPs of a forward and its backward, for each token of sequences of `sequence_length` tokens.

    The convention is that of PaLM (Chowdhery et al. 2022, appendix B): 6 N + 12 L H Q T for L blocks of H heads of
    width Q and T tokens. N counts the weights that a token is multiplied with (2 FLOPs forward, 4 backward), the
    output projection among them. Attention's two products are taken over all T positions, not the half that a causal
    mask leaves, nor the fewer of a sliding window. Not counted: embedding lookups, biases, norms, activations, softmax,
    the rotation, the optimizer, and recomputation. A forward alone is a third of it.
    """
    weights = settings.n_layers * _block_matmul_weights(settings) + settings.vocab_size * settings.d_model
    attention = settings.n_layers * settings.n_heads * settings.head_dim * sequence_length
    return 6 * weights + 12 * attention


def _block_matmul_weights(settings: ModelSettings) -> int:
    query, kept = settings.n_heads * settings.head_dim, settings.n_kv_heads * settings.head_dim
    feed_forward = _feed_forward_matrices(settings) * settings.d_ff
    return settings.d_model * (2 * query + 2 * kept + feed_forward)


def _block_parameters(settings: ModelSettings) -> int:
    query, kept = settings.n_heads * settings.head_dim, settings.n_kv_heads * settings.head_dim
    inner = (_feed_forward_matrices(settings) - 1) * settings.d_ff
    biases = settings.d_model + inner + settings.d_model if settings.bias else 0
    biases += query + 2 * kept if settings.bias or settings.qkv_bias else 0
    head_norms = 2 * settings.head_dim if settings.qk_norm else 0
    norms = (4 if settings.post_norm else 2) * _norm_parameters(settings)
    return _block_matmul_weights(settings) + biases + head_norms + norms


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
