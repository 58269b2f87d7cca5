"""MXFP4 weights as the W4A8 ("Humming") kernel takes them: E2M1 codes, exponent offsets, one residual an expert.

The kernel multiplies FP8 numbers, so that a weight with its scale has to be an E4M3 number: an exponent of 4 bits
holds a range of 12 scales. flashinfer's `preprocess_moe_weights_for_sm90_mixed_gemm_humming` takes the 12 highest of
each expert and raises lower scales to the lowest of them, which rounds their codes: weights are lost without a word.
`preparation_loss` says how many (`docs/arithmetic.md`, section 11).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._validate import check_int, check_same_device, check_tensor
from mxfp4ref.formats.mxfp4 import E2M1_VALUES, GROUP_SIZE, PACKED_DTYPES, SCALE_DTYPES, unpack_codes

__all__ = [
    "COMPENSATION",
    "MAX_RANGE",
    "PreparationLoss",
    "PreparedWeights",
    "deinterleave",
    "e4m3_weights",
    "interleave",
    "preparation_loss",
    "prepare",
    "rewrite_table",
]

MAX_RANGE = 11  # the highest scale of an expert less the lowest one that is kept
COMPENSATION = 64.0  # what residuals are multiplied by for the call: a weight is code * 2^(offset - 6)

_SIGNS = 0x88888888 - (1 << 32)  # of the eight codes of a word, as an int32
# Bit 4i + 3 of a word, the sign of code i, is stored at this bit: those of codes 0 to 3 on top of each byte.
_SIGN_TARGETS = (7, 15, 23, 31, 3, 11, 19, 27)


@dataclass(frozen=True)
class PreparedWeights:
    """Weights of E experts in logical order: a weight is its code times 2^(offset - 1) times twice the residual.

    Attributes:
        packed: `[E, R, K/2] uint8`, E2M1 codes, the low nibble the even K index.
        offsets: `[E, R, K/32] uint8`, 1 to 12.
        residual: `[E] float32`, as flashinfer returns it; the call takes it times `COMPENSATION`.
    """

    packed: Tensor
    offsets: Tensor
    residual: Tensor


@dataclass(frozen=True)
class PreparationLoss:
    """What `prepare` does to weights. A scale byte b counts as 2^(b - 127), 255 and 0 too.

    Attributes:
        groups: all groups of 32 weights.
        groups_rewritten: those whose scale is raised.
        weights_changed: weights that then have another value.
        weights_zeroed: those of them that become zero.
        worst_error: the largest difference of a weight.
        worst_relative_error: the largest difference of a weight as a part of it; 1 where one becomes zero.
        mean_error: the mean difference over all weights, changed or not.
    """

    groups: int
    groups_rewritten: int
    weights_changed: int
    weights_zeroed: int
    worst_error: float
    worst_relative_error: float
    mean_error: float

    def __add__(self, other: PreparationLoss) -> PreparationLoss:
        """The loss of the weights of both."""
        groups = self.groups + other.groups
        mean = (self.mean_error * self.groups + other.mean_error * other.groups) / max(groups, 1)
        return PreparationLoss(
            groups=groups,
            groups_rewritten=self.groups_rewritten + other.groups_rewritten,
            weights_changed=self.weights_changed + other.weights_changed,
            weights_zeroed=self.weights_zeroed + other.weights_zeroed,
            worst_error=max(self.worst_error, other.worst_error),
            worst_relative_error=max(self.worst_relative_error, other.worst_relative_error),
            mean_error=mean,
        )


@uncompiled
def prepare(packed: Tensor, scales: Tensor, max_range: int = MAX_RANGE) -> PreparedWeights:
    """Weights as the W4A8 kernel takes them, but for the order of their bytes, byte for byte as flashinfer has them.

    Args:
        packed: `[E, R, K/2] uint8`, E2M1 codes, K a multiple of 32.
        scales: `[E, R, K/32] uint8`, UE8M0.
        max_range: 0 to 11, how far below its expert's highest scale a scale may be.

    Raises:
        TypeError, ValueError: another dtype, shape or range.
    """
    packed, scales = _check(packed, scales, max_range)
    kept, lowest = _kept_scales(scales, max_range)
    offsets = (kept - lowest.view(-1, 1, 1) + 1).to(torch.uint8)
    # 2^(lowest - 127) / 2, of which the two lowest are subnormal; the highest byte's 2^128 is Inf, halved or not.
    bits = torch.where(lowest < 2, 0x00200000 << lowest.clamp(max=1), (lowest - 1) << 23)
    residual = torch.where(lowest == 255, 0x7F800000, bits).view(torch.float32)
    return PreparedWeights(_rewritten(packed, kept - scales), offsets, residual)


@uncompiled
def preparation_loss(packed: Tensor, scales: Tensor, max_range: int = MAX_RANGE) -> PreparationLoss:
    """What `prepare`, which takes the same arguments, does to these weights."""
    packed, scales = _check(packed, scales, max_range)
    experts = range(len(scales))  # one at a time: what is unpacked may be all there is
    losses = (_loss_of_expert(packed[e : e + 1], scales[e : e + 1], max_range) for e in experts)
    return functools.reduce(PreparationLoss.__add__, losses)


def _loss_of_expert(packed: Tensor, scales: Tensor, max_range: int) -> PreparationLoss:
    kept, _ = _kept_scales(scales, max_range)
    raised = kept > scales
    codes = unpack_codes(_by_group(packed)[raised]).long()
    before, after = scales[raised].long(), kept[raised].long()
    new_codes = rewrite_table(packed.device)[(after - before)[:, None], codes].long()
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64, device=packed.device)
    old = torch.ldexp(values[codes], before[:, None] - 127)
    new = torch.ldexp(values[new_codes], after[:, None] - 127)
    error = (new - old).abs()
    changed = error > 0
    relative = error[changed] / old[changed].abs()
    return PreparationLoss(
        groups=scales.numel(),
        groups_rewritten=len(codes),
        weights_changed=int(changed.sum()),
        weights_zeroed=int((changed & (new == 0)).sum()),
        worst_error=float(error.max()) if error.numel() else 0.0,
        worst_relative_error=float(relative.max()) if relative.numel() else 0.0,
        mean_error=float(error.sum()) / max(packed.numel() * 2, 1),
    )


@uncompiled
def e4m3_weights(packed: Tensor, offsets: Tensor) -> Tensor:
    """The E4M3 bytes that the kernel multiplies: code times 2^(offset - 6), exact for offsets from 1 to 12.

    Args:
        packed: `[..., K/2] uint8`, E2M1 codes in logical order.
        offsets: `[..., K/32] uint8`; what other offsets do is modelled too.

    Returns:
        `[..., K] uint8`.
    """
    index = offsets.repeat_interleave(GROUP_SIZE, -1).to(torch.int64) * 16 + unpack_codes(packed)
    return e4m3_table(packed.device).view(-1)[index]


@functools.cache
def e4m3_table(device: torch.device | None = None) -> Tensor:
    """The E4M3 byte of every offset and code, `[256, 16] uint8`.

    The kernel adds the offset to the exponents of four bytes at once, which hold the numbers of codes 0 to 3, or 4 to
    7, with an exponent bias of -1 instead of 7; that of code 0 stays 0. Offsets above 12 run over into the next byte.
    """
    offset = np.arange(256, dtype=np.uint32)
    words = (
        offset * np.uint32(0x08080800) + np.uint32(0x0C080000),
        offset * 0x08080808 + np.uint32(0x1C181410),
    )
    magnitudes = np.stack(words, 1).astype("<u4").view(np.uint8)
    return torch.from_numpy(np.concatenate((magnitudes, magnitudes | 0x80), 1)).to(device)


@functools.cache
def rewrite_table(device: torch.device | None = None) -> Tensor:
    """The code of every (how far a scale is raised, code), `[256, 16] uint8`.

    Codes are divided by that power of two and rounded to nearest, ties away from zero; -0 is 0 unless a negative code
    was rounded to it. From 128 on flashinfer's power of two, a float32 whose exponent is counted down, runs over into
    the sign: the factor is -Inf for 128 and -2^(256 - raised) above. Codes lie in the lowest exponents of float32,
    of which two bits are kept. (Zero times -Inf is NaN, here with the sign that x86 gives it.)
    """
    raised = np.arange(256, dtype=np.int64)[:, None]
    code = np.arange(16, dtype=np.int64)
    code[8] = 0
    halves = np.array([0, 1, 2, 3, 4, 6, 8, 12])[code & 7]
    quotient = halves * 2.0 ** -np.minimum(raised, 127)  # in halves, which the codes 0 to 4 count
    small = np.floor(quotient + 0.5)  # E2M1 has a unit of a half below 2, of one below 4, of two above
    magnitude = np.select(
        [quotient < 4, quotient < 8], [small, 4 + np.floor((quotient - 4) / 2 + 0.5)], 6 + (quotient >= 10)
    )
    rounded = magnitude.astype(np.int64) | (code & 8)
    # Exact products code * 2^-126 * 2^(256 - raised): their lowest two exponent bits and highest fraction bit.
    exponent = np.frexp(np.maximum(halves, 1))[1] - 2 + 1 + (256 - raised)
    overrun = ((exponent & 3) << 1) | np.isin(halves, (3, 6, 12))
    overrun = np.where(halves == 0, np.where(raised == 128, 7, 0), np.where(raised == 128, 6, overrun))
    table = np.where(raised < 128, rounded, overrun | (~code & 8))
    return torch.from_numpy(table.astype(np.uint8)).to(device)


@uncompiled
def interleave(packed: Tensor) -> Tensor:
    """flashinfer's layout "fp4_fp8" of weights `[E, R, K/2] uint8`, R % 16 == 0, K % 64 == 0.

    Take rows r and r + 8 of a block of 16 rows, a 32-byte partition p of the row, m and t in 0..1 and c in 0..3. The
    byte pairs 16p + 8m + 4t + c of the two rows make a little-endian 32-bit word; the sign of its code i moves to bit
    `_SIGN_TARGETS[i]`; the word is stored at row r + 8t, word 8p + 4m + c.
    """
    packed = _check_weights("packed", packed)
    if packed.numel() == 0:
        return packed.clone()
    pairs = packed.view(torch.int16).view(*_blocks(packed), 2, 8, packed.shape[2] // 32, 2, 2, 4)
    words = pairs.permute(0, 1, 6, 3, 4, 5, 7, 2).contiguous().view(torch.int32)
    return _move_signs(words, inverse=False).view(torch.uint8).view(packed.shape)


@uncompiled
def deinterleave(interleaved: Tensor) -> Tensor:
    """The inverse of `interleave`."""
    interleaved = _check_weights("interleaved", interleaved)
    if interleaved.numel() == 0:
        return interleaved.clone()
    words = _move_signs(interleaved.view(torch.int32), inverse=True)
    pairs = words.view(torch.int16).view(*_blocks(interleaved), 2, 8, interleaved.shape[2] // 32, 2, 4, 2)
    return pairs.permute(0, 1, 7, 3, 4, 5, 2, 6).contiguous().view(torch.uint8).view(interleaved.shape)


def _check(packed: Tensor, scales: Tensor, max_range: int) -> tuple[Tensor, Tensor]:
    packed = check_tensor("packed", packed, dtype=PACKED_DTYPES, shape=("E", "R", "K/2")).view(torch.uint8)
    experts, rows, columns = packed.shape
    if columns % 16:
        raise ValueError(f"packed: expected a multiple of {GROUP_SIZE} codes along K, got {columns * 2}")
    shape = (experts, rows, columns // 16)
    scales = check_tensor("scales", scales, dtype=SCALE_DTYPES, shape=shape).view(torch.uint8)
    if scales[0:1].numel() == 0:
        raise ValueError(f"scales: expected at least one of each expert, got {list(shape)}")
    check_same_device({"packed": packed, "scales": scales})
    check_int("max_range", max_range, minimum=0, maximum=MAX_RANGE)
    return packed, scales


def _kept_scales(scales: Tensor, max_range: int) -> tuple[Tensor, Tensor]:
    """The scales `[E, R, G] uint8`, raised where they are too low, and each expert's lowest kept, `[E] int32`."""
    of_expert = scales.flatten(1)
    highest, lowest = of_expert.amax(1).to(torch.int32), of_expert.amin(1).to(torch.int32)
    lowest = torch.maximum(lowest, highest - max_range)
    return torch.maximum(scales, lowest.to(torch.uint8).view(-1, 1, 1)), lowest


