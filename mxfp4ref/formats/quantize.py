"""Into MXFP4: quantising values, and float32 scales to UE8M0 bytes without loss.

OCP Microscaling Formats (MX) 1.0, section 6.3. As in `mxfp4.py`, every number comes out of an integer table of bit
patterns.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mxfp4ref._choices import SCALE_RULES, ScaleRule
from mxfp4ref._compiler import uncompiled
from mxfp4ref._spans import spans
from mxfp4ref._validate import check_choice, check_tensor
from mxfp4ref.formats.mxfp4 import CHUNK_GROUPS, GROUP_SIZE, SCALE_BIAS, float_bits

__all__ = ["SCALE_RULES", "fp32_to_ue8m0", "quantize"]

_SCALE_NAN = 255


@uncompiled
def quantize(values: Tensor, *, rule: ScaleRule = "floor") -> tuple[Tensor, Tensor]:
    """Quantise to MXFP4: a power-of-two scale for each 32 elements, elements RN-even, saturating at +-6.

    With a the largest magnitude of the group and exact logarithms and quotients, the scale is

    - "floor": 2^(floor(log2 a) - 2), the rule of OCP MX 1.0, section 6.3. a / scale is in [4, 8), so elements
      may saturate.
    - "ceil": 2^ceil(log2(a / 6)), the least scale that does not saturate; DeepSeek-V4's rule. (What torchao
      calls CEIL, 2^(ceil(log2 a) - 2), is another rule and is not offered.)
    - "rceil": the same with the quotient in float32, RN(a * RN(1/6)), as in torchao and cuBLAS. It differs
      from "ceil" for a single float32: a = 6 * 2^-127 + 2^-148 gives byte 0, not 1.
    - "even": 2^(floor(log2 r) - 2) where r is a rounded half up to one fraction bit, so that 1.75 * 2^e
      counts as 2^(e+1); as in torchao.

    The exponent is limited below at -127 (byte 0), which is also the scale of an all-zero group; the limit
    above is out of reach. Elements that become zero keep their sign. A group with a NaN or an Inf gets scale
    byte 255 and codes 0, so that all of it dequantises to NaN under either convention. Otherwise the scales
    are meant as "ocp": under "sm90" a group with byte 0 is zero.

    Args:
        values: [..., K] bfloat16, float16 or float32, K a multiple of 32.
        rule: "floor", "ceil", "rceil" or "even".

    Returns:
        packed [..., K/2] uint8 and scales [..., K/32] uint8.

    Raises:
        TypeError: another dtype.
        ValueError: K not a multiple of 32, or an unknown rule.
    """
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    values = check_tensor("values", values, dtype=dtypes, shape=("...", "K")).detach()
    check_choice("rule", rule, SCALE_RULES)
    *batch, length = values.shape
    if length % GROUP_SIZE:
        raise ValueError(
            f"values: expected a last dimension divisible by {GROUP_SIZE}, got {list(values.shape)}"
        )
    packed = torch.empty((*batch, length // 2), dtype=torch.uint8, device=values.device)
    scales = torch.empty((*batch, length // GROUP_SIZE), dtype=torch.uint8, device=values.device)
    if scales.numel():
        from mxfp4ref.formats import compiled  # which needs this module

        groups = scales.numel()
        compiled.quantize(
            values.reshape(groups, GROUP_SIZE), rule, packed.view(groups, -1), scales.view(groups)
        )
    return packed, scales


def by_steps(values: Tensor, rule: str, packed: Tensor, scales: Tensor) -> None:
    """Write `packed [groups, 16]` and `scales [groups]` of `values [groups, 32]`."""
    scale_steps, code_steps = (table.to(values.device) for table in step_tables(rule))
    for chunk in spans(len(scales), CHUNK_GROUPS):
        bits = _float32_bits(values[chunk])
        magnitude = bits & 0x7FFFFFFF  # ordered like the floats, Inf and NaN last
        scale = torch.bucketize(magnitude.amax(dim=1), scale_steps, out_int32=True, right=True)
        steps = code_steps[scale.to(torch.int64)]
        codes = (bits < 0).to(torch.uint8) << 3
        for step in range(steps.shape[1]):
            codes += magnitude >= steps[:, step, None]
        codes.masked_fill_((scale == _SCALE_NAN)[:, None], 0)
        packed[chunk] = codes[:, 0::2] | codes[:, 1::2] << 4
        scales[chunk] = scale


@uncompiled
def fp32_to_ue8m0(values: Tensor) -> Tensor:
    """Return the UE8M0 bytes of float32 scales, exactly or not at all.

    Args:
        values: [...] float32, each a power of two from 2^-127 to 2^127.

    Returns:
        [...] uint8; byte b stands for 2^(b-127). Byte 0 (2^-127) is a zero scale under "sm90".

    Raises:
        TypeError: another dtype.
        ValueError: some values are something else, zero, Inf and NaN included; the message has their number
            and the index, value and bits of the first eight.
    """
    bits = check_tensor("values", values, dtype=torch.float32, shape=("...",)).detach().view(torch.int32)
    exponent = bits >> 23  # negative where the sign is set
    normal = (exponent >= 1) & (exponent <= 254) & (bits & 0x7FFFFF == 0)
    wrong = ~(normal | (bits == 0x00400000))
    count = int(wrong.sum())
    if count:
        first = [
            f"{index} = {float(values[tuple(index)]):.9g} (0x{int(bits[tuple(index)]) & 0xFFFFFFFF:08X})"
            for index in wrong.nonzero()[:8].tolist()
        ]
        raise ValueError(
            f"values: expected powers of two from 2^-127 to 2^127, got {count} of {values.numel()} that are "
            f"not: {', '.join(first)}{', ...' if count > 8 else ''}"
        )
    return exponent.to(torch.uint8)


@cache
def step_tables(rule: str) -> tuple[Tensor, Tensor]:
    """Return the least float32 magnitudes, as bits, of scale bytes 1..255 [255] and codes 1..7 [256, 7]."""

    def bits(eighths: int, exponent: int) -> int:
        return float_bits(eighths, exponent - 3, torch.float32)

    scale_steps = []
    for byte in range(1, 255):
        exponent = byte - SCALE_BIAS
        if rule == "floor":
            step = bits(8 * 4, exponent)
        elif rule == "even":
            step = bits(7, exponent + 2)  # 1.75 of the binade below
        else:
            step = bits(8 * 6, exponent - 1) + 1  # the first magnitude above 6 of the scale before
            if rule == "rceil" and byte == 1:
                step += 1  # its quotient is subnormal and still rounds to 2^-127
        scale_steps.append(min(step, 0x7F800000))
    scale_steps.append(0x7F800000)  # Inf and NaN

    # Half-way points between codes; a tie goes up where the upper code is even.
    midpoints = [(2, False), (6, True), (10, False), (14, True), (20, False), (28, True), (40, False)]
    code_steps = [[bits(m, byte - SCALE_BIAS) + (not up) for m, up in midpoints] for byte in range(256)]
    return (
        torch.tensor(scale_steps, dtype=torch.int32, device="cpu"),
        torch.tensor(code_steps, dtype=torch.int32, device="cpu"),
    )


def _float32_bits(values: Tensor) -> Tensor:
    """Return the float32 bit patterns of `values` as int32, subnormals kept whatever the flush mode."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).to(torch.int32) << 16
    return values.to(torch.float32).view(torch.int32)
