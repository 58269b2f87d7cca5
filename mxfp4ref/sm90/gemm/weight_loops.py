"""Weights and scales for the compiled GEMM, from any byte order (docs/arithmetic.md, "Tensors and layouts").

COLUMNS output columns lie side by side, in lanes. In the kernel's orders a word has codes of columns c and c + 8 of
a block of 16, so that there all c come first, then all c + 8.
"""

from __future__ import annotations

import numpy as np

from mxfp4ref._compiled import compiled
from mxfp4ref.sm90.gemm.bit_loops import bits_of, f32, float32_of, i8, i32, left, right, u32

COLUMNS = 128  # the weights of one group, 16 KiB as float32, stay in the nearest cache
HALF = COLUMNS // 2

TWICE_E2M1 = np.uint32(0xC8643210)  # digit m is twice the magnitude of code m: 0, 0.5, 1, 1.5, 2, 3, 4, 6
LOGICAL, BYTEWISE, WORDWISE = 0, 1, 2  # byte orders: docs/arithmetic.md, "Tensors and layouts"
# Code n of a word in each order: rotated right by ROTATE[n] its magnitude is in bits 2 to 4, shifted left by SHIFT[n]
# its sign is in the highest bit. Its place along K, and whether it belongs to the lower 8 of 16 columns.
ROTATE = np.array(
    [[30, 2, 6, 10, 14, 18, 22, 26], [30, 2, 6, 10, 14, 18, 22, 26], [4, 20, 1, 17, 30, 14, 0, 16]]
)
SHIFT = np.array([[28, 24, 20, 16, 12, 8, 4, 0], [28, 24, 20, 16, 12, 8, 4, 0], [16, 0, 19, 3, 22, 6, 17, 1]])
K = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 8, 8, 9, 9], [0, 1, 0, 1, 8, 9, 8, 9]])
LOWER = np.array([[0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 0, 0, 1, 1]])
SIGN_BIT = u32(1 << 31)


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
    """Twice the 32 weights of each column in a group."""
    for i in range(4):
        for part in range(2):
            source = words[4 * group + i, HALF * part : HALF * part + HALF]
            for n in range(8):
                k = 8 * i + n if order == LOGICAL else 16 * part + 2 * i + K[order, n]
                start = HALF * part if order == LOGICAL else HALF * LOWER[order, n]
                target = w[k, start : start + HALF]
                rotate, shift = u32(ROTATE[order, n] & 31), u32(SHIFT[order, n] & 31)
                back = u32(-ROTATE[order, n] & 31)
                for j in range(HALF):
                    word = u32(source[j])
                    magnitude = word
                    if order == WORDWISE and n >= 6:  # the lowest bit of its magnitude lies apart
                        apart = right(word, u32(11)) & u32(0x00040004)
                        magnitude = u32(right(word, u32(7)) & u32(0x00180018) | apart)
                    place = u32((right(magnitude, rotate) | left(magnitude, back)) & u32(0x1C))
                    number = f32(i32(right(TWICE_E2M1, place) & u32(15)))
                    target[j] = float32_of(bits_of(number) ^ i32(left(word, shift) & SIGN_BIT))
    if with_exponents:
        for k in range(32):
            for j in range(COLUMNS):
                w_exponents[k, j] = i8(right(bits_of(w[k, j]), i32(23)) - i32(128))  # ZERO_WEIGHT of zeros
