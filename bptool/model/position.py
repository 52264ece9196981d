"""Rotary position embeddings (Su et al. 2021), in the layout of Hugging Face's weights, with Llama 3.1's scaling.

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
    return angles_TP.cos(), angles_TP.sin()


def rotate(x_BHTQ: Tensor, angles: Rotation) -> Tensor:
    """Turn each head's pairs by their position's angles; element i is paired with element i + Q / 2.

    Low-precision input is rotated, and comes back, in float32.
    """
    cos_TP, sin_TP = angles
    first_BHTP, second_BHTP = x_BHTQ.chunk(2, dim=-1)
    return torch.cat((first_BHTP * cos_TP - second_BHTP * sin_TP, second_BHTP * cos_TP + first_BHTP * sin_TP), dim=-1)


def inverse_frequencies(head_dim: int, rope: RopeSettings, device: torch.device) -> Tensor:
    """Radians per position of each pair, [P], float32: theta^(-2i / Q), stretched as `rope.scaling` says."""
    exponents_P = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    frequencies_P = 1.0 / rope.theta**exponents_P
    return _llama3_scaled(frequencies_P, rope) if rope.scaling == "llama3" else frequencies_P


def _llama3_scaled(frequencies_P: Tensor, rope: RopeSettings) -> Tensor:
    """Llama 3.1's scaling (`apply_scaling` of meta-llama/llama-models).

    Wavelengths beyond original_context_length / low_frequency_factor are stretched by `factor`, those below
    original_context_length / high_frequency_factor are left alone, and a straight line in frequency joins the two.
    """
    turns_P = rope.original_context_length * frequencies_P / (2 * math.pi)
    kept_P = (turns_P - rope.low_frequency_factor) / (rope.high_frequency_factor - rope.low_frequency_factor)
    kept_P = kept_P.clamp(0, 1)
    return kept_P * frequencies_P + (1 - kept_P) * frequencies_P / rope.factor
