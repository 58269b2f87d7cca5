"""Weights and scales for the compiled GEMM, from any byte order (docs/arithmetic.md, "Tensors and layouts").

COLUMNS output columns lie side by side, in lanes. In the kernel's orders a word has codes of columns c and c + 8 of
a block of 16, so that there all c come first, then all c + 8.
"""

from __future__ import annotations

import numpy as np

from mxfp4ref._compiled import compiled
from mxfp4ref.sm90.gemm.bit_loops import bits_of, f32, float32_of, i8, i32, i64, left, right, u32

COLUMNS = 128  # the weights of one group, 16 KiB as float32, stay in the nearest cache
HALF = COLUMNS // 2

LOGICAL, BYTEWISE, WORDWISE = 0, 1, 2  # byte orders: docs/arithmetic.md, "Tensors and layouts"
# Code n of a word in each order: shifted left by SHIFT[n] its sign is in the highest bit and its magnitude in bits 22 to
# 24 after a shift to the right by GAP. Its place along K, and whether it belongs to the lower 8 of 16 columns.
SHIFT = np.array(
    [[28, 24, 20, 16, 12, 8, 4, 0], [28, 24, 20, 16, 12, 8, 4, 0], [16, 0, 19, 3, 22, 6, 20, 4]], np.uint8
)
GAP = np.array([6, 6, 0], np.uint8)
K = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 8, 8, 9, 9], [0, 1, 0, 1, 8, 9, 8, 9]], np.uint8)
LOWER = np.array([[0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 0, 0, 1, 1]], np.uint8)
MAGNITUDE, HALF_ONE, SIGN_BIT = u32(7 << 22), u32(126 << 23), u32(1 << 31)


@compiled()
def column_of_lane(lane, order):
    return lane if order == LOGICAL else lane % HALF // 8 * 16 + lane // HALF * 8 + lane % 8


@compiled()
def place_of_scales(column, group, num_columns, num_groups, order):
    """Where the scales of four groups, `group` and the next ones, start."""
    if order == BYTEWISE:
        return (group // 4 * num_columns + column) * 4
    if order == WORDWISE:
        block = (column // 64 * (num_groups // 4) + group // 4) * 16 + column % 16
        return block * 16 + column % 64 // 16 * 4
    return column * num_groups + group


@compiled()
def fetch(packed, scale_bytes, orders, first, last, words, scales):
    """Lay columns side by side, 32 at a time: as many rows of memory as a CPU reads ahead in."""
    num_columns, num_groups = packed.shape[0], packed.shape[1] // 4
    for strip in range(0, COLUMNS, 32):
        for group in range(num_groups):
            for lane in range(strip, strip + 32, 8):
                column = first + column_of_lane(lane, orders[0])  # and the next ones
                for j in range(8):
                    if column + j < last:
                        for i in range(4):
                            words[4 * group + i, lane + j] = packed[column + j, 4 * group + i]
    for lane in range(COLUMNS):
        column, place = first + column_of_lane(lane, orders[0]), 0
        if column < last:
            for group in range(num_groups):
                place += 1
                if group % 4 == 0:
                    place = place_of_scales(column, group, num_columns, num_groups, orders[1])
                scales[group, lane] = float32_of(i32(scale_bytes[place]) << 23)


@compiled()
def unpack(words, group, order, with_exponents, w, w_exponents):
    """The 32 weights of each column in a group."""
    if order == LOGICAL:  # three literals, so that the compiler knows what the tables say
        unpack_in_order(words, group, LOGICAL, w)
    elif order == BYTEWISE:
        unpack_in_order(words, group, BYTEWISE, w)
    else:
        unpack_in_order(words, group, WORDWISE, w)
    if with_exponents:
        for k in range(32):
            for j in range(COLUMNS):
                w_exponents[k, j] = i8(right(bits_of(w[k, j]), i32(23)) - i32(127))  # ZERO_WEIGHT of zeros


@compiled()
def unpack_in_order(words, group, order, w):
    for part in range(2):
        for i in range(4):
            for j in range(HALF):
                word = u32(words[4 * group + i, HALF * part + j])
                for n in range(8):
                    k = 8 * i + n if order == LOGICAL else 16 * part + 2 * i + K[order, n]
                    half = part if order == LOGICAL else i64(LOWER[order, n])
                    source = word
                    if order == WORDWISE and n >= 6:  # the lowest bit of its magnitude lies apart
                        upper, lowest = (
                            right(word, u32(7)) & u32(0x00180018),
                            right(word, u32(11)) & u32(0x00040004),
                        )
                        source = u32(u32(upper | lowest) | right(word, u32(3)) & u32(0x08000800))
                    code = left(source, u32(SHIFT[order, n]))
                    # 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, of which the first two are to be 0 and 0.5.
                    number = float32_of(u32(right(code, u32(GAP[order])) & MAGNITUDE) + HALF_ONE)
                    doubled = f32(2) * number - f32(1)
                    number = number if number < doubled else doubled
                    w[k, HALF * half + j] = float32_of(bits_of(number) | i32(code & SIGN_BIT))
