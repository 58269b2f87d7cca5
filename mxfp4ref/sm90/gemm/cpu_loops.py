"""The group-scaled GEMM as loops for a CPU (docs/arithmetic.md, "The GEMMs").

For each output element and each group of 32 along K, two tensor-core steps give a sum t, and the accumulator
becomes fma(t, scale, accumulator). COLUMNS output columns lie side by side, so that the compiler makes vector
instructions of the loops over them, and the weights of a group are unpacked once for all rows, from any byte order.

How the sum of a row's group is formed depends on the row alone: `row_loops.py` tells PLAIN, SPLIT and WIDE apart.
No float32 operation here has a subnormal operand or result, so a CPU that flushes those changes nothing.

Three things make the compiler's code fast: numbers that lie in `vectors`, with strides that it knows; no arrays made
by slicing inside of the loops, as numba would count references to them; and parts that are small.
"""

from __future__ import annotations

import math

import numpy as np

from mxfp4ref._compiled import compiled
from mxfp4ref.sm90.gemm.bit_loops import bits_of, f32, f64, float32_of, i8, i16, i32, i64, left, power64
from mxfp4ref.sm90.gemm.row_loops import (
    BIAS,
    BOUND,
    CUT_BITS,
    MOVED,
    NO_EXPONENT,
    PLAIN,
    UNIT,
    WAY,
    WIDE,
    classify,
    load,
    load_exponents,
    load_wide,
)
from mxfp4ref.sm90.gemm.weight_loops import (
    COLUMNS,
    ZERO_WEIGHT,
    column_of_lane,
    fetch,
    find_exponents,
    scale_byte,
    unpack,
    unpack_scales,
    vectors,
)

__all__ = ["classify", "gemm"]

EVERY_ROW = 2  # takes a step; else 0, rows that do not swap the first two groups, or 1, rows that do
CUT = 25  # terms are cut to multiples of 2^(largest exponent - 25)
EXPONENT = 0x7F800000  # of float32, in place
SMALLEST = 2.0**-126
ROUNDS_TO_SMALLEST = 2.0**-126 * (1 - 2.0**-25)
NAN_BITS = np.int32(0x7FFFFFFF)


# --- the sum t of a group ------------------------------------------------------------------------------------


@compiled()
def step_sums(x, w, sums):
    """Each step's sum of products. In any order, and fused or not: all is exact."""
    for step in range(2):
        for j in range(COLUMNS):
            total = f32(0)
            for k in range(16 * step, 16 * step + 16):
                total += x[k] * w[k, j]
            sums[step, j] = total


@compiled()
def find_largest(x_exponents, w_exponents, largest):
    """The largest exponent of each step's products, BIAS higher, or the least that there is where all are zero."""
    for step in range(2):
        for j in range(COLUMNS):
            exponent = i8(3)
            for k in range(16 * step, 16 * step + 16):
                exponent = max(exponent, i8(x_exponents[k] + w_exponents[k, j]))
            largest[step, j] = exponent


@compiled()
def split_sum(x_bits, group, row, cut_bits, sums, w, largest, per_unit, total, t):
    """t from the steps' sums of products that are not cut, and the others; in place of sums[0] what is carried.

    Converting to int32 cuts toward zero. 16 products below 3 * 2^25 units and a sum below 2^26 fit.
    """
    for step in range(2):
        for j in range(COLUMNS):
            carried = toward_zero(total[0, j], per_unit[0, j]) if step else f32(0)
            of_products = left(i32(i32(largest[step, j]) + i32(127 - BIAS)), i32(23))
            unit = i32(max(of_products, i32(bits_of(carried) & i32(EXPONENT))) - i32(CUT << 23))
            per_unit[0, j] = float32_of(i32(254 << 23) - unit)
            total[0, j] = i32(i32(carried * per_unit[0, j]) + i32(sums[step, j] * per_unit[0, j]))
            if step:
                sums[0, j] = carried
        for k in range(16 * step, 16 * step + 16):
            if cut_bits >> k & 1:
                x = float32_of(i32(x_bits[group, row, k]) << 16)
                for j in range(COLUMNS):
                    total[0, j] = i32(total[0, j] + i32(x * w[k, j] * per_unit[0, j]))
    for j in range(COLUMNS):
        t[0, j] = toward_zero(total[0, j], per_unit[0, j])


