"""The weight interleave and the scale fold of the newer kernel (`WORDWISE`): bits move within 32-bit words.

Take rows r and r + 8 of a block of 16 rows (r in 0..7), a 32-byte partition p of the row, an mma index q in 0..3 and
c in 0..3. The bytes W[r, 32p+8q+c], W[r+8, 32p+8q+c], W[r, 32p+8q+c+4], W[r+8, 32p+8q+c+4] make a little-endian
32-bit word; its bit i moves to bit `_BIT_TARGETS[i]`; the word is stored at row r + 8 (q % 2), byte column
32p + 16 (q // 2) + 4c.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

SCALE_ROWS = 64
SCALE_AXES = "[E, R/64, G/4, 16, 16]"
ORDERS = 2, 2  # of weights and scales, in the compiled loops; 0 is logical order

# Bit i of a gathered 32-bit word goes to bit _BIT_TARGETS[i] of the stored one.
_BIT_TARGETS = (
    *(6, 7, 8, 15, 22, 23, 24, 31, 3, 4, 5, 12, 19, 20, 21, 28),
    *(0, 1, 2, 9, 16, 17, 18, 25, 13, 10, 11, 14, 29, 26, 27, 30),
)
_CHUNK_BYTES = 1 << 20
_GATHER_ROWS = 64  # torch.gather runs in parallel over rows only


def interleave(packed: Tensor) -> Tensor:
    """`[E, R, K/2] uint8` in logical order as the kernel takes it; contiguous, R % 16 == 0, K % 64 == 0."""
    out = torch.empty_like(packed)
    for source, target in _row_blocks(packed, out):
        planes = _logical_planes(source).contiguous()
        _transpose_bytes(planes)
        stored = _stored_planes(target)
        stored.copy_(_move_bits(planes, inverse=False).view(stored.shape))
    return out


def deinterleave(interleaved: Tensor) -> Tensor:
    """The inverse of `interleave`."""
    out = torch.empty_like(interleaved)
    for source, target in _row_blocks(interleaved, out):
        logical = _logical_planes(target)
        planes = _move_bits(_stored_planes(source), inverse=True).view(logical.shape)
        _transpose_bytes(planes)
        logical.copy_(planes)
    return out


def fold(scales: Tensor) -> Tensor:
    """`[E, R, G] uint8` as `[E, R/64, G/4, 16, 16]`; contiguous, whole words, R % 64 == 0, G % 4 == 0."""
    experts, rows, groups = scales.shape
    fours = scales.view(torch.int32).view(experts, rows // 64, 4, 16, groups // 4)
    return fours.permute(0, 1, 4, 3, 2).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def unfold(folded: Tensor) -> Tensor:
    """The inverse of `fold`."""
    experts, blocks, quads = folded.shape[:3]
    fours = folded.view(torch.int32).permute(0, 1, 4, 3, 2).clone(memory_format=torch.contiguous_format)
    return fours.view(experts, blocks * 64, quads).view(torch.uint8)


def folded_shape(experts: int, rows: int, groups: int) -> tuple[int, ...]:
    """The shape of folded scales, in bytes."""
    return experts, rows // 64, groups // 4, 16, 16


def logical_shape(folded: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(E, R, G) of the scales whose folded bytes have this shape; None if none have."""
    if len(folded) != 5 or folded[3:] != (16, 16):
        return None
    return folded[0], folded[1] * 64, folded[2] * 4


def _row_blocks(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield matching pieces of two [E, R, K/2] as int32 [rows, K/8], whole 16-row blocks to fit the cache."""
    columns = source.shape[2]
    if source.numel() == 0:
        return
    step = 16 * max(1, _CHUNK_BYTES // (16 * columns))
    source, target = source.view(torch.int32).flatten(0, 1), target.view(torch.int32).flatten(0, 1)
    for start in range(0, len(source), step):
        yield source[start : start + step], target[start : start + step]


# In both orders the words of a 16-row block are split by r (row modulo 8), p (32-byte partition) and the mma
# index q = 2s + t. Four words make a unit: logically, byte c of words (u, h) = (0, 0), (0, 1), (1, 0), (1, 1),
# where h is the row's half of the block; stored, one word for each c with those four bytes in it.


def _logical_planes(words: Tensor) -> Tensor:
    """View logical words [R, K/8] as [u, h, b, t, r, p, s]: row 16b + 8h + r, word 8p + 4s + 2t + u."""
    rows, columns = words.shape
    return words.view(rows // 16, 2, 8, columns // 8, 2, 2, 2).permute(6, 1, 0, 5, 2, 3, 4)


def _stored_planes(words: Tensor) -> Tensor:
    """View stored words [R, K/8] as [c, b, t, r, p, s]: row 16b + 8t + r, word 8p + 4s + c."""
    rows, columns = words.shape
    return words.view(rows // 16, 2, 8, columns // 8, 2, 4).permute(5, 0, 1, 2, 3, 4)


def _transpose_bytes(planes: Tensor) -> None:
    """Exchange, in place, byte j of plane i and byte i of plane j; int32 [2, 2, ...], plane 2u + h."""
    for first, second, shift, mask in (
        (planes[0], planes[1], 16, 0x0000FFFF),
        (planes[:, 0], planes[:, 1], 8, 0x00FF00FF),
    ):
        moved = ((first >> shift) ^ second) & mask
        second ^= moved
        first ^= moved << shift


def _move_bits(words: Tensor, *, inverse: bool) -> Tensor:
    """Move bit i of each int32 to bit _BIT_TARGETS[i], or back; one look-up for each half of a word."""
    low, high = _bit_tables(inverse, words.device)
    words = words.reshape(_GATHER_ROWS, -1)  # units of 16 rows by 32 bytes: at least 128 words
    moved = torch.gather(low.expand(_GATHER_ROWS, -1), 1, words & 0xFFFF)
    return moved.bitwise_or_(torch.gather(high.expand(_GATHER_ROWS, -1), 1, words >> 16 & 0xFFFF))


@cache
def _bit_tables(inverse: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where the bits of each 16-bit low half, and of each high half, go; int32 [65536] each."""
    pairs = [(target, i) if inverse else (i, target) for i, target in enumerate(_BIT_TARGETS)]
    value = np.arange(1 << 16, dtype=np.uint32)
    tables = np.zeros((2, 1 << 16), dtype=np.uint32)
    for source, target in pairs:
        tables[source // 16] |= (value >> (source % 16) & 1) << target
    low, high = torch.from_numpy(tables.view(np.int32)).to(device)
    return low, high
