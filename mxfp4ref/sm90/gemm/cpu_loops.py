"""The group-scaled GEMM as loops for a CPU (docs/arithmetic.md, "The GEMMs").

For each output element and each group of 32 along K, two tensor-core steps give a sum t, and the accumulator
becomes fma(t, scale, accumulator). COLUMNS output columns lie side by side, so that the compiler makes vector
instructions of the loops over them, and the weights of a group are unpacked once for all rows.

How the sum of a row's group is formed depends on the row alone (`classify`):

- PLAIN. All products are multiples of one unit and all their sums below 2^24 of it: float32 holds them exactly.
- SPLIT. Small products lose bits beside large ones, so each is cut to an integer before it is added.
- WIDE. Inf, NaN, or exponents so near the ends that float32 would leave its range: like SPLIT, in float64.

No float32 operation here has a subnormal operand or result, so a CPU that flushes those changes nothing.
"""

from __future__ import annotations

import math

import numpy as np

from mxfp4ref._compiled import compiled

__all__ = ["classify", "gemm"]

PLAIN, SPLIT, WIDE = 0, 1, 2  # facts[group, row, WAY]
WAY, BOUND, UNIT = 0, 1, 2
EVERY_ROW = (
    2  # takes a step of the order; else 0, rows that do not swap the first two groups, or 1, rows that do
)

COLUMNS = 128  # the weights of one group, 16 KiB as float32, stay in the nearest cache

LOWEST, HIGHEST = -60, 80  # exponents of x of PLAIN and SPLIT: all else stays in float32's normal range
BELOW_ALL = -70  # below the exponents of their nonzero products and sums
NO_EXPONENT = -1000  # of a zero, which has no part in the largest exponent
CUT = 25  # terms are cut to multiples of 2^(largest exponent - 25)

TWICE_E2M1 = 0xC8643210  # digit m is twice the magnitude of code m, which are 0, 0.5, 1, 1.5, 2, 3, 4, 6
SMALLEST = 2.0**-126
ROUNDS_TO_SMALLEST = 2.0**-126 * (1 - 2.0**-25)
NAN_BITS, HALF_BITS, SIGN_BIT = np.int32(0x7FFFFFFF), np.int32(0x3F000000), np.int32(-(1 << 31))

i16, i32, i64, u32, f32, f64 = np.int16, np.int32, np.int64, np.uint32, np.float32, np.float64


@compiled()
def float32_of(bits):
    return i32(bits).view(f32)


@compiled()
def bits_of(number):
    return f32(number).view(i32)


@compiled()
def power32(exponent):
    return float32_of((exponent + 127) << 23)


@compiled()
def power64(exponent):
    return i64((i64(exponent) + 1023) << 52).view(f64)


@compiled()
def exponent_of_bf16(bits):
    """That of a subnormal number is the smallest."""
    return max((bits >> 7) & 0xFF, 1) - 127


@compiled()
def value_of_bf16(bits):
    fraction = bits & 0x7F
    if (bits >> 7) & 0xFF == 255:
        magnitude = np.nan if fraction else np.inf
    else:
        leading = 0x80 if (bits >> 7) & 0xFF else 0
        magnitude = (leading | fraction) * power64(exponent_of_bf16(bits) - 7)
    return -magnitude if bits >> 15 else magnitude


@compiled()
def vectors(count, dtype):
    """Zeros `[count, COLUMNS]` that start a cache line, since a vector across two takes twice as long."""
    size = count * COLUMNS
    buffer = np.zeros(size + 64, dtype)
    start = -buffer.ctypes.data % 64 // buffer.itemsize
    return buffer[start : start + size].reshape((count, COLUMNS))


