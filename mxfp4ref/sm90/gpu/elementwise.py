"""The stages beside the GEMMs: the activation of every routed row, and the weighted sum of every token."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfp4ref.sm90.activation import (
    ERF_LARGE,
    ERF_SMALL,
    ERF_SPLIT,
    GEGLU,
    GEGLU_TANH,
    GELU,
    GELU_TANH,
    HALF_ROOT_TWO,
    IDENTITY,
    RELU,
    RELU2,
    SILU,
    SITU,
    SWIGLU,
    SWIGLU_BIAS,
    SWIGLU_STEP,
    Activation,
)
from mxfp4ref.sm90.gpu import primitives as gpu
from mxfp4ref.sm90.gpu.routing import Rows

__all__ = ["KERNELS", "activate", "finalize"]

_GATED = (SWIGLU, GEGLU, SWIGLU_BIAS, SWIGLU_STEP, GEGLU_TANH, SITU)
_UNGATED = (GELU, RELU, SILU, RELU2, IDENTITY)
KERNELS = (*_GATED, *_UNGATED)  # that `activate` has
_SWIGLU, _GEGLU, _SWIGLU_BIAS, _SWIGLU_STEP, _GEGLU_TANH, _SITU = map(tl.constexpr, _GATED)
_GELU, _RELU, _SILU, _RELU2, _IDENTITY = map(tl.constexpr, _UNGATED)
_SPLIT, _HALF_ROOT_TWO = tl.constexpr(ERF_SPLIT), tl.constexpr(HALF_ROOT_TWO)
_SQRT_2_PI, _CUBIC = map(tl.constexpr, GELU_TANH)
_LARGE, _SMALL = tl.constexpr(ERF_LARGE), tl.constexpr(ERF_SMALL)
_PARAMETERS = 3  # of an activation, at most
_COLUMNS = 1024  # of one program, whatever the width, so that one binary serves all


def activate(
    activation: Activation,
    fc1_output: Tensor,
    rows: Rows,
    bias: Tensor | None,
    parameters: Sequence[Tensor | None],
) -> Tensor:
    """`sm90.activation.activate` of every routed row, rounded to bf16.

    Args:
        activation: an entry whose id is in `KERNELS`.
        fc1_output: `[R, 2I] bf16`, `[R, I]` where the activation has no gate.
        rows: the routed rows and their experts.
        bias: `[E, 2I] bf16`, likewise, or None.
        parameters: those that the activation reads, `[E] float32` each or None.

    Returns:
        `[R, I] bf16`; what lies behind the routed rows is unset.
    """
    num_rows, width = fc1_output.shape[0], fc1_output.shape[1] // (2 if activation.gated else 1)
    out = torch.empty(num_rows, width, dtype=torch.bfloat16, device=fc1_output.device)
    unused = (None,) * (_PARAMETERS - len(parameters))
    defaults = [*activation.defaults.values(), *(0.0 for _ in unused)]
    _activate[num_rows, triton.cdiv(width, _COLUMNS)](
        fc1_output,
        out.view(torch.int16),
        rows.expert,
        rows.start,
        bias,
        *parameters,
        *unused,
        width,
        len(rows.start) - 1,
        *(struct.unpack("<i", struct.pack("<f", default))[0] for default in defaults),
        ACTIVATION=activation.id,
        GATED=activation.gated,
        COLUMNS=_COLUMNS,
    )
    return out


def finalize(fc2_output: Tensor, rows: Rows, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`sm90.finalize.finalize` of every token, rounded to bf16.

    Args:
        fc2_output: `[R, H] bf16`.
        rows: the rows of the tokens' slots.
        scales: `[M, k] float32`, contiguous.
        bias: `[E, H] bf16` or None.

    Returns:
        `[M, H] bf16`.
    """
    num_tokens, width = len(scales), fc2_output.shape[1]
    out = torch.empty(num_tokens, width, dtype=torch.bfloat16, device=fc2_output.device)
    _finalize[num_tokens, triton.cdiv(width, _COLUMNS)](
        fc2_output,
        out.view(torch.int16),
        rows.row,
        rows.expert,
        scales,
        bias,
        width,
        rows.top_k,
        COLUMNS=_COLUMNS,
    )
    return out


@triton.jit
def _sigmoid(z):
    log2_e = tl.full(z.shape, 0x3FB8AA3B, tl.int32).to(tl.float32, bitcast=True)
    one = tl.full(z.shape, 1.0, tl.float32)
    return gpu.rcp(gpu.add(one, gpu.ex2(gpu.mul(gpu.negate(z), log2_e))))


@triton.jit
def _tanh(z):
    two, minus_one = tl.full(z.shape, 2.0, tl.float32), tl.full(z.shape, -1.0, tl.float32)
    return gpu.fma(_sigmoid(gpu.mul(z, two)), two, minus_one)


