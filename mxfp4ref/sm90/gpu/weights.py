"""Where a Triton kernel finds the codes and scales of an expert, in each of the three layouts, and what codes mean.

A tile of weights is read in the shape `[b, r, c]` in which warps hold a tensor core's first operand: thread (r, c)
has, of rows 16b + 8h + r with h in (0, 1), the columns 8u + 2c + j with u and j in (0, 1) of each 16-wide step. The
SM90 layouts keep these 8 codes in one 32-bit word, so that no code has to change threads after it was loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxfp4ref.formats import bytewise, wordwise
from mxfp4ref.formats.generations import Generation
from mxfp4ref.sm90.gpu.primitives import HARDWARE

LOGICAL = tl.constexpr(0)
BYTEWISE = tl.constexpr(1)  # the older SM90 layout: rows r and r + 8 trade nibbles byte by byte
WORDWISE = tl.constexpr(2)  # the newer one: the bits of a word are permuted as well
_LAYOUTS = {bytewise: BYTEWISE.value, wordwise: WORDWISE.value}


def layout_of(generation: Generation | None) -> int:
    """The layout of weights in a generation's order, or in logical order.

    Raises:
        NotImplementedError: the kernels do not read that layout.
    """
    if generation is None:
        return int(LOGICAL.value)
    if generation.layout not in _LAYOUTS:
        raise NotImplementedError(f"the kernels do not read the layout of {generation!r}")
    return int(_LAYOUTS[generation.layout])


@triton.jit
def row_stride(depth, LAYOUT: tl.constexpr):
    """From one row of weights to the next: bytes of 2 logical codes, words of 8 others."""
    return depth // (2 if LAYOUT == LOGICAL else 8)


@triton.jit
def weight_offsets(first_row, depth, ROWS: tl.constexpr, LAYOUT: tl.constexpr):
    """Of a tile's loads in group 0, step 0: `[b, r, c]` words, or `[b, r, c, h, u]` bytes of logical weights."""
    if LAYOUT == LOGICAL:
        b = tl.arange(0, ROWS // 16)[:, None, None, None, None]
        r = tl.arange(0, 8)[None, :, None, None, None]
        c = tl.arange(0, 4)[None, None, :, None, None]
        h = tl.arange(0, 2)[None, None, None, :, None]
        u = tl.arange(0, 2)[None, None, None, None, :]
        offsets = (first_row + 16 * b + 8 * h + r) * row_stride(depth, LAYOUT) + 4 * u + c
    else:
        b = tl.arange(0, ROWS // 16)[:, None, None]
        r = tl.arange(0, 8)[None, :, None]
        c = tl.arange(0, 4)[None, None, :]
        offsets = (first_row + 16 * b + r) * row_stride(depth, LAYOUT) + c
    return offsets


@triton.jit
def load_weights(pointers, group, STEP: tl.constexpr, depth, ROWS: tl.constexpr, LAYOUT: tl.constexpr):
    """A step's weights `[ROWS, 16] bf16`, unscaled."""
    if LAYOUT == LOGICAL:
        byte = tl.load(pointers + (group * 16 + STEP * 8)).to(tl.int32)
        codes = _spread((byte & 0x0F) | ((byte & 0xF0) << 12))
    else:  # rows r + 8 of the stored block have the second step
        word = tl.load(pointers + (group * 4 + STEP * 8 * row_stride(depth, LAYOUT)))
        of_u0 = tl.join(_codes(word, 0, 0, LAYOUT), _codes(word, 1, 0, LAYOUT))
        of_u1 = tl.join(_codes(word, 0, 1, LAYOUT), _codes(word, 1, 1, LAYOUT))
        codes = tl.join(of_u0, of_u1)
    codes = _normalised(codes)
    halves = tl.join((codes & 0xFFFF).to(tl.int16), (codes >> 16).to(tl.int16))  # b r c h u j
    return halves.permute(0, 3, 1, 4, 2, 5).reshape(ROWS, 16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _codes(word, H: tl.constexpr, U: tl.constexpr, LAYOUT: tl.constexpr):
    """Two codes (j = 0 in the low half) of a word, each as sign in bit 15, exponent and mantissa in bits 6 to 8."""
    if LAYOUT == BYTEWISE:
        nibbles = (word >> (16 * U + 4 * H)) & 0x0F0F
        codes = _spread((nibbles | (nibbles << 8)) & 0x000F000F)
    elif H == 0 and U == 0:
        codes = word
    elif H == 1 and U == 0:
        codes = word << 3
    elif H == 0:
        codes = word << 6
    else:  # the bits that are left over
        codes = ((word << 1) & -0x7FFF8000) | ((word >> 3) & 0x01800180) | ((word >> 7) & 0x00400040)
    return codes & -0x7E3F7E40  # 0x81C081C0


@triton.jit
def _spread(nibbles):
    """A code in the low bits of each half, spread the same way."""
    return ((nibbles & 0x00080008) << 12) | ((nibbles & 0x00070007) << 6)


@triton.jit
def _normalised(codes):
    """Two spread codes, which as bf16 numbers are 2^126 too small (0.5 is subnormal), as the numbers they mean."""
    if HARDWARE:
        factor = tl.full(codes.shape, 0x7E807E80, tl.int32)  # 2^126 twice
        return tl.inline_asm_elementwise(
            "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [codes, factor], dtype=tl.int32, is_pure=True, pack=1
        )
    low = codes & 0x01C0
    high = codes & 0x01C00000
    low = tl.where(low == 0, 0, tl.where(low == 0x40, 0x3F00, low + 0x3F00))
    high = tl.where(high == 0, 0, tl.where(high == 0x400000, 0x3F000000, high + 0x3F000000))
    return low | high | (codes & -0x7FFF8000)


@triton.jit
def scale_offsets(row, num_quads, LAYOUT: tl.constexpr):
    """Of the words of the first 4 groups' scales, `[N]` for some rows."""
    if LAYOUT == LOGICAL:
        offsets = row * num_quads
    elif LAYOUT == BYTEWISE:
        offsets = row
    else:
        offsets = row // 64 * (num_quads * 64) + row % 16 * 4 + row // 16 % 4
    return offsets


@triton.jit
def scale_stride(num_rows, LAYOUT: tl.constexpr):
    """From the words of 4 groups to those of the next 4."""
    if LAYOUT == LOGICAL:
        stride = 1
    elif LAYOUT == BYTEWISE:
        stride = num_rows
    else:
        stride = 64
    return stride
