"""Single operations of a Hopper GPU, for use inside Triton kernels.

On a GPU they are the instructions themselves, as inline PTX: a compiler may not fuse, reassociate or replace them.
Triton's interpreter, by which the kernels are tested on a CPU, knows no PTX: there `HARDWARE` is False and ordinary
operations stand in. Their results are the same only for easy numbers (no subnormals, sums that are exact).
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

HARDWARE = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1")


@triton.jit
def step(weights, x, carried):
    """One tensor-core step: `[N, 16] bf16` times `[16, M] bf16` plus `[N, M] float32` (`docs/arithmetic.md`)."""
    if HARDWARE:
        return tl.dot(weights, x, carried)
    return tl.dot(widen(weights), widen(x), carried, input_precision="ieee")


@triton.jit
def fma(a, b, c):
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "fma.rn.ftz.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], dtype=tl.float32, is_pure=True, pack=1
        )
    # Rounded once more than it should be, which changes nothing since 53 bits >= 2 * 24 + 2.
    return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)


@triton.jit
def mul(a, b):
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return a * b


@triton.jit
def add(a, b):
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "add.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return a + b


@triton.jit
def minimum(a, b):
    """The smaller; the other operand where one is NaN."""
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "min.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.where(a != a, b, tl.where((b != b) | (a < b), a, b))


@triton.jit
def maximum(a, b):
    """The larger; the other operand where one is NaN."""
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "max.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.where(a != a, b, tl.where((b != b) | (a > b), a, b))


@triton.jit
def ex2(x):
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def rcp(x):
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def tanh(x):
    if HARDWARE:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def negate(x):
    """By the sign bit, of zeros and NaNs too."""
    return (x.to(tl.int32, bitcast=True) ^ -0x80000000).to(tl.float32, bitcast=True)


@triton.jit
def widen(x):
    """bf16 as float32, by its bits: exact, subnormals included."""
    return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def bf16_bits(x):
    """float32 rounded to the nearest bf16, ties to even, as int16 bits; every NaN is 0x7FFF."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFF, rounded).to(tl.int16)
