"""Rows of x for the compiled GEMM: in which of three ways a group of a row is summed up, and its numbers for that.

- PLAIN. All products are multiples of one unit and all their sums below 2^24 of it: float32 holds them exactly.
- SPLIT. Small products lose bits beside large ones. Those that may are cut to integers before they are added, the
  others, mostly all but two or three of the 32, are added as in PLAIN.
- WIDE. Exponents so far apart, or so near the lower end, that float32 would leave its range: each is cut, in float64.

Exponents that are near an end and not far apart are moved into the middle first, and the sum back.
"""

from __future__ import annotations

import math

import numpy as np

from mxfp4ref._compiled import compiled
from mxfp4ref.sm90.gemm.bit_loops import (
    exponent_of_bf16,
    f32,
    f64,
    float32_of,
    i8,
    i16,
    i32,
    i64,
    left,
    lowest_bit_of_bf16,
    right,
    u16,
    value_of_bf16,
)

__all__ = ["classify"]

PLAIN, SPLIT, WIDE = 0, 1, 2  # facts[group, row, WAY]
WAY, BOUND, UNIT, CUT_BITS, MOVED = 0, 1, 2, 3, 4

# Exponents of x of PLAIN and SPLIT. All else then stays in float32's normal range, and int8 holds the exponents of
# products, BIAS higher: 3 to 127, less if a factor is zero, which has no part in the largest exponent.
LOWEST, HIGHEST = -59, 62
BIAS = 63
DIGITS = 24  # of float32
NO_EXPONENT = -1000  # of a zero in WIDE
NONE = 1000  # the unit of zero
INFINITE = 128  # the exponent of Inf and NaN


@compiled("void(uint16[:,:,::1], int32[:,:,::1])", shapes="x[G, R, 32] facts[G, R, 5]")
def classify(x, facts):
    """The way of each row's group; whatever the weights, |t| < 2^bound and t is a multiple of 2^unit, or not finite.

    Args:
        x: `[G, R, 32]`, bf16 bits, changed: exponents are moved; beside Inf and NaN finite numbers become zeros,
            since they have no part in the sum, unless it may overflow without Inf.
        facts: `[G, R, 5]`, written: the way, bound, unit, a bit for each x whose products may have to be cut, in
            WIDE all, and how far down exponents were moved. The products of the others are multiples of
            2^(bound - 24), which is more than the step keeps.
    """
    last_bits, numbers = np.empty(32, i32), np.empty(32, f64)
    for group in range(x.shape[0]):
        for row in range(x.shape[1]):
            unit, lowest, highest = i32(NONE), i32(NONE), i32(-NONE)
            for k in range(32):
                bits = i32(x[group, row, k] & 0x7FFF)
                exponent = i32((bits >> 7) - 127)
                last_bits[k] = lowest_bit_of_bf16(bits) if bits else i32(NONE)
                unit = min(unit, last_bits[k])
                lowest = min(lowest, exponent if bits else i32(NONE))
                highest = max(highest, exponent if bits else i32(-NONE))
                numbers[k] = f64(float32_of(bits << 16)) if exponent < INFINITE else 0.0
            for half in (16, 8, 4, 2, 1):  # by pairs, since one after the other would wait for each sum
                for k in range(half):
                    numbers[k] += numbers[k + half]
            bound, unit = math.frexp(6 * numbers[0])[1], unit - 1  # weights are multiples of 0.5 up to 6
            cut = i32(0)
            for k in range(32):
                cut |= left(i32(bound - (last_bits[k] - 1) > DIGITS), i32(k))
            moved = max(highest - HIGHEST, min(lowest - LOWEST, 0))
            way = SPLIT if cut else PLAIN
            if highest == INFINITE and bound <= 127:
                way, moved, cut = PLAIN, 0, i32(0)
                for k in range(32):
                    x[group, row, k] *= (x[group, row, k] & 0x7FFF) >= 0x7F80
            elif highest == INFINITE or lowest - moved < LOWEST or (moved and unit < -126):
                way, moved, cut = WIDE, 0, i32(-1)
            elif moved:
                for k in range(32):
                    x[group, row, k] -= left(moved, i32(7)) if x[group, row, k] & 0x7FFF else 0
            facts[group, row, WAY], facts[group, row, MOVED] = way, moved
            facts[group, row, BOUND], facts[group, row, UNIT] = bound, unit
            facts[group, row, CUT_BITS] = cut


@compiled()
def load(x_bits, group, row, cut_bits, x):
    """Zeros in the place of what may have to be cut."""
    for k in range(32):
        number = float32_of(i32(x_bits[group, row, k]) << 16)
        x[k] = f32(0) if right(cut_bits, i32(k)) & i32(1) else number


@compiled()
def load_exponents(x_bits, group, row, exponents):
    """BIAS higher, 0 of zeros."""
    for k in range(32):
        bits = x_bits[group, row, k]
        exponent = i8(i16(right(bits, u16(7)) & i16(255)) - i16(127 - BIAS))
        exponents[k] = exponent if bits & u16(0x7FFF) else i8(0)


@compiled()
def load_wide(x_bits, group, row, exponents, parts):
    """Exponents, and x in float64: what is finite, and what is not, each with zeros for the other."""
    for k in range(32):
        bits = i64(x_bits[group, row, k])
        exponents[k] = exponent_of_bf16(bits) if bits & 0x7FFF else NO_EXPONENT
        value = value_of_bf16(bits)
        is_finite = abs(value) < np.inf
        parts[0, k], parts[1, k] = value if is_finite else 0.0, 0.0 if is_finite else value