def _rewritten(packed: Tensor, raised: Tensor) -> Tensor:
    """The codes, of which none is -0, divided by 2^raised; two at a time, and one expert, for the index is large."""
    table = rewrite_table(packed.device)
    pairs = (table[:, None, :] | table[:, :, None] << 4).reshape(-1)  # index raised * 256 + byte
    out = torch.empty_like(packed, memory_format=torch.contiguous_format)
    for of_expert, codes, up in zip(out, _by_group(packed), raised, strict=True):
        index = up.to(torch.int64).unsqueeze(2) * 256 + codes
        torch.index_select(pairs, 0, index.reshape(-1), out=of_expert.view(-1))
    return out


def _by_group(packed: Tensor) -> Tensor:
    return packed.reshape(*packed.shape[:2], -1, GROUP_SIZE // 2)


def _check_weights(name: str, weights: Tensor) -> Tensor:
    weights = check_tensor(name, weights, dtype=PACKED_DTYPES, shape=("E", "R", "K/2")).view(torch.uint8)
    rows, columns = weights.shape[1:]
    if rows % 16 or columns % 32:
        raise ValueError(
            f"{name}: expected [E, R, K/2] with R % 16 == 0 and K % 64 == 0, got {list(weights.shape)}"
        )
    weights = weights.contiguous()
    return weights.clone() if weights.storage_offset() % 4 else weights


def _blocks(weights: Tensor) -> tuple[int, int]:
    return weights.shape[0], weights.shape[1] // 16


def _move_signs(words: Tensor, *, inverse: bool) -> Tensor:
    moved = words & ~_SIGNS
    for code, target in enumerate(_SIGN_TARGETS):
        source, target = (target, 4 * code + 3) if inverse else (4 * code + 3, target)
        bit = words >> source & 1
        moved |= bit << target
    return moved
