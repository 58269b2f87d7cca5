"""float32 operations with subnormals against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

from mxfp4ref import _ieee
from tests.helpers import exact


def test_ieee_operations_keep_subnormals_and_round_once() -> None:
    generator = np.random.default_rng(0)
    exponents = generator.integers(80, 130, (3, 2000))
    exponents[2] = generator.integers(0, 30, 2000)  # of the addend: near and among the subnormals
    bits = (
        generator.integers(0, 1 << 23, (3, 2000))
        | exponents << 23
        | generator.integers(0, 2, (3, 2000)) << 31
    )
    bits[0] -= 63 << 23
    a, b, c = torch.from_numpy(bits.astype(np.uint32).view(np.float32))
    for got, x, y, z in zip(_ieee.fma(a, b, c).tolist(), a.tolist(), b.tolist(), c.tolist(), strict=True):
        assert Fraction(got) == nearest_fp32(Fraction(x) * Fraction(y) + Fraction(z))
    tiny = 2.0**-100 * b
    for got, x, y in zip(_ieee.mul(a, tiny).tolist(), a.tolist(), tiny.tolist(), strict=True):
        assert Fraction(got) == nearest_fp32(Fraction(x) * Fraction(y))


def nearest_fp32(value: Fraction) -> Fraction:
    exponent = exact.floor_log2(abs(value)) if value else -126
    unit = exact.two_to(max(exponent, -126) - 23)
    return round(value / unit) * unit
