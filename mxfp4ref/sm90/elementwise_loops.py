"""The activation, the weighted sum and the rounding to bf16 as loops for a CPU (docs/arithmetic.md).

Numbers are float32 numbers held as float64, subnormal ones already flushed to zeros of their sign, so that no mode
of the CPU touches them. An operation in float64 that is then `rounded` to 24 bits is as if rounded once: a product of
two is exact, and for a sum 53 >= 2 * 24 + 2 bits are enough.
"""

from __future__ import annotations

import math

import numpy as np

from mxfp4ref._compiled import compiled
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
)
from mxfp4ref.sm90.mufu import TANH_FIRST, TANH_ROWS, TANH_SEGMENTS, TANH_UNIT

__all__ = ["ACTIVATIONS", "activate", "finalize", "sigmoids", "to_bf16"]

GATED = (SWIGLU, GEGLU, SWIGLU_BIAS, SWIGLU_STEP, GEGLU_TANH, SITU)
ACTIVATIONS = (*GATED, GELU, RELU, SILU, RELU2, IDENTITY)  # that `activate` has

INF_BITS, NAN_BITS, SMALLEST_BITS, FRACTION = 0x7F800000, 0x7FFFFFFF, 0x00800000, 0x007FFFFF
SIGN = -(1 << 31)  # of bits as a negative number
SMALLEST = 2.0**-126
ROUNDS_TO_SMALLEST = 2.0**-126 * (1 - 2.0**-25)
LOG2_E = float(np.uint32(0x3FB8AA3B).view(np.float32))
HALF_SQRT2 = float(np.uint32(HALF_ROOT_TWO).view(np.float32))
SPLIT = float(np.uint32(ERF_SPLIT).view(np.float32))
LARGE, SMALL = (np.array(p, np.uint32).view(np.float32).astype(np.float64) for p in (ERF_LARGE, ERF_SMALL))
SQRT_2_PI, CUBIC = (float(np.uint32(bits).view(np.float32)) for bits in GELU_TANH)
TANH_LOG2 = np.array([count.bit_length() - 1 for count in TANH_SEGMENTS])
TANH_STARTS = np.cumsum((0, *TANH_SEGMENTS))
TANH_TABLE = np.array(TANH_ROWS, np.int64)
TAIL, TIE = (1 << 29) - 1, 1 << 28  # the bits that float64 has and float32 lacks

u16, i32, i64, f32, f64 = np.uint16, np.int32, np.int64, np.float32, np.float64


@compiled()
def number_of(bits):
    """The float32 number of these bits, flushed."""
    number = f64(i32(bits).view(f32))
    return number if bits & INF_BITS else math.copysign(0.0, number)


@compiled()
def bits_of(number):
    return i64(f32(number).view(i32)) if number == number else i64(NAN_BITS)


@compiled()
def rounded(number):
    """To nearest even with 24 bits, flushed below 2^-126 after that; Inf beyond the range."""
    magnitude = abs(number)
    kept = SMALLEST if magnitude < SMALLEST else magnitude
    kept = 0.0 if magnitude < ROUNDS_TO_SMALLEST else kept
    return f64(f32(math.copysign(kept, number)))


@compiled()
def fma(a, b, c):
    """The product is exact. What the sum loses decides where it lies between two float32 numbers."""
    product = a * b
    total = product + c
    of_c = total - product
    lost = (product - (total - of_c)) + (c - of_c)
    bits = f64(total).view(i64)
    bits += i64((bits & TAIL == TIE) & (lost != 0)) * (1 - 2 * i64((lost < 0) != (total < 0)))
    return rounded(i64(bits).view(f64))


@compiled()
def minimum(a, b):
    """The other operand where one is NaN; -0 is below +0."""
    return a if (a < b) | (b != b) | ((a == b) & (math.copysign(1.0, a) < 0)) else b


@compiled()
def maximum(a, b):
    return -minimum(-a, -b)


@compiled()
def interpolate(rows, squares, low_bits, fraction):
    row, x = fraction >> low_bits, fraction & ((1 << low_bits) - 1)
    return (rows[row, 0] + rows[row, 1] * x + rows[row, 2] * i64(squares[x])) >> 15


@compiled()
def ex2(bits, rows, squares):
    """As `mufu.ex2`, on bits."""
    magnitude = bits & 0x7FFFFFFF
    shift = min(max((magnitude >> 23) - 103, 0), 32)
    fixed = ((magnitude & FRACTION | SMALLEST_BITS) << shift) >> 24
    if bits < 0:
        fixed = ~fixed + (1 if fixed & FRACTION == 0 else 0)
    result = interpolate(rows, squares, 17, fixed & FRACTION) + (((fixed >> 23) + 127) << 23)
    result = min(result, INF_BITS) if result >= SMALLEST_BITS else 0
    return NAN_BITS if magnitude > INF_BITS else result


