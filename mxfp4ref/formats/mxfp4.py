"""MXFP4: what the bytes mean. E2M1 codes, UE8M0 scales in two conventions, packed groups of 32.

`docs/arithmetic.md`, "Formats"; OCP Microscaling Formats (MX) 1.0, sections 5.3.3 (E2M1), 5.4.1 (E8M0), 6.3.

Every number here comes out of an integer table of bit patterns, never out of floating-point arithmetic: the
bits depend on no device, thread count, flush-to-zero mode or default dtype.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref._choices import CONVENTIONS, Convention
from mxfp4ref._compiler import uncompiled
from mxfp4ref._spans import spans
from mxfp4ref._validate import check_choice, check_output, check_same_device, check_tensor

__all__ = [
    "E2M1_VALUES",
    "GROUP_SIZE",
    "PACKED_DTYPES",
    "SCALE_DTYPES",
    "decode_ue8m0",
    "dequantize",
    "pack_codes",
    "unpack_codes",
]

GROUP_SIZE = 32
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# Bytes under any name: checkpoints store packed codes as int8 and scales as float8_e8m0fnu as well.
PACKED_DTYPES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
SCALE_DTYPES = (torch.uint8, torch.float8_e8m0fnu)

SCALE_BIAS = 127
_CODE_ONE = E2M1_VALUES.index(1.0)
# Fraction bits, largest exponent, and integer types as wide as one value and (torch) as a pair of values.
_FORMATS: dict[torch.dtype, tuple[int, int, Any, torch.dtype]] = {
    torch.bfloat16: (7, 127, np.uint16, torch.int32),
    torch.float32: (23, 127, np.uint32, torch.int64),
    torch.float64: (52, 1023, np.uint64, torch.complex128),  # moved as a unit, never computed with
}
# 32,768 groups take a 4 MiB index: enough to hide the cost of a torch call, and it stays in cache.
CHUNK_GROUPS = 1 << 15
# Gather runs in parallel over rows only, so a chunk is folded into up to this many.
_GATHER_ROWS = 64


@uncompiled
def unpack_codes(packed: Tensor) -> Tensor:
    """Return the E2M1 codes of `packed`, one a byte; the low nibble is the even index along K.

    Args:
        packed: [..., K/2] uint8 (or int8, float4_e2m1fn_x2: the same bytes).

    Returns:
        [..., K] uint8, values 0 to 15.

    Raises:
        TypeError: another dtype.
        ValueError: no dimension.
    """
    packed = check_tensor("packed", packed, dtype=PACKED_DTYPES, shape=("...", "K/2")).view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


@uncompiled
def pack_codes(codes: Tensor) -> Tensor:
    """Return E2M1 codes packed two a byte, the inverse of `unpack_codes`.

    Args:
        codes: [..., K] uint8, values 0 to 15, K even.

    Returns:
        [..., K/2] uint8.

    Raises:
        TypeError: another dtype.
        ValueError: no dimension, K odd, or a value above 15.
    """
    check_tensor("codes", codes, dtype=torch.uint8, shape=("...", "K"))
    if codes.shape[-1] % 2:
        raise ValueError(f"codes: expected an even last dimension, got {list(codes.shape)}")
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"codes: expected values from 0 to 15, got {int(codes.max())}")
    return codes[..., 0::2] | codes[..., 1::2] << 4


@uncompiled
def decode_ue8m0(
    scales: Tensor, convention: Convention = "ocp", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the values of UE8M0 scale bytes: byte b is 2^(b-127), exact in each dtype (2^-127 is subnormal).

    Args:
        scales: [...] uint8 or float8_e8m0fnu.
        convention: "ocp" (OCP MX 1.0): byte 0 is 2^-127, byte 255 is NaN (all exponent and fraction bits set,
            sign clear). "sm90": the byte is a float32 exponent field, so 0 is +0 and 255 is +Inf.
        dtype: bfloat16, float32 or float64.

    Returns:
        [...] of `dtype`.

    Raises:
        TypeError: another dtype of `scales`.
        ValueError: an unknown convention or dtype.
    """
    scales = check_tensor("scales", scales, dtype=SCALE_DTYPES, shape=("...",)).view(torch.uint8)
    check_choice("convention", convention, CONVENTIONS)
    check_choice("dtype", dtype, tuple(_FORMATS))
    return _scale_table(convention, dtype, scales.device)[scales.to(torch.int64)]


