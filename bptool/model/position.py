"""Rotary position embeddings (Su et al. 2021), in the layout of Hugging Face's weights, and how they are stretched.

Shapes: B batch, T tokens, H heads, Q head width, P pairs of a head (Q / 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bptool.config.schema import RopeSettings

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of each position's angles, each [T, P], float32."""


def rotation(n_tokens: int, head_dim: int, rope: RopeSettings, device: torch.device) -> Rotation:
    """The angles' cosines and sines for positions 0 ... n_tokens - 1.

    Made anew in each forward: a table kept as a buffer would be rounded by `.to(bfloat16)` and be lost on `meta`.
    """
    positions_T = torch.arange(n_tokens, device=device, dtype=torch.float32)
    angles_TP = torch.outer(positions_T, inverse_frequencies(head_dim, rope, device))
    cos_TP, sin_TP = angles_TP.cos(), angles_TP.sin()
    growth = _yarn_growth(rope, rope.mscale) / _yarn_growth(rope, rope.mscale_all_dim)
    return (cos_TP, sin_TP) if growth == 1 else (cos_TP * growth, sin_TP * growth)


def rotate(x_BHTQ: Tensor, angles: Rotation) -> Tensor:
    """Turn each head's pairs by their position's angles; element i is paired with element i + Q / 2.

    Low-precision input is rotated, and comes back, in float32.
    """
    cos_TP, sin_TP = angles
    first_BHTP, second_BHTP = x_BHTQ.chunk(2, dim=-1)
    return torch.cat((first_BHTP * cos_TP - second_BHTP * sin_TP, second_BHTP * cos_TP + first_BHTP * sin_TP), dim=-1)


def rotate_interleaved(x_BHTR: Tensor, angles: Rotation) -> Tensor:
    """The same where element 2 i is paired with element 2 i + 1, as DeepSeek's weights are; the pairs come back apart.

    Queries and keys come back in the same order, so their products are those of the pairs left where they were.
    """
    return rotate(torch.cat((x_BHTR[..., 0::2], x_BHTR[..., 1::2]), dim=-1), angles)


def inverse_frequencies(head_dim: int, rope: RopeSettings, device: torch.device) -> Tensor:
    """Radians per position of each pair, [P], float32: theta^(-2i / Q), stretched as `rope.scaling` says."""
    exponents_P = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    frequencies_P = 1.0 / rope.theta**exponents_P
    match rope.scaling:
        case "none":
            return frequencies_P
        case "linear":
            return frequencies_P / rope.factor
        case "llama3":
            return _llama3_scaled(frequencies_P, rope)
        case "yarn":
            return _yarn_scaled(frequencies_P, rope)


def yarn_score_factor(rope: RopeSettings) -> float:
    """What attention scores grow by, beside the growth of queries and keys: DeepSeek's `mscale_all_dim`."""
    return _yarn_growth(rope, rope.mscale_all_dim) ** 2


def _llama3_scaled(frequencies_P: Tensor, rope: RopeSettings) -> Tensor:
    """Llama 3.1's scaling (`apply_scaling` of meta-llama/llama-models).

    Wavelengths beyond original_context_length / low_frequency_factor are stretched by `factor`, those below
    original_context_length / high_frequency_factor are left alone, and a straight line in frequency joins the two.
    """
    turns_P = rope.original_context_length * frequencies_P / (2 * math.pi)
    kept_P = (turns_P - rope.low_frequency_factor) / (rope.high_frequency_factor - rope.low_frequency_factor)
    kept_P = kept_P.clamp(0, 1)
    return kept_P * frequencies_P + (1 - kept_P) * frequencies_P / rope.factor


def _yarn_scaled(frequencies_P: Tensor, rope: RopeSettings) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2), with the band's edges on whole pairs, as its authors' code has them.

    Pairs that turn less than `beta_slow` times within original_context_length are stretched by `factor`, those that
    turn more than `beta_fast` times are left alone, and a straight line in the pair's number joins the two.
    """
    n_pairs = frequencies_P.shape[0]
    low, high = math.floor(_pair(rope.beta_fast, n_pairs, rope)), math.ceil(_pair(rope.beta_slow, n_pairs, rope))
    low, high = max(low, 0), min(high, 2 * n_pairs - 1)
    numbers_P = torch.arange(n_pairs, device=frequencies_P.device, dtype=torch.float32)
    stretched_P = ((numbers_P - low) / max(high - low, 0.001)).clamp(0, 1)
    return stretched_P * frequencies_P / rope.factor + (1 - stretched_P) * frequencies_P


def _pair(turns: float, n_pairs: int, rope: RopeSettings) -> float:
    """Number of the pair, not rounded, that turns so often within original_context_length."""
    return n_pairs * math.log(rope.original_context_length / (turns * 2 * math.pi)) / math.log(rope.theta)


def _yarn_growth(rope: RopeSettings, mscale: float) -> float:
    """Of queries and keys: stretched attention is too flat (YaRN, section 3.4)."""
    grows = rope.scaling == "yarn" and rope.factor > 1
    return 1 + 0.1 * mscale * math.log(rope.factor) if grows else 1.0
