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
ZERO_WEIGHT = -127  # exponent of a zero; others have -1 to 2

LOGICAL, BYTEWISE, WORDWISE = 0, 1, 2  # byte orders: docs/arithmetic.md, "Tensors and layouts"
# Code n of a word in each order: shifted left by SHIFT[n] its sign is in the highest bit, its magnitude, shifted back
# by BACK, in bits 22 to 24. Its place along K, and whether it belongs to the lower 8 of 16 columns.
NIBBLES = [28, 24, 20, 16, 12, 8, 4, 0]
SHIFT = np.array([NIBBLES, NIBBLES, [16, 0, 19, 3, 22, 6, 20, 4]], np.uint8)
BACK = np.array([6, 6, 0], np.uint8)
K = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 8, 8, 9, 9], [0, 1, 0, 1, 8, 9, 8, 9]], np.uint8)
LOWER = np.array([[0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 0, 0, 1, 1]], np.uint8)


@compiled()
def vectors(count, dtype):
    """Zeros `[count, COLUMNS]`, at a distance that the compiler knows.

    Each row starts a cache line, since a vector across two takes twice as long.
    """
    buffer = np.zeros((count, COLUMNS + 64), dtype)
    start = -buffer.ctypes.data % 64 // buffer.itemsize
    return buffer[:, start : start + COLUMNS]


@compiled()
def column_of_lane(lane, order):
    return lane if order == LOGICAL else lane % HALF // 8 * 16 + lane // HALF * 8 + lane % 8


@compiled()
def place_of_scales(column, four, num_columns, num_fours, order):
    """The word with the scales of groups 4 * four to 4 * four + 3."""
    if order == BYTEWISE:
        return four * num_columns + column
    if order == WORDWISE:
        return ((column // 64 * num_fours + four) * 16 + column % 16) * 4 + column % 64 // 16
    return column * num_fours + four


@compiled()
def fetch(packed, scales, expert, orders, first, last, words, scale_words):
    """Lay columns side by side, 32 at a time: as many rows of memory as a CPU reads ahead in."""
    num_columns, num_fours = packed.shape[1], len(scale_words)
    for strip in range(0, COLUMNS, 32):
        for group in range(packed.shape[2] // 4):
            for lane in range(strip, strip + 32, 8):
                column = first + column_of_lane(lane, orders[0])  # and the next ones
                for j in range(8):
                    if column + j < last:
                        for i in range(4):
                            words[4 * group + i, lane + j] = packed[expert, column + j, 4 * group + i]
    for lane in range(COLUMNS):
        column = first + column_of_lane(lane, orders[0])
        if column < last:
            for four in range(num_fours):
                place = place_of_scales(column, four, num_columns, num_fours, orders[1])
                scale_words[four, lane] = scales[expert, place]


@compiled()
def scale_byte(scale_words, group, lane):
    return i32(right(scale_words[group // 4, lane], i32(group % 4 * 8)) & i32(255))


@compiled()
def unpack(words, group, order, w):
    """The 32 weights of each column in a group."""
    if order == LOGICAL:  # three literals, so that the compiler knows what the tables say
        unpack_from(words, group, LOGICAL, w)
    elif order == BYTEWISE:
        unpack_from(words, group, BYTEWISE, w)
    else:
        unpack_from(words, group, WORDWISE, w)


@compiled()
def unpack_from(words, group, order, w):
    for part in range(2):
        for i in range(4):
            for j in range(HALF):
                word = u32(words[4 * group + i, HALF * part + j])
                for n in range(8):
                    k = 8 * i + n if order == LOGICAL else 16 * part + 2 * i + K[order, n]
                    half = part if order == LOGICAL else i64(LOWER[order, n])
                    whole = word
                    if order == WORDWISE and n >= 6:  # the lowest bit of its magnitude lies apart
                        upper = right(word, u32(7)) & u32(0x00180018) | right(word, u32(3)) & u32(0x08000800)
                        whole = u32(upper | right(word, u32(11)) & u32(0x00040004))
                    code = left(whole, u32(SHIFT[order, n]))
                    w[k, HALF * half + j] = e2m1(code, u32(right(code, u32(BACK[order]))))


@compiled()
def e2m1(code, magnitude):
    """The number whose sign is the highest bit of one word and whose magnitude is in bits 22 to 24 of another."""
    # As the lowest bits of a float32's exponent and the first of its fraction: 0.5, 0.75, 1, 1.5, 2, 3, 4, 6.
    number = float32_of(u32(magnitude & u32(7 << 22)) + u32(126 << 23))
    subnormal = f32(2) * number - f32(1)  # 0 and 0.5 in place of the first two
    number = number if number < subnormal else subnormal
    return float32_of(bits_of(number) | i32(code & u32(1 << 31)))


@compiled()
def unpack_scales(scale_words, group, scale):
    for j in range(COLUMNS):
        scale[0, j] = float32_of(left(scale_byte(scale_words, group, j), i32(23)))


@compiled()
def find_exponents(w, exponents):
    """ZERO_WEIGHT of zeros."""
    for k in range(32):
        for j in range(COLUMNS):
            exponents[k, j] = i8(right(bits_of(w[k, j]), i32(23)) - i32(127))
