"""Out of MXFP4 and into it as loops for a CPU, by the tables of `mxfp4.py` and `quantize.py`; no arithmetic."""

from __future__ import annotations

import numpy as np

from mxfp4ref._compiled import compiled

__all__ = ["dequantize", "quantize"]

MAGNITUDE, SCALE_NAN = 0x7FFFFFFF, 255

i32, i64, left = np.int32, np.int64, np.left_shift


@compiled(
    "void(uint8[:,::1], uint8[::1], int32[:,::1], int32[:,::1])",
    "void(uint8[:,::1], uint8[::1], int64[:,::1], int64[:,::1])",
    shapes="packed[G, 16] scales[G] pairs[256, 256] out[G, 16]",
)
def dequantize(packed, scales, pairs, out):
    """Pairs of values.

    Args:
        packed: `[groups, 16]`.
        scales: `[groups]`.
        pairs: `[256, 256]`, the pair of a scale byte and a code byte.
        out: `[groups, 16]`, written.
    """
    for group in range(len(scales)):
        scale = scales[group]
        for i in range(16):
            out[group, i] = pairs[scale, packed[group, i]]


@compiled(
    "void(int16[:,::1], int32, int32[::1], int32[:,::1], uint8[:,::1], uint8[::1])",
    "void(int32[:,::1], int32, int32[::1], int32[:,::1], uint8[:,::1], uint8[::1])",
    shapes="values[G, 32] scale_steps[255] code_steps[256, 7] packed[G, 16] scales[G]",
)
def quantize(values, shift, scale_steps, code_steps, packed, scales):
    """Scales and codes.

    Args:
        values: `[groups, 32]`, bits that become those of float32 numbers when shifted left.
        shift: by so many places.
        scale_steps: `[255]`, the least magnitude of each scale byte from 1 on, as float32 bits.
        code_steps: `[256, 7]`, by scale byte that of each code from 1 on.
        packed, scales: `[groups, 16]` and `[groups]`, written.
    """
    codes = np.empty(32, i32)
    for group in range(len(scales)):
        largest = i32(0)
        for k in range(32):
            largest = max(largest, i32(left(i32(values[group, k]), shift) & i32(MAGNITUDE)))
        scale = max((i64(largest) >> 23) - 4, 0)  # no rule has a smaller one
        while scale < SCALE_NAN and largest >= scale_steps[scale]:
            scale += 1
        scales[group] = scale
        for k in range(32):
            bits = i32(left(i32(values[group, k]), shift))
            code = i32(8) if bits < 0 else i32(0)
            for step in range(7):
                code = i32(code + i32(i32(bits & i32(MAGNITUDE)) >= code_steps[scale, step]))
            codes[k] = code
        for i in range(16):
            packed[group, i] = codes[2 * i] | codes[2 * i + 1] << 4 if scale < SCALE_NAN else 0
