"""Numbers by their bits: parts of the compiled GEMM's loops.

numba's operators turn integers into 64 bits, of which a vector holds half as many; numpy's functions, used for shifts
where it matters, leave them as they are.
"""

from __future__ import annotations

import numpy as np

from mxfp4ref._compiled import compiled

i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
u16, u32, f32, f64 = np.uint16, np.uint32, np.float32, np.float64
left, right = np.left_shift, np.right_shift


@compiled()
def float32_of(bits):
    return i32(bits).view(f32)


@compiled()
def bits_of(number):
    return f32(number).view(i32)


@compiled()
def power64(exponent):
    return i64((i64(exponent) + 1023) << 52).view(f64)


@compiled()
def exponent_of_bf16(bits):
    """That of a subnormal number is the smallest."""
    return max((bits >> 7) & 0xFF, 1) - 127


@compiled()
def value_of_bf16(bits):
    """In float64; by integers, as a CPU told to may take subnormal numbers for zeros."""
    field, fraction = bits >> 7 & 0xFF, bits & 0x7F
    if field == 255:
        magnitude = np.nan if fraction else np.inf
    else:
        magnitude = (fraction | (0x80 if field else 0)) * power64(exponent_of_bf16(bits) - 7)
    return -magnitude if bits >> 15 else magnitude


@compiled()
def lowest_bit_of_bf16(magnitude):
    """The exponent of the last bit that is set in a bf16 number that is neither 0 nor subnormal."""
    significand = i32(magnitude & 0x7F | 0x80)
    return i32((magnitude >> 7) - 127 - 7 + (bits_of(f32(i32(significand & -significand))) >> 23) - 127)
