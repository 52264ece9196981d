from __future__ import annotations

import cmath
import math

import pytest
import torch

from bptool.config.schema import RopeSettings
from bptool.model.position import inverse_frequencies, rotate, rotation

CPU = torch.device("cpu")
PLAIN = RopeSettings(theta=500.0)
LLAMA3 = RopeSettings(theta=500000.0, scaling="llama3", factor=32.0, original_context_length=8192)


def test_frequencies_are_powers_of_theta() -> None:
    found = inverse_frequencies(8, PLAIN, CPU)
    assert found.tolist() == pytest.approx([1.0, 500 ** (-2 / 8), 500 ** (-4 / 8), 500 ** (-6 / 8)])
    assert found.dtype == torch.float32


def meta_scaled(frequency: float, rope: RopeSettings) -> float:
    """`apply_scaling` of Meta's Llama 3.1 reference code, for one frequency."""
    wavelength = 2 * math.pi / frequency
    if wavelength < rope.original_context_length / rope.high_frequency_factor:
        return frequency
    if wavelength > rope.original_context_length / rope.low_frequency_factor:
        return frequency / rope.factor
    smooth = rope.original_context_length / wavelength - rope.low_frequency_factor
    smooth /= rope.high_frequency_factor - rope.low_frequency_factor
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


def test_llama3_scaling_is_metas() -> None:
    wanted = [meta_scaled(500000 ** (-2 * i / 128), LLAMA3) for i in range(64)]
    unscaled = [500000 ** (-2 * i / 128) for i in range(64)]
    ratios = {round(b / a, 3) for a, b in zip(unscaled, wanted, strict=True)}
    assert {1.0, 0.031} < ratios  # some are left alone, some stretched in full, some between
    assert inverse_frequencies(128, LLAMA3, CPU).tolist() == pytest.approx(wanted, rel=1e-6)


def test_rotation_is_multiplication_of_complex_numbers() -> None:
    """Element i and element i + Q/2 are the real and the imaginary part: Hugging Face's layout."""
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    turned = rotate(x, rotation(5, 4, PLAIN, CPU))
    for position in range(5):
        for pair in range(2):
            before = complex(x[1, 2, position, pair], x[1, 2, position, pair + 2])
            after = before * cmath.exp(1j * position * 500 ** (-2 * pair / 4))
            assert complex(turned[1, 2, position, pair], turned[1, 2, position, pair + 2]) == pytest.approx(after)


@pytest.mark.parametrize("rope", [PLAIN, LLAMA3])
def test_products_depend_on_the_distance_alone(rope: RopeSettings) -> None:
    q, k = torch.randn(2, 16, dtype=torch.float64)
    angles = rotation(40, 16, rope, CPU)
    q_HTQ, k_HTQ = (rotate(x.expand(1, 40, 16), angles) for x in (q, k))
    products = (q_HTQ @ k_HTQ.mT)[0]
    for distance in (0, 1, 17):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert products[17, 0] != pytest.approx(products[0, 0].item(), abs=1e-3)


def test_angles_stay_exact_in_low_precision() -> None:
    """At position 3000 bfloat16 knows angles to the nearest 8 radians; ours are float32 whatever the weights are."""
    cos, sin = rotation(3001, 4, PLAIN, CPU)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos[3000, 0].item() == pytest.approx(math.cos(3000), abs=1e-6)
    x = torch.ones(1, 1, 3001, 4, dtype=torch.bfloat16)
    assert rotate(x, (cos, sin))[0, 0, 3000, 0].item() == pytest.approx(math.cos(3000) - math.sin(3000), abs=1e-6)