@compiled()
def move_back(sums, t, moved):
    """t in its place, where it may overflow; Inf after the first step stays."""
    power = float32_of(i32((127 + moved) << 23))
    for j in range(COLUMNS):
        carried = sums[0, j] * power
        t[0, j] = carried if abs(carried) == np.inf else t[0, j] * power


@compiled()
def toward_zero(total, per_unit):
    """The float32 number of an integer below 2^26, in its unit."""
    nearest = f32(total)
    too_large = abs(i32(nearest)) > abs(total)  # then the next number toward zero is meant
    unit = float32_of(i32(254 << 23) - bits_of(per_unit))
    return float32_of(bits_of(nearest) - i32(too_large)) * unit


@compiled()
def wide_sum(x_parts, x_exponents, w, w_exponents, largest, parts, t):
    """As `split_sum`, in float64. Inf and NaN are added up apart; where there are any they are the sum."""
    for j in range(COLUMNS):
        parts[1, j] = parts[0, j] = 0
    for step in range(2):
        for j in range(COLUMNS):
            exponent = i16(NO_EXPONENT)
            for k in range(16 * step, 16 * step + 16):
                of_w = i16(w_exponents[k, j])
                of_product = i16(x_exponents[k] + of_w)
                exponent = max(exponent, of_product if of_w != i16(ZERO_WEIGHT) else i16(NO_EXPONENT))
            largest[0, j] = exponent
        for k in range(16 * step, 16 * step + 16):
            if x_parts[1, k] != 0:
                for j in range(COLUMNS):
                    parts[1, j] += x_parts[1, k] * f64(w[k, j])
        for j in range(COLUMNS):
            of_sum = max((f64(parts[0, j]).view(i64) >> 52 & 2047) - 1023, -126) if parts[0, j] != 0 else -200
            exponent = max(i64(largest[0, j]), of_sum)
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


# --- the accumulators ----------------------------------------------------------------------------------------


@compiled()
def accumulate(acc, m, t, scales, carefully):
    """acc[m] = fma(t, scale, acc[m]), a product that is exact.

    Carefully where something may leave float32's normal range. float64 holds the product, and rounding the sum of two
    numbers of 24 bits to 53 bits and then to 24 is as if rounding once.
    """
    if not carefully:
        for j in range(COLUMNS):
            acc[m, j] += t[0, j] * scales[0, j]
    else:
        for j in range(COLUMNS):
            total = f64(acc[m, j]) + f64(t[0, j]) * f64(scales[0, j])
            kept = max(abs(total), SMALLEST) if abs(total) >= ROUNDS_TO_SMALLEST else 0.0
            acc[m, j] = f32(total if total != total else math.copysign(kept, total))


@compiled()
def find_careful_rows(facts, first_row, scale_words, careful):
    """Rows in which, with the scales of these columns, a product or a sum may overflow or be subnormal."""
    careful[:] = False
    for group in range(facts.shape[0]):
        lowest, highest = i32(254), i32(0)
        for j in range(COLUMNS):
            byte = scale_byte(scale_words, group, j)
            lowest = min(lowest, byte if byte > 0 else i32(254))  # a scale of 0 makes no subnormals
            highest = max(highest, byte)
        for m in range(len(careful)):
            row = first_row + m
            # Else sums of 2^14 products stay below 2^127 and are multiples of 2^-126. Inf as a scale is no matter.
            too_high = facts[group, row, BOUND] + highest - 127 > 112
            too_low = facts[group, row, UNIT] + lowest - 127 < -126
            careful[m] |= too_high or too_low or facts[group, row, WAY] == WIDE