@compiled()
def rcp(bits, rows, squares):
    """As `mufu.rcp`, on bits."""
    magnitude = bits & 0x7FFFFFFF
    exponent = magnitude >> 23
    result = interpolate(rows, squares, 16, magnitude & FRACTION) + ((253 - exponent) << 23)
    result = result if result >= SMALLEST_BITS else 0
    result = INF_BITS if exponent == 0 else result
    return NAN_BITS if magnitude > INF_BITS else result | (bits & SIGN)


@compiled()
def sigmoid(z, ex2_rows, ex2_squares, rcp_rows, rcp_squares):
    power = number_of(ex2(bits_of(rounded(-z * LOG2_E)), ex2_rows, ex2_squares))
    return number_of(rcp(bits_of(rounded(1.0 + power)), rcp_rows, rcp_squares))


@compiled("void(int64[:,::1], uint16[::1], int64[:,::1], uint16[::1], int32[::1])", shapes="out[65536]")
def sigmoids(ex2_rows, ex2_squares, rcp_rows, rcp_squares, out):
    """The sigmoid's float32 bits for every bf16 number: `[65536]`, by the number's bits."""
    for bits in range(len(out)):
        z = number_of(i32(bits) << 16)
        out[bits] = bits_of(sigmoid(z, ex2_rows, ex2_squares, rcp_rows, rcp_squares))


@compiled()
def clamp(x, limit):
    return maximum(minimum(x, limit), -limit)


@compiled()
def tanh(z, ex2_rows, ex2_squares, rcp_rows, rcp_squares):
    return rounded(2.0 * sigmoid(rounded(2.0 * z), ex2_rows, ex2_squares, rcp_rows, rcp_squares) - 1.0)


@compiled()
def erf(z, ex2_rows, ex2_squares):
    """As `activation.erf`."""
    large = abs(z) >= SPLIT
    power = abs(z) if large else rounded(z * z)
    factor = -abs(z) if large else z
    total = LARGE[0] if large else SMALL[0]
    for i in range(1, len(LARGE)):
        total = fma(total, power, LARGE[i] if large else SMALL[i])
    total = fma(total, factor, factor)
    if large:
        total = math.copysign(rounded(1.0 - number_of(ex2(bits_of(total), ex2_rows, ex2_squares))), z)
    return total


@compiled()
def tanh_approx(z, squares):
    """As `mufu.tanh`."""
    magnitude = bits_of(z) & 0x7FFFFFFF
    binade = (magnitude >> 23) - TANH_FIRST
    if binade < 0 or z != z:
        return z
    if binade >= len(TANH_LOG2):
        return math.copysign(1.0, z)
    fixed = (magnitude & FRACTION) >> (6 - TANH_LOG2[binade])
    row, x = TANH_STARTS[binade] + (fixed >> 17), fixed & 0x1FFFF
    result = (TANH_TABLE[row, 0] << 17) + TANH_TABLE[row, 1] * x + (TANH_TABLE[row, 2] << 2) * i64(squares[x])
    unit = i64(1023 - 41 + min(binade - (TANH_UNIT - TANH_FIRST), 0) << 52).view(f64)
    kept = f64(f64(result) * unit).view(i64) & ~TAIL
    return math.copysign(i64(kept).view(f64), z)


@compiled()
def reciprocal(x, rcp_rows, rcp_squares):
    return number_of(rcp(bits_of(x), rcp_rows, rcp_squares))