@uncompiled
def dequantize(
    packed: Tensor,
    scales: Tensor,
    *,
    convention: Convention = "ocp",
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Return the values of MXFP4 groups, code times scale, rounded (RN) to `dtype`.

    Every product is exact in each dtype, subnormals included, but for those from 2^128 up, which are Inf in
    float32 and bfloat16. Byte 255 is NaN for every code under "ocp"; under "sm90" it is +Inf, so that the
    element is Inf of the code's sign, or NaN for a zero code. Zeros have the code's sign, also where "sm90"
    makes byte 0 a zero scale. Every NaN has the sign clear and all other bits set (bfloat16 0x7FFF).

    The kernel never forms these values (`docs/arithmetic.md`, section 3).

    Args:
        packed: [..., K/2] uint8 (or int8, float4_e2m1fn_x2: the same bytes).
        scales: [..., K/32] uint8 or float8_e8m0fnu, on the same device.
        convention: "ocp" or "sm90", see `decode_ue8m0`.
        dtype: bfloat16, float32 or float64.
        out: [..., K] of `dtype`, contiguous, to be written instead of a new tensor; no memory of the other two.

    Returns:
        [..., K] of `dtype`.

    Raises:
        TypeError: another dtype of a tensor.
        ValueError: shapes that do not match, tensors on two devices, an unknown convention or dtype.
    """
    packed = check_tensor("packed", packed, dtype=PACKED_DTYPES, shape=("...", "K/2")).view(torch.uint8)
    scales = check_tensor("scales", scales, dtype=SCALE_DTYPES, shape=("...", "K/32")).view(torch.uint8)
    check_choice("convention", convention, CONVENTIONS)
    check_choice("dtype", dtype, tuple(_FORMATS))
    if packed.shape != (*scales.shape[:-1], scales.shape[-1] * GROUP_SIZE // 2):
        raise ValueError(
            f"scales: expected one byte for 16 bytes of packed {list(packed.shape)}, got {list(scales.shape)}"
        )
    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    if out is not None:
        inputs = {"packed": packed, "scales": scales}
        check_output("out", out, dtype=dtype, shape=shape, inputs=inputs, contiguous=True)
    device = check_same_device({"packed": packed, "scales": scales, "out": out})
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    if scales.numel():
        from mxfp4ref.formats import compiled  # which needs this module

        pairs = pair_table(convention, dtype, device)
        compiled.look_up(packed.reshape(-1, GROUP_SIZE // 2), scales.flatten(), pairs, out)
    return out


def look_up(packed: Tensor, scales: Tensor, pairs: Tensor, out: Tensor) -> None:
    """Write the values of groups; scale byte and code byte together are the index of a pair of finished values.

    Args:
        packed: `[groups, 16] uint8`.
        scales: `[groups] uint8`.
        pairs: what `pair_table` returns.
        out: contiguous, 32 values a group.
    """
    target = torch.empty_like(out) if out.storage_offset() % 2 else out  # torch views no odd one as pairs
    words = target.view(pairs.dtype).view(len(scales), -1)
    for chunk in spans(len(scales), CHUNK_GROUPS):
        rows = math.gcd(chunk.stop - chunk.start, _GATHER_ROWS)
        index = packed[chunk].to(torch.int64).add_(scales[chunk, None].to(torch.int64), alpha=256)
        torch.gather(pairs.expand(rows, -1), 1, index.view(rows, -1), out=words[chunk].view(rows, -1))
    if target is not out:
        out.copy_(target)


def float_bits(significand: int, exponent: int, dtype: torch.dtype) -> int:
    """Return the bits of significand * 2^exponent >= 0 in `dtype`: Inf above its range, inside it has to fit."""
    fraction_bits, max_exponent, _, _ = _FORMATS[dtype]
    if significand == 0:
        return 0
    top = max(significand.bit_length() - 1 + exponent, 1 - max_exponent)  # subnormals have the least normal's
    fraction = significand << (exponent - top + fraction_bits)
    # The leading bit of a normal number is not stored: it adds one to the exponent field.
    pattern = ((top + max_exponent - 1) << fraction_bits) + fraction
    return min(pattern, (2 * max_exponent + 1) << fraction_bits)


@cache
def _patterns(convention: str, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """Return the bit patterns of scale byte times E2M1 code, [256, 16] unsigned."""
    fraction_bits, max_exponent, unsigned, _ = _FORMATS[dtype]
    infinity = (2 * max_exponent + 1) << fraction_bits
    nan = infinity | ((1 << fraction_bits) - 1)
    table = np.empty((256, 16), dtype=unsigned)
    sign_bit = 1 << (8 * table.itemsize - 1)
    for byte in range(256):
        for code, value in enumerate(E2M1_VALUES):
            halves = int(abs(value) * 2)
            if byte == 255 and (convention == "ocp" or halves == 0):
                table[byte, code] = nan
                continue
            if byte == 255:
                magnitude = infinity
            elif byte == 0 and convention == "sm90":
                magnitude = 0
            else:
                magnitude = float_bits(halves, byte - SCALE_BIAS - 1, dtype)
            table[byte, code] = magnitude | (sign_bit if code & 8 else 0)
    return table


@cache
def _scale_table(convention: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the value of each scale byte, [256] of `dtype`: the products with code 2, which is 1."""
    column = np.ascontiguousarray(_patterns(convention, dtype)[:, _CODE_ONE])
    return torch.from_numpy(column.view(f"i{column.itemsize}")).view(dtype).to(device)


@cache
def pair_table(convention: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the pair of values of each scale and code byte as one unit, at index scale * 256 + codes."""
    patterns = _patterns(convention, dtype)
    byte = np.arange(256)
    pairs = np.stack((patterns[:, byte & 15], patterns[:, byte >> 4]), axis=-1)  # the low nibble comes first
    signed = torch.from_numpy(pairs.view(f"i{pairs.itemsize}"))
    return signed.view(_FORMATS[dtype][3]).flatten().to(device)