@compiled(
    "void(uint16[:,:,::1], int32[:,:,::1], boolean[::1], int32[:,:,::1], int32[:,::1], int64[::1], "
    "int64[:,::1], int64[:,::1], int32[:,::1])",
    shapes="x_bits[G, R, 32] facts[G, R, 5] swapped[R] packed[E, N, 4*G] scales[E, N*G/4] orders[2] steps[S, 2] "
    "pieces[P, 5] out[R, N]",
)
def gemm(x_bits, facts, swapped, packed, scales, orders, steps, pieces, out):
    """The accumulators' bits of some pieces: rows of an expert and some of its columns.

    Args:
        x_bits: `[G, R, 32]`, bf16, as `row_loops.classify` leaves them.
        facts: `[G, R, 5]`, of `row_loops.classify`.
        swapped: `[R]`, rows that take the second group before the first.
        packed: `[E, N, K/8]`, eight E2M1 codes a word, in the byte order orders[0].
        scales: `[E, N * ceil(G/4)]`, those of four groups a word, in the byte order orders[1].
        orders: the two byte orders.
        steps: `[steps, 2]`, groups in their order and which rows take the step: EVERY_ROW or the value of `swapped`.
        pieces: `[P, 5]`, the expert, the first row and the one after the last, the first column and the one after the
            last; whole blocks of 16 columns where weights are not LOGICAL.
        out: `[R, N]`, written in these rows and columns.
    """
    num_groups = len(facts)
    words, scale_words = vectors(4 * num_groups, i32), vectors((num_groups + 3) // 4, i32)
    w, w_exponents, scale = vectors(32, f32), vectors(32, i8), vectors(1, f32)
    x, x_exponents = np.empty(32, f32), np.empty(32, i8)
    sums, largest, per_unit, total = vectors(2, f32), vectors(2, i8), vectors(1, f32), vectors(1, i32)
    x_parts, wide_exponents = np.empty((2, 32), f64), np.empty(32, i16)
    parts, wide_largest = vectors(2, f64), vectors(1, i16)
    t, with_exponents = vectors(1, f32), np.empty(num_groups, np.bool_)

    for expert, first_row, last_row, first_column, last_column in pieces:
        num_rows = last_row - first_row
        acc, careful = vectors(num_rows, f32), np.empty(num_rows, np.bool_)
        with_exponents[:] = False
        for group in range(num_groups):
            for m in range(num_rows):
                with_exponents[group] |= facts[group, first_row + m, WAY] != PLAIN
        for first in range(first_column, last_column, COLUMNS):
            fetch(packed, scales, expert, orders, first, last_column, words, scale_words)
            find_careful_rows(facts, first_row, scale_words, careful)
            acc[:] = 0
            for step in range(len(steps)):
                group, taken_by = steps[step]
                unpack(words, group, orders[0], w)
                unpack_scales(scale_words, group, scale)
                if with_exponents[group]:
                    find_exponents(w, w_exponents)
                for m in range(num_rows):
                    row = first_row + m
                    if taken_by != EVERY_ROW and taken_by != swapped[row]:
                        continue
                    way, cut_bits = facts[group, row, WAY], facts[group, row, CUT_BITS]
                    if way == WIDE:
                        load_wide(x_bits, group, row, wide_exponents, x_parts)
                        wide_sum(x_parts, wide_exponents, w, w_exponents, wide_largest, parts, t)
                    else:
                        load(x_bits, group, row, cut_bits, x)
                        step_sums(x, w, sums)
                        if way == PLAIN:
                            for j in range(COLUMNS):
                                t[0, j] = sums[0, j] + sums[1, j]
                        else:
                            load_exponents(x_bits, group, row, x_exponents)
                            find_largest(x_exponents, w_exponents, largest)
                            split_sum(x_bits, group, row, cut_bits, sums, w, largest, per_unit, total, t)
                        if facts[group, row, MOVED]:
                            move_back(sums, t, facts[group, row, MOVED])
                    accumulate(acc, m, t, scale, careful[m])
            for m in range(num_rows):
                for lane in range(COLUMNS):
                    column = first + column_of_lane(lane, orders[0])
                    if column < last_column:
                        number = acc[m, lane] + f32(0)  # the epilogue: -0 becomes +0
                        out[first_row + m, column] = bits_of(number) if number == number else NAN_BITS
