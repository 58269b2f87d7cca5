"""The FP8 GEMM of W4A8 as a loop for a CPU (`docs/arithmetic.md`, section 10).

Columns lie side by side, in lanes. Of each step of 32 products the largest exponent comes first, then the sum of the
terms as integers: a product times a power of two is exact in float32 and its conversion to an integer truncates.
"""

from __future__ import annotations

import numpy as np

from mxfp4ref._compiled import compiled

__all__ = ["gemm"]

LANES = 32
STEP = 32
FRACTION_BITS = 13
KEPT = -(1 << (23 - FRACTION_BITS))  # the bits of a result
NO_EXPONENT = -100  # of a zero, twice of which has no part in the largest exponent either
LEAST = -60  # where no term takes part, below which nothing is

i16, i32, f32 = np.int16, np.int32, np.float32


@compiled()
def power_of_two(exponent):
    return i32(i32(exponent + i32(127)) << i32(23)).view(f32)


@compiled(
    "void(uint8[:,::1], uint8[:,::1], uint8[:,::1], "
    "uint8[:,::1], float32[::1], int16[::1], int64[::1], float32[:,::1])",
    shapes="offsets[N, G] x[M, 32*G] packed[N, 16*G] table[256, 16] values[256] exponents[256] columns[2] out[M, N]",
)
def gemm(x, packed, offsets, table, values, exponents, columns, out):
    """Finite sums of products.

    Args:
        x: `[M, K]`, E4M3, NaN counting as zero.
        packed: `[N, K/2]`, E2M1 codes.
        offsets: `[N, K/32]`.
        table: `[256, 16]`, the E4M3 byte of an offset and a code.
        values: `[256]`, the number of an E4M3 byte, zero for NaN.
        exponents: `[256]`, its exponent, `NO_EXPONENT` of a zero.
        columns: first and last + 1.
        out: `[M, N]`, written in these columns.
    """
    depth = x.shape[1]
    w, w_exponents = np.zeros((depth, LANES), f32), np.empty((depth, LANES), i16)
    sums, largest, accumulators = np.empty(LANES, i32), np.empty(LANES, i16), np.empty(LANES, f32)
    to_units, units = np.empty(LANES, f32), np.empty(LANES, f32)
    for first in range(columns[0], columns[1], LANES):
        width = min(LANES, columns[1] - first)
        w[:] = 0
        w_exponents[:] = NO_EXPONENT
        for lane in range(width):
            for k in range(depth):
                code = (packed[first + lane, k >> 1] >> (4 * (k & 1))) & 15
                byte = table[offsets[first + lane, k // STEP], code]
                w[k, lane], w_exponents[k, lane] = values[byte], exponents[byte]
        for row in range(x.shape[0]):
            for lane in range(LANES):
                accumulators[lane] = 0
            for start in range(0, depth, STEP):
                for lane in range(LANES):
                    field = i32(f32(accumulators[lane]).view(i32) >> i32(23)) & i32(255)
                    largest[lane] = i16(field - 127) if field else i16(LEAST)
                for k in range(start, start + STEP):
                    exponent = exponents[x[row, k]]
                    for lane in range(LANES):
                        largest[lane] = max(largest[lane], i16(exponent + w_exponents[k, lane]))
                for lane in range(LANES):
                    unit = i32(largest[lane]) - i32(FRACTION_BITS)
                    to_units[lane], units[lane] = power_of_two(-unit), power_of_two(unit)
                    sums[lane] = i32(accumulators[lane] * to_units[lane])
                for k in range(start, start + STEP):
                    number = values[x[row, k]]
                    for lane in range(LANES):
                        sums[lane] += i32(number * w[k, lane] * to_units[lane])
                for lane in range(LANES):
                    kept = i32(f32(sums[lane]).view(i32) & i32(KEPT))
                    accumulators[lane] = kept.view(f32) * units[lane]
            for lane in range(width):
                out[row, first + lane] = accumulators[lane]