@compiled("void(uint16[:,:,::1], int16[:,:,::1])")
def classify(x, facts):
    """The way of each row's group; whatever the weights, |t| < 2^bound and t is a multiple of 2^unit (not of WIDE).

    Args:
        x: `[G, M, 32]`, bf16 bits.
        facts: `[G, M, 3]`, written.
    """
    for group in range(x.shape[0]):
        for row in range(x.shape[1]):
            total, unit, lowest, highest = 0.0, i32(1000), i32(LOWEST), i32(HIGHEST)
            for k in range(32):
                bits = i32(x[group, row, k] & 0x7FFF)
                exponent, significand = i32((bits >> 7) - 127), i32(bits & 0x7F | 0x80)
                last_bit = i32(exponent - 7 + (bits_of(f32(i32(significand & -significand))) >> 23) - 127)
                unit = min(unit, last_bit if bits else i32(1000))
                lowest = min(lowest, exponent if bits else i32(LOWEST))
                highest = max(highest, exponent)
                total += f64(float32_of(bits << 16))
            bound, unit = math.frexp(6 * total)[1], unit - 1  # weights are multiples of 0.5 up to 6
            way = PLAIN if bound - unit <= 24 else SPLIT
            facts[group, row, WAY] = way if lowest >= LOWEST and highest <= HIGHEST else WIDE
            facts[group, row, BOUND], facts[group, row, UNIT] = bound, unit


@compiled()
def load_x(x_bits, group, m, x, r):
    for k in range(32):
        x[r, k] = float32_of(i32(x_bits[group, m, k]) << 16)


@compiled()
def load_exponents(x_bits, group, m, x_exponents):
    for k in range(32):
        bits = i64(x_bits[group, m, k])
        x_exponents[k] = exponent_of_bf16(bits) if bits & 0x7FFF else NO_EXPONENT


@compiled()
def load_parts(x_bits, group, m, x_parts):
    """x in float64: what is finite, and what is not, each with zeros for the other."""
    for k in range(32):
        value = value_of_bf16(i64(x_bits[group, m, k]))
        is_finite = abs(value) < np.inf
        x_parts[0, k], x_parts[1, k] = value if is_finite else 0.0, 0.0 if is_finite else value


@compiled()
def fetch(packed, scale_bytes, first, count, words, scales):
    """Lay columns side by side, 32 at a time: as many rows of memory as a CPU reads ahead in."""
    for strip in range(0, count, 32):
        for group in range(scale_bytes.shape[1]):
            for j in range(strip, min(strip + 32, count)):
                for i in range(4):
                    words[4 * group + i, j] = packed[first + j, 4 * group + i]
    for j in range(count):
        for group in range(scale_bytes.shape[1]):
            scales[group, j] = float32_of(i32(scale_bytes[first + j, group]) << 23)


@compiled()
def unpack(words, group, with_exponents, w, w_exponents):
    """The 32 weights of each column in a group."""
    for i in range(4):
        for j in range(COLUMNS):
            word = u32(words[4 * group + i, j])
            for b in range(8):
                magnitude = word >> u32(4 * b) & u32(7)
                twice = u32(TWICE_E2M1) >> (magnitude << u32(2)) & u32(15)
                half = float32_of(i32(word << u32(28 - 4 * b)) & SIGN_BIT | HALF_BITS)
                w[8 * i + b, j] = f32(i32(twice)) * half
    if with_exponents:
        for k in range(32):
            for j in range(COLUMNS):
                field = i32(bits_of(w[k, j]) >> 23 & 255)
                w_exponents[k, j] = i16(field - 127 if field else NO_EXPONENT)


# --- the sum t of a group ------------------------------------------------------------------------------------


@compiled()
def plain_sums(x, w, t):
    """Of two rows, of which the second may be left over from before. In any order, and fused or not: all is exact."""
    for j in range(COLUMNS):
        t[0, j] = t[1, j] = 0
    for part in range(0, 32, 8):  # eight of each row stay in registers
        for j in range(COLUMNS):
            first, second = t[0, j], t[1, j]
            for k in range(part, part + 8):
                first += x[0, k] * w[k, j]
                second += x[1, k] * w[k, j]
            t[0, j], t[1, j] = first, second


@compiled()
def find_largest(x_exponents, w_exponents, largest):
    """The largest exponent of each step's products."""
    for step in range(2):
        for j in range(COLUMNS):
            exponent = i16(NO_EXPONENT)
            for k in range(16 * step, 16 * step + 16):
                exponent = max(exponent, i16(x_exponents[k] + w_exponents[k, j]))
            largest[step, j] = exponent


