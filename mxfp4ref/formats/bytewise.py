"""The weight interleave and the scale fold of the older kernel (`BYTEWISE`): nibbles move from byte to byte.

Rows r and r + 8 of each block of 16 rows trade nibbles byte by byte. Read off the helper of flashinfer 0.6.15.post1.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_ROWS = 1
SCALE_AXES = "[E, G/4, R*4]"
ORDERS = 1, 1  # of weights and scales, in the compiled loops; 0 is logical order


def interleave(packed: Tensor) -> Tensor:
    """`[E, R, K/2] uint8` in logical order as the kernel takes it; contiguous, R % 16 == 0, K % 64 == 0."""
    out = torch.empty_like(packed)
    upper, lower = _paired_rows(packed)
    first, second = _paired_bytes(out)
    first.copy_((upper & 0x0F) | (lower << 4))
    second.copy_((upper >> 4) | (lower & 0xF0))
    return out


def deinterleave(interleaved: Tensor) -> Tensor:
    """The inverse of `interleave`."""
    out = torch.empty_like(interleaved)
    first, second = _paired_bytes(interleaved)
    upper, lower = _paired_rows(out)
    upper.copy_((first & 0x0F) | (second << 4))
    lower.copy_((first >> 4) | (second & 0xF0))
    return out


def fold(scales: Tensor) -> Tensor:
    """`[E, R, G] uint8` as `[E, G/4, 4R]`; contiguous, whole words, G % 4 == 0."""
    return _exchange_words(scales)


def unfold(folded: Tensor) -> Tensor:
    """The inverse of `fold`."""
    return _exchange_words(folded)


def folded_shape(experts: int, rows: int, groups: int) -> tuple[int, ...]:
    """The shape of folded scales, in bytes."""
    return experts, groups // 4, rows * 4


def logical_shape(folded: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(E, R, G) of the scales whose folded bytes have this shape; None if none have."""
    if len(folded) != 3 or folded[2] % 4:
        return None
    return folded[0], folded[2] // 4, folded[1] * 4


def _exchange_words(scales: Tensor) -> Tensor:
    """Rows of words of four bytes as columns, and columns as rows."""
    words = scales.view(torch.int32).transpose(1, 2)
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _paired_rows(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Rows r and r + 8 of each 16-row block, logical bytes as [E, b, t, r, p, s, c, u]: byte 32p+16s+8t+4u+c."""
    experts, rows, columns = packed.shape
    split = packed.view(experts, rows // 16, 2, 8, columns // 32, 2, 2, 2, 4)  # E b h r p s t u c
    upper, lower = split.permute(2, 0, 1, 6, 3, 4, 5, 8, 7).unbind(0)
    return upper, lower


def _paired_bytes(stored: Tensor) -> tuple[Tensor, Tensor]:
    """The two stored bytes of each pair as [E, b, t, r, p, s, c, u]: row 16b+8t+r, byte 32p+16s+4c+2u+(0, 1)."""
    experts, rows, columns = stored.shape
    split = stored.view(experts, rows // 16, 2, 8, columns // 32, 2, 4, 2, 2)  # E b t r p s c u j
    first, second = split.unbind(-1)
    return first, second