@triton.jit
def _number(BITS: tl.constexpr, like):
    """The float32 number of these bits, in the shape of another tensor."""
    return tl.full(like.shape, BITS, tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _erf(z):
    sign = z.to(tl.int32, bitcast=True) & -0x80000000
    magnitude = (z.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    large = magnitude >= _number(_SPLIT, z)
    power, factor = tl.where(large, magnitude, gpu.mul(z, z)), tl.where(large, gpu.negate(magnitude), z)
    total = tl.where(large, _number(_LARGE[0], z), _number(_SMALL[0], z))
    for i in tl.static_range(1, 7):
        total = gpu.fma(total, power, tl.where(large, _number(_LARGE[i], z), _number(_SMALL[i], z)))
    total = gpu.fma(total, factor, factor)
    rest = gpu.add(tl.full(z.shape, 1.0, tl.float32), gpu.negate(gpu.ex2(total)))
    return tl.where(large, (rest.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True), total)


@triton.jit
def _clamp(x, limit):
    return gpu.maximum(gpu.minimum(x, limit), gpu.negate(limit))


@triton.jit
def _relu(x):
    """NaN stays; whether it is the canonical one shows nowhere."""
    return tl.where(x != x, x, gpu.maximum(x, tl.zeros(x.shape, tl.float32)))


@triton.jit
def _parameter(values, expert, DEFAULT: tl.constexpr, COLUMNS: tl.constexpr):
    """An expert's parameter, or what is compiled in, whose bits DEFAULT is."""
    parameter = tl.full([COLUMNS], DEFAULT, tl.int32).to(tl.float32, bitcast=True)
    if values is not None:
        parameter = tl.broadcast_to(tl.load(values + expert), (COLUMNS,))
    return parameter


@triton.jit(do_not_specialize=["num_experts"])
def _activate(
    fc1_output,  # [R, 2I] bf16, [R, I] without a gate
    out,  # [R, I] int16, the bits
    row_expert,
    start,
    bias,
    first,  # the activation's parameters, [E] float32 each
    second,
    third,
    width,
    num_experts,
    FIRST: tl.constexpr,  # what is compiled in, as bits
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some columns of one row, operation by operation as `docs/arithmetic.md` lists them."""
    row = tl.program_id(0)
    if row < tl.load(start + num_experts):
        row64 = row.to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        expert = tl.load(row_expert + row).to(tl.int64)
        rows = 2 * width if GATED else width
        value_at = fc1_output + row64 * rows + column
        # Without a gate the only value goes by the name of the gate, and is multiplied by one.
        up = tl.full([COLUMNS], 1.0, tl.float32)
        gate = gpu.widen(tl.load(value_at + (rows - width), mask=inside, other=0.0))
        if GATED:
            up = gpu.widen(tl.load(value_at, mask=inside, other=0.0))
        if bias is not None:
            bias_at = bias + expert * rows + column
            gate = gpu.add(gate, gpu.widen(tl.load(bias_at + (rows - width), mask=inside, other=0.0)))
            if GATED:
                up = gpu.add(up, gpu.widen(tl.load(bias_at, mask=inside, other=0.0)))
        p0 = _parameter(first, expert, FIRST, COLUMNS)
        p1 = _parameter(second, expert, SECOND, COLUMNS)
        p2 = _parameter(third, expert, THIRD, COLUMNS)
        if ACTIVATION == _SWIGLU_BIAS:  # alpha, beta, limit
            up = gpu.add(_clamp(up, p2), p1)
            gate = gpu.minimum(gate, p2)
            weighted = gpu.mul(gate, _sigmoid(gpu.mul(gate, p0)))
        elif ACTIVATION == _SWIGLU_STEP:  # limit
            weighted = gpu.minimum(gpu.mul(gate, _sigmoid(gate)), p0)
            up = _clamp(up, p0)
        elif ACTIVATION == _SITU:  # beta, linear beta
            weighted = gpu.mul(gpu.mul(_tanh(gpu.mul(gate, gpu.rcp(p0))), _sigmoid(gate)), p0)
            up = gpu.mul(_tanh(gpu.mul(up, gpu.rcp(p1))), p1)
        elif ACTIVATION == _GEGLU or ACTIVATION == _GELU:  # noqa: SIM109
            one, half = tl.full([COLUMNS], 1.0, tl.float32), tl.full([COLUMNS], 0.5, tl.float32)
            weight = gpu.add(one, _erf(gpu.mul(gate, _number(_HALF_ROOT_TWO, gate))))
            weighted = gpu.mul(gpu.mul(half, gate), weight)
        elif ACTIVATION == _GEGLU_TANH:
            inner = gpu.fma(gpu.mul(_number(_CUBIC, gate), gate), gate, _number(_SQRT_2_PI, gate))
            weighted = gpu.fma(gate, gpu.tanh(gpu.mul(gate, inner)), gate)
            weighted = gpu.mul(tl.full([COLUMNS], 0.5, tl.float32), weighted)
        elif ACTIVATION == _RELU:
            weighted = _relu(gate)
        elif ACTIVATION == _RELU2:
            weighted = gpu.mul(_relu(gate), _relu(gate))
        elif ACTIVATION == _IDENTITY:
            weighted = gate
        else:
            tl.static_assert(ACTIVATION == _SWIGLU or ACTIVATION == _SILU)  # noqa: SIM109
            weighted = gpu.mul(gate, _sigmoid(gate))
        tl.store(out + row64 * width + column, gpu.bf16_bits(gpu.mul(weighted, up)), mask=inside)


@triton.jit(do_not_specialize=["top_k"])
def _finalize(
    fc2_output,  # [R, H] bf16
    out,  # [M, H] int16, the bits
    slot_row,
    row_expert,
    scales,
    bias,
    width,
    top_k,
    COLUMNS: tl.constexpr,
):
    """Some columns of one token: its slots in order, one FMA each."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    acc = tl.zeros([COLUMNS], tl.float32)
    for slot in range(top_k):
        row = tl.load(slot_row + token * top_k + slot)
        if row >= 0:
            row64 = row.to(tl.int64)
            y = gpu.widen(tl.load(fc2_output + row64 * width + column, mask=inside, other=0.0))
            if bias is not None:
                expert = tl.load(row_expert + row).to(tl.int64)
                y = gpu.add(y, gpu.widen(tl.load(bias + expert * width + column, mask=inside, other=0.0)))
            scale = tl.broadcast_to(tl.load(scales + token * top_k + slot), (COLUMNS,))
            acc = gpu.fma(scale, y, acc)
    tl.store(out + token * width + column, gpu.bf16_bits(acc), mask=inside)