@compiled()
def split_sum(x, x_exponents, w, w_exponents, largest, t):
    """Converting to int32 cuts toward zero. 16 products below 3 * 2^25 units and a sum below 2^26 fit."""
    find_largest(x_exponents, w_exponents, largest)
    for j in range(COLUMNS):
        t[0, j] = 0
    for step in range(2):
        for j in range(COLUMNS):
            of_sum = i32((bits_of(t[0, j]) >> 23 & 255) - 127)
            exponent = i32(max(i32(largest[step, j]), of_sum, i32(BELOW_ALL)))
            per_unit, unit = power32(CUT - exponent), power32(exponent - CUT)
            total = i32(t[0, j] * per_unit)
            for k in range(16 * step, 16 * step + 16):
                total = i32(total + i32(x[0, k] * w[k, j] * per_unit))
            nearest = f32(total)
            too_large = abs(i32(nearest)) > abs(total)  # then the next number toward zero is meant
            t[0, j] = float32_of(bits_of(nearest) - i32(too_large)) * unit


@compiled()
def wide_sum(x_parts, x_exponents, w, w_exponents, largest, parts, t):
    """As `split_sum`, in float64. Inf and NaN are added up apart; where there are any they are the sum."""
    find_largest(x_exponents, w_exponents, largest)
    for j in range(COLUMNS):
        parts[1, j] = parts[0, j] = 0
    for step in range(2):
        for k in range(16 * step, 16 * step + 16):
            if x_parts[1, k] != 0:
                for j in range(COLUMNS):
                    parts[1, j] += x_parts[1, k] * f64(w[k, j])
        for j in range(COLUMNS):
            of_sum = max((f64(parts[0, j]).view(i64) >> 52 & 2047) - 1023, -126) if parts[0, j] != 0 else -200
            exponent = max(i64(largest[step, j]), of_sum)
            per_unit, unit = power64(CUT - exponent), power64(exponent - CUT)
            total = i32(parts[0, j] * per_unit)
            for k in range(16 * step, 16 * step + 16):
                total = i32(total + i32(x_parts[0, k] * f64(w[k, j]) * per_unit))
            # Toward zero to 24 bits, and to multiples of 2^-149.
            result = i64(f64(total).view(i64) & -(1 << 29)).view(f64) * unit
            parts[0, j] = result if abs(result) >= SMALLEST else f64(i32(result * 2.0**149)) * 2.0**-149
            overflow = parts[0, j] * np.inf if abs(parts[0, j]) >= 2.0**128 else 0.0
            parts[1, j] = parts[1, j] if parts[1, j] != 0 else overflow
    for j in range(COLUMNS):
        finite = parts[0, j] if abs(parts[0, j]) >= SMALLEST else 0.0
        t[0, j] = f32(parts[1, j] if parts[1, j] != 0 else finite)


@compiled()
def accumulate(acc, m, t, r, scales, group, carefully):
    """acc[m] = fma(t[r], scale, acc[m]), a product that is exact.

    Carefully where something may leave float32's normal range. float64 holds the product, and rounding the sum of two
    numbers of 24 bits to 53 bits and then to 24 is as if rounding once.
    """
    if not carefully:
        for j in range(COLUMNS):
            acc[m, j] += t[r, j] * scales[group, j]
    else:
        for j in range(COLUMNS):
            total = f64(acc[m, j]) + f64(t[r, j]) * f64(scales[group, j])
            kept = max(abs(total), SMALLEST) if abs(total) >= ROUNDS_TO_SMALLEST else 0.0
            acc[m, j] = f32(total if total != total else math.copysign(kept, total))


