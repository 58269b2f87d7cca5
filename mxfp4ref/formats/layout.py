"""Where the bytes lie: order of gate and up rows, padding, the SM90 weight interleave and scale fold.

The specification, section 2. Nothing here looks at values, only at positions; every function has its inverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._validate import check_choice, check_int, check_tensor
from mxfp4ref.formats.mxfp4 import PACKED_DTYPES, SCALE_DTYPES

__all__ = [
    "GENERATIONS",
    "deinterleave_weights_sm90",
    "fold_scales_sm90",
    "halves_to_interleaved",
    "interleave_weights_sm90",
    "interleaved_to_halves",
    "pad_halves",
    "swap_gate_up",
    "unfold_scales_sm90",
    "unpad_halves",
]

# The first flashinfer release with each order of the folded scales: 0.6.9 .. 0.6.15, and 0.6.16 up to now.
GENERATIONS = ("0.6.9", "0.6.16")

# Bit i of a gathered 32-bit word goes to bit _BIT_TARGETS[i] of the stored one.
_BIT_TARGETS = (
    *(6, 7, 8, 15, 22, 23, 24, 31, 3, 4, 5, 12, 19, 20, 21, 28),
    *(0, 1, 2, 9, 16, 17, 18, 25, 13, 10, 11, 14, 29, 26, 27, 30),
)
_CHUNK_BYTES = 1 << 20
_GATHER_ROWS = 64  # torch.gather runs in parallel over rows only


def swap_gate_up(t: Tensor, dim: int = 1) -> Tensor:
    """Exchange the two halves along `dim`: [w1(gate); w3(up)] <-> [w3(up); w1(gate)], its own inverse.

    Weights, scales and biases of fc1 have to be swapped alike.

    Raises:
        TypeError: not a tensor, or `dim` not an int.
        ValueError: `dim` out of range, or an odd size along it.
    """
    first, second = _halves(t, dim)
    return torch.cat((second, first), dim)


def interleaved_to_halves(t: Tensor, dim: int = 1) -> Tensor:
    """Bring gpt-oss rows gate0, up0, gate1, up1, ... along `dim` into the kernel's order [up; gate].

    Raises:
        TypeError: not a tensor, or `dim` not an int.
        ValueError: `dim` out of range, or an odd size along it.
    """
    dim = _check_dim(t, dim, divisor=2)
    by_pair = t.reshape(*t.shape[:dim], t.shape[dim] // 2, 2, *t.shape[dim + 1 :])
    return torch.cat((by_pair.select(dim + 1, 1), by_pair.select(dim + 1, 0)), dim)


def halves_to_interleaved(t: Tensor, dim: int = 1) -> Tensor:
    """Bring the kernel's rows [up; gate] along `dim` into gpt-oss's order gate0, up0, gate1, up1, ...

    Raises:
        TypeError: not a tensor, or `dim` not an int.
        ValueError: `dim` out of range, or an odd size along it.
    """
    up, gate = _halves(t, dim)
    dim %= t.dim()
    return torch.stack((gate, up), dim + 1).flatten(dim, dim + 1)


def pad_halves(t: Tensor, multiple: int = 128, dim: int = 1) -> Tensor:
    """Append zeros to each of the two halves along `dim` until its size is a multiple of `multiple`.

    Padding after the halves have been joined would shift the border between up and gate. Zero bytes are zero
    codes under any scale.

    Raises:
        TypeError: not a tensor, or `dim` or `multiple` not an int.
        ValueError: `dim` out of range, an odd size along it, or `multiple` below 1.
    """
    check_int("multiple", multiple, minimum=1)
    first, second = _halves(t, dim)
    shape = list(first.shape)
    shape[dim] = -shape[dim] % multiple
    zeros = t.new_zeros(shape)
    return torch.cat((first, zeros, second, zeros), dim)


def unpad_halves(t: Tensor, size: int, dim: int = 1) -> Tensor:
    """Keep the first `size` entries of each of the two halves along `dim`, the inverse of `pad_halves`.

    Raises:
        TypeError: not a tensor, or `dim` or `size` not an int.
        ValueError: `dim` out of range, an odd size along it, or `size` larger than a half.
    """
    first, second = _halves(t, dim)
    check_int("size", size, minimum=0, maximum=first.shape[dim])
    return torch.cat((first.narrow(dim, 0, size), second.narrow(dim, 0, size)), dim)


@uncompiled
def interleave_weights_sm90(packed: Tensor, generation: str = "0.6.16") -> Tensor:
    """Return packed weights in the byte order that the SM90 kernel takes.

    Args:
        packed: [E, R, K/2] uint8 (or int8, float4_e2m1fn_x2: the same bytes), R % 16 == 0, K % 64 == 0.
        generation: "0.6.16" (flashinfer 0.6.16 and later) or "0.6.9" (before; read off the helper of
            0.6.15.post1, where rows r and r + 8 trade nibbles byte by byte and no bits move).

    Returns:
        [E, R, K/2] uint8.

    Raises:
        TypeError: another dtype.
        ValueError: another number of dimensions, or R or K not aligned.
    """
    check_choice("generation", generation, GENERATIONS)
    packed = _check_weights("packed", packed)
    out = torch.empty_like(packed)
    if generation == "0.6.9":
        upper, lower = _paired_rows(packed)
        first, second = _paired_bytes(out)
        first.copy_((upper & 0x0F) | (lower << 4))
        second.copy_((upper >> 4) | (lower & 0xF0))
        return out
    for source, target in _row_blocks(packed, out):
        planes = _logical_planes(source).contiguous()
        _transpose_bytes(planes)
        stored = _stored_planes(target)
        stored.copy_(_move_bits(planes, inverse=False).view(stored.shape))
    return out


@uncompiled
def deinterleave_weights_sm90(interleaved: Tensor, generation: str = "0.6.16") -> Tensor:
    """Return packed weights in logical order, the inverse of `interleave_weights_sm90`.

    Args:
        interleaved: [E, R, K/2] uint8 (or int8, float4_e2m1fn_x2: the same bytes), R % 16 == 0, K % 64 == 0.
        generation: "0.6.16" or "0.6.9".

    Returns:
        [E, R, K/2] uint8.

    Raises:
        TypeError: another dtype.
        ValueError: another number of dimensions, or R or K not aligned.
    """
    check_choice("generation", generation, GENERATIONS)
    interleaved = _check_weights("interleaved", interleaved)
    out = torch.empty_like(interleaved)
    if generation == "0.6.9":
        first, second = _paired_bytes(interleaved)
        upper, lower = _paired_rows(out)
        upper.copy_((first & 0x0F) | (second << 4))
        lower.copy_((first >> 4) | (second & 0xF0))
        return out
    for source, target in _row_blocks(interleaved, out):
        logical = _logical_planes(target)
        planes = _move_bits(_stored_planes(source), inverse=True).view(logical.shape)
        _transpose_bytes(planes)
        logical.copy_(planes)
    return out


@uncompiled
def fold_scales_sm90(scales: Tensor, generation: str = "0.6.16") -> Tensor:
    """Return scales in the order that the SM90 kernel takes; the call passes the result viewed as int32.

    Args:
        scales: [E, R, G] uint8 or float8_e8m0fnu, G = K/32.
        generation: "0.6.16" (flashinfer 0.6.16 and later) or "0.6.9" (0.6.9 to 0.6.15).

    Returns:
        uint8 [E, R/64, G/4, 16, 16] for "0.6.16", [E, G/4, R*4] for "0.6.9".

    Raises:
        TypeError: another dtype.
        ValueError: an unknown generation, another number of dimensions, G % 4 != 0 (K % 128 != 0), or, for
            "0.6.16", R % 64 != 0.
    """
    check_choice("generation", generation, GENERATIONS)
    scales = check_tensor("scales", scales, dtype=SCALE_DTYPES, shape=("E", "R", "K/32")).view(torch.uint8)
    experts, rows, groups = scales.shape
    row_block = 64 if generation == "0.6.16" else 1
    if rows % row_block or groups % 4:
        raise ValueError(
            f"scales: expected [E, R, K/32] with R % {row_block} == 0 and K % 128 == 0, got "
            f"{list(scales.shape)} (R = {rows}, K = {groups * 32})"
        )
    if generation == "0.6.9":
        folded = scales.reshape(experts, rows, groups // 4, 4).permute(0, 2, 1, 3)
        return folded.reshape(experts, groups // 4, rows * 4)
    folded = scales.reshape(experts, rows // 64, 4, 16, groups // 4, 4).permute(0, 1, 4, 3, 2, 5)
    return folded.reshape(experts, rows // 64, groups // 4, 16, 16)


@uncompiled
def unfold_scales_sm90(folded: Tensor, generation: str | None = None) -> Tensor:
    """Return scales in logical order, the inverse of `fold_scales_sm90`.

    Args:
        folded: uint8 [E, R/64, G/4, 16, 16] ("0.6.16") or [E, G/4, R*4] ("0.6.9"), or either viewed as int32
            (the last dimension a quarter).
        generation: None to go by the shape, or the generation that the shape must be of.

    Returns:
        [E, R, G] uint8, G = K/32.

    Raises:
        TypeError: another dtype.
        ValueError: an unknown generation, or a shape that is none of these.
    """
    if generation is not None:
        check_choice("generation", generation, GENERATIONS)
    folded = check_tensor("folded", folded, dtype=(torch.uint8, torch.int32), shape=("...",))
    unit = folded.element_size()
    is_new = folded.dim() == 5 and folded.shape[3:] == (16, 16 // unit)
    is_old = folded.dim() == 3 and folded.shape[2] * unit % 4 == 0
    if not {None: is_new or is_old, "0.6.16": is_new, "0.6.9": is_old}[generation]:
        new = f"[E, R/64, G/4, 16, {16 // unit}] (0.6.16)"
        old = f"[E, G/4, R{'*4' if unit == 1 else ''}] (0.6.9)"
        wanted = {None: f"{new} or {old}", "0.6.16": new, "0.6.9": old}[generation]
        raise ValueError(
            f"folded: expected {folded.dtype} scales of shape {wanted}, got {list(folded.shape)}"
        )
    scales = folded.contiguous().view(torch.uint8)
    if is_old:
        experts, quads, width = scales.shape
        rows = width // 4
        return scales.view(experts, quads, rows, 4).permute(0, 2, 1, 3).reshape(experts, rows, quads * 4)
    experts, blocks, quads = scales.shape[:3]
    unfolded = scales.view(experts, blocks, quads, 16, 4, 4).permute(0, 1, 4, 3, 2, 5)
    return unfolded.reshape(experts, blocks * 64, quads * 4)


def _check_dim(t: Tensor, dim: int, divisor: int) -> int:
    """Return `dim` counted from the front; raise unless the size along it is divisible."""
    check_tensor("t", t, dtype=None, shape=("...",))
    check_int("dim", dim, minimum=-t.dim(), maximum=t.dim() - 1)
    if t.shape[dim] % divisor:
        raise ValueError(f"t: expected a size divisible by {divisor} along dim {dim}, got {list(t.shape)}")
    return dim % t.dim()


def _halves(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    dim = _check_dim(t, dim, divisor=2)
    half = t.shape[dim] // 2
    return t.narrow(dim, 0, half), t.narrow(dim, half, half)


def _check_weights(name: str, weights: Tensor) -> Tensor:
    weights = check_tensor(name, weights, dtype=PACKED_DTYPES, shape=("E", "R", "K/2"))
    rows, columns = weights.shape[1:]
    if rows % 16 or columns % 32:
        raise ValueError(
            f"{name}: expected [E, R, K/2] with R % 16 == 0 and K % 64 == 0, got {list(weights.shape)} "
            f"(R = {rows}, K = {columns * 2})"
        )
    weights = weights.contiguous().view(torch.uint8)
    return weights.clone() if weights.storage_offset() % 4 else weights  # has to be viewed as words


def _row_blocks(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield matching pieces of two [E, R, K/2] as int32 [rows, K/8], whole 16-row blocks to fit the cache."""
    columns = source.shape[2]
    if source.numel() == 0:
        return
    step = 16 * max(1, _CHUNK_BYTES // (16 * columns))
    source, target = source.view(torch.int32).flatten(0, 1), target.view(torch.int32).flatten(0, 1)
    for start in range(0, len(source), step):
        yield source[start : start + step], target[start : start + step]


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