@compiled(
    "void(int64, int16[:,::1], int16[:,::1], int32[:,::1], int32[::1], "
    "int64[:,::1], uint16[::1], int64[:,::1], uint16[::1], int32[:,::1])",
    shapes="fc1_output[R, W] bias[B, W] parameters[P, R] out[R, I]",
)
def activate(
    activation, fc1_output, bias, parameters, of_bf16, ex2_rows, ex2_squares, rcp_rows, rcp_squares, out
):
    """An activation's float32 bits.

    Args:
        activation: its id, one of `ACTIVATIONS`.
        fc1_output: `[R, 2I]`, bf16 bits, up before gate; `[R, I]` where the activation has no gate. The only value
            goes by the name of the gate then, and is multiplied by one.
        bias: the same, or `[0, 2I]` or `[0, I]` for none.
        parameters: `[P, R]`, the float32 bits of those that it reads.
        of_bf16: `sigmoids` where the argument of its sigmoid is the gate in bf16 unless clamped; else `[0]`.
        ex2_rows, ex2_squares, rcp_rows, rcp_squares: the tables of `mufu`.
        out: `[R, I]`, written.
    """
    before = fc1_output.shape[1] - out.shape[1]  # columns before those of the gate
    gate, up, weight = np.empty(out.shape[1], f64), np.ones(out.shape[1], f64), np.empty(out.shape[1], f64)
    first = second = third = of_first = of_second = 1.0
    for row in range(out.shape[0]):
        if parameters.shape[0] > 0:
            first = number_of(parameters[0, row])
        if parameters.shape[0] > 1:
            second = number_of(parameters[1, row])
        if parameters.shape[0] > 2:
            third = number_of(parameters[2, row])
        for i in range(out.shape[1]):
            gate[i] = number_of(i32(fc1_output[row, i + before]) << 16)
            if before:
                up[i] = number_of(i32(fc1_output[row, i]) << 16)
        if len(bias):
            for i in range(out.shape[1]):
                gate[i] = rounded(gate[i] + number_of(i32(bias[row, i + before]) << 16))
                if before:
                    up[i] = rounded(up[i] + number_of(i32(bias[row, i]) << 16))
        if activation == SWIGLU_BIAS:
            for i in range(out.shape[1]):
                gate[i], up[i] = minimum(gate[i], third), rounded(clamp(up[i], third) + second)
        if activation in (GEGLU, GELU):
            for i in range(out.shape[1]):
                weight[i] = rounded(1.0 + erf(rounded(gate[i] * HALF_SQRT2), ex2_rows, ex2_squares))
                gate[i] = rounded(0.5 * gate[i])
        elif activation == GEGLU_TANH:
            for i in range(out.shape[1]):
                inner = fma(rounded(CUBIC * gate[i]), gate[i], SQRT_2_PI)
                gate[i] = fma(gate[i], tanh_approx(rounded(gate[i] * inner), ex2_squares), gate[i])
                weight[i] = 0.5
        elif activation in (RELU, RELU2, IDENTITY):
            for i in range(out.shape[1]):
                if activation != IDENTITY and not gate[i] > 0 and gate[i] == gate[i]:
                    gate[i] = 0.0
                weight[i] = gate[i] if activation == RELU2 else 1.0
        else:
            for i in range(out.shape[1]):
                bits = fc1_output[row, i + before]
                if len(of_bf16) and gate[i] == number_of(i32(bits) << 16):
                    weight[i] = number_of(of_bf16[u16(bits)])
                else:
                    scaled = rounded(gate[i] * first) if activation == SWIGLU_BIAS else gate[i]
                    weight[i] = sigmoid(scaled, ex2_rows, ex2_squares, rcp_rows, rcp_squares)
        if activation == SITU:
            of_first = reciprocal(first, rcp_rows, rcp_squares)
            of_second = reciprocal(second, rcp_rows, rcp_squares)
            for i in range(out.shape[1]):
                gate[i], up[i] = rounded(gate[i] * of_first), rounded(up[i] * of_second)
                for _ in range(2):  # each in turn: two copies of tanh would take long to compile
                    gate[i], up[i] = up[i], tanh(gate[i], ex2_rows, ex2_squares, rcp_rows, rcp_squares)
                weight[i], gate[i], up[i] = rounded(weight[i] * gate[i]), first, rounded(up[i] * second)
        for i in range(out.shape[1]):
            gate[i] = rounded(gate[i] * weight[i])
        if activation == SWIGLU_STEP:
            for i in range(out.shape[1]):
                gate[i], up[i] = minimum(gate[i], first), clamp(up[i], first)
        for i in range(out.shape[1]):
            out[row, i] = bits_of(rounded(gate[i] * up[i]))


@compiled(
    "void(int16[:,:,::1], int64[:,::1], int32[:,::1], int16[:,::1], int32[:,::1])",
    shapes="fc2_output[M, k, H] local[M, k] scales[M, k] bias[E, H] out[M, H]",
)
def finalize(fc2_output, local, scales, bias, out):
    """The weighted sum's float32 bits.

    Args:
        fc2_output: `[M, k, H]`, bf16 bits.
        local: `[M, k]`, the slot's expert, negative to skip it.
        scales: `[M, k]`, float32 bits.
        bias: `[E, H]`, bf16 bits, or `[0, H]` for none.
        out: `[M, H]`, written.
    """
    acc, y = np.empty(out.shape[1], f64), np.empty(out.shape[1], f64)
    for token in range(out.shape[0]):
        acc[:] = 0
        for slot in range(local.shape[1]):
            expert = local[token, slot]
            if expert < 0:
                continue
            scale = number_of(scales[token, slot])
            for h in range(out.shape[1]):
                y[h] = number_of(i32(fc2_output[token, slot, h]) << 16)
            if len(bias):
                for h in range(out.shape[1]):
                    y[h] = rounded(y[h] + number_of(i32(bias[expert, h]) << 16))
            for h in range(out.shape[1]):
                acc[h] = fma(scale, y[h], acc[h])
        for h in range(out.shape[1]):
            out[token, h] = bits_of(acc[h])


@compiled("void(int32[::1], int16[::1])", shapes="bits[N] out[N]")
def to_bf16(bits, out):
    """cvt.rn.bf16.f32: subnormals are kept, NaN becomes 0x7FFF."""
    for i in range(len(out)):
        word = i32(bits[i])
        nearest = i32(i32(word + i32(0x7FFF) + i32(word >> i32(16) & i32(1))) >> i32(16))
        out[i] = nearest if i32(word & i32(NAN_BITS)) <= i32(INF_BITS) else 0x7FFF