@compiled()
def find_careful_rows(facts, scale_bytes, first, count, careful):
    """Rows in which, with the scales of these columns, a product or a sum may overflow or be subnormal."""
    num_groups, num_rows = facts.shape[:2]
    low, high = np.full(num_groups, 127, i16), np.full(num_groups, 127, i16)
    for j in range(first, first + count):
        for group in range(num_groups):
            byte = i16(scale_bytes[j, group])
            low[group] = min(low[group], byte if byte > 0 else i16(127))  # a scale of 0 makes no subnormals
            high[group] = max(high[group], byte)
    for row in range(num_rows):
        careful[row] = False
        for group in range(num_groups):
            # Else sums of 2^14 products stay below 2^127 and are multiples of 2^-126. Inf as a scale is no matter.
            too_high = facts[group, row, BOUND] + high[group] - 127 > 112
            too_low = facts[group, row, UNIT] + low[group] - 127 < -126
            careful[row] |= too_high or too_low or facts[group, row, WAY] == WIDE


@compiled(
    "void(uint16[:,:,::1], int16[:,:,::1], int32[:,::1], uint8[:,::1], int64[:,::1], boolean[::1], int32[:,:])"
)
def gemm(x_bits, facts, packed, scale_bytes, order, swapped, out):
    """The accumulators' bits for all rows of one expert and some of its columns.

    Args:
        x_bits: `[G, M, 32]`, bf16.
        facts: `[G, M, 3]`, of `classify`.
        packed: `[N, K/8]`, eight E2M1 codes a word.
        scale_bytes: `[N, G]`.
        order: `[steps, 2]`, groups in their order and which rows take the step: EVERY_ROW or the value of `swapped`.
        swapped: `[M]`, rows that take the second group before the first.
        out: `[M, N]`, written.
    """
    num_groups, num_rows = facts.shape[:2]
    words, scales = vectors(4 * num_groups, i32), vectors(num_groups, f32)
    x, x_exponents, x_parts = np.zeros((2, 32), f32), np.empty(32, i16), np.empty((2, 32), f64)
    w, w_exponents = vectors(32, f32), vectors(32, i16)
    t, t_parts, largest = vectors(2, f32), vectors(2, f64), vectors(2, i16)
    acc, careful = vectors(num_rows, f32), np.empty(num_rows, np.bool_)
    plain_rows = np.empty(num_rows, i64)
    with_exponents = np.zeros(num_groups, np.bool_)
    for m in range(num_rows):
        for group in range(num_groups):
            with_exponents[group] |= facts[group, m, WAY] != PLAIN

    for first in range(0, len(packed), COLUMNS):
        count = min(COLUMNS, len(packed) - first)
        find_careful_rows(facts, scale_bytes, first, count, careful)
        for m in range(num_rows):
            for j in range(COLUMNS):
                acc[m, j] = 0
        fetch(packed, scale_bytes, first, count, words, scales)
        for step in range(len(order)):
            group, takers = order[step]
            unpack(words, group, with_exponents[group], w, w_exponents)
            num_plain = 0
            for m in range(num_rows):
                if takers != EVERY_ROW and takers != swapped[m]:
                    continue
                if facts[group, m, WAY] == PLAIN:
                    plain_rows[num_plain] = m
                    num_plain += 1
                    continue
                load_exponents(x_bits, group, m, x_exponents)
                if facts[group, m, WAY] == SPLIT:
                    load_x(x_bits, group, m, x, 0)
                    split_sum(x, x_exponents, w, w_exponents, largest, t)
                else:
                    load_parts(x_bits, group, m, x_parts)
                    wide_sum(x_parts, x_exponents, w, w_exponents, largest, t_parts, t)
                accumulate(acc, m, t, 0, scales, group, careful[m])
            for start in range(0, num_plain, 2):
                two = plain_rows[start : min(start + 2, num_plain)]
                for r in range(len(two)):
                    load_x(x_bits, group, two[r], x, r)
                plain_sums(x, w, t)
                for r in range(len(two)):
                    accumulate(acc, two[r], t, r, scales, group, careful[two[r]])
        for m in range(num_rows):
            for j in range(count):
                total = acc[m, j] + f32(0)  # the epilogue: -0 becomes +0
                out[m, first + j] = bits_of(total) if total == total else NAN_BITS
