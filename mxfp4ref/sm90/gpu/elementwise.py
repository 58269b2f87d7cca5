"""The stages beside the GEMMs: the activation of every routed row, and the weighted sum of every token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxfp4ref.sm90.gpu import primitives as gpu
from mxfp4ref.sm90.gpu.routing import Rows

__all__ = ["finalize", "swiglu"]

_COLUMNS = 1024  # of one program, whatever the width, so that one binary serves all


def swiglu(
    fc1_output: Tensor,
    rows: Rows,
    bias: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    limit: Tensor | None,
) -> Tensor:
    """`sm90.swiglu.swiglu` of every routed row, rounded to bf16.

    Args:
        fc1_output: `[R, 2I] bf16`.
        rows: the routed rows and their experts.
        bias: `[E, 2I] bf16` or None.
        alpha, beta, limit: `[E] float32` each or None.

    Returns:
        `[R, I] bf16`; what lies behind the routed rows is unset.
    """
    num_rows, width = fc1_output.shape[0], fc1_output.shape[1] // 2
    out = torch.empty(num_rows, width, dtype=torch.bfloat16, device=fc1_output.device)
    _swiglu[num_rows, triton.cdiv(width, _COLUMNS)](
        fc1_output,
        out.view(torch.int16),
        rows.expert,
        rows.start,
        bias,
        alpha,
        beta,
        limit,
        width,
        len(rows.start) - 1,
        CLAMPED=not (alpha is None and beta is None and limit is None),
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


@triton.jit(do_not_specialize=["num_experts"])
def _swiglu(
    fc1_output,  # [R, 2I] bf16
    out,  # [R, I] int16, the bits
    row_expert,
    start,
    bias,
    alpha,
    beta,
    limit,
    width,
    num_experts,
    CLAMPED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some columns of one row, operation by operation as `docs/arithmetic.md` lists them."""
    row = tl.program_id(0)
    if row < tl.load(start + num_experts):
        row64 = row.to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        expert = tl.load(row_expert + row).to(tl.int64)
        up = gpu.widen(tl.load(fc1_output + row64 * (2 * width) + column, mask=inside, other=0.0))
        gate = gpu.widen(tl.load(fc1_output + row64 * (2 * width) + width + column, mask=inside, other=0.0))
        if bias is not None:
            bias_at = bias + expert * (2 * width) + column
            up = gpu.add(up, gpu.widen(tl.load(bias_at, mask=inside, other=0.0)))
            gate = gpu.add(gate, gpu.widen(tl.load(bias_at + width, mask=inside, other=0.0)))
        scaled = gate
        if CLAMPED:
            largest = tl.full([COLUMNS], float("inf"), tl.float32)
            if limit is not None:
                largest = tl.broadcast_to(tl.load(limit + expert), (COLUMNS,))
            up = gpu.maximum(gpu.minimum(up, largest), gpu.negate(largest))
            gate = gpu.minimum(gate, largest)
            scaled = gate
            if alpha is not None:
                scaled = gpu.mul(gate, tl.broadcast_to(tl.load(alpha + expert), (COLUMNS,)))
            shift = tl.full([COLUMNS], 0.0, tl.float32)
            if beta is not None:
                shift = tl.broadcast_to(tl.load(beta + expert), (COLUMNS,))
            up = gpu.add(up, shift)
        log2_e = tl.full([COLUMNS], 0x3FB8AA3B, tl.int32).to(tl.float32, bitcast=True)
        one = tl.full([COLUMNS], 1.0, tl.float32)
        sigmoid = gpu.rcp(gpu.add(one, gpu.ex2(gpu.mul(gpu.negate(scaled), log2_e))))
        result = gpu.mul(gpu.mul(gate, sigmoid), up)
        tl.store(out + row64 * width + column, gpu.bf16_bits(result), mask=inside)


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
