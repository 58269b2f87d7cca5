"""The specification's arithmetic on bit patterns in exact integers, one element at a time.

Every finite float32 is a whole number of 2^-149, every product of two of 2^-298. Written from sections 3 to 5
without the package: what the tests hold its fast code against. The one thing both share is the recorded results of
EX2 and RCP on [1, 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np

NAN32 = 0x7FFFFFFF
INF32 = 0x7F800000
SIGN32 = 0x80000000
ONE = 0x3F800000
NAN16 = 0x7FFF

E2M1 = tuple(Fraction(halves, 2) for halves in (0, 1, 2, 3, 4, 6, 8, 12))


def two_to(exponent: int) -> Fraction:
    return Fraction(1 << exponent) if exponent >= 0 else Fraction(1, 1 << -exponent)


def floor_log2(value: Fraction) -> int:
    """The exponent of the leading bit of a positive value."""
    above, below = value.numerator, value.denominator
    guess = above.bit_length() - below.bit_length()
    return guess if below << max(guess, 0) <= above << max(-guess, 0) else guess - 1


def is_nan(bits: int) -> bool:
    return bits & 0x7FFFFFFF > INF32


def is_inf(bits: int) -> bool:
    return bits & 0x7FFFFFFF == INF32


def is_negative(bits: int) -> bool:
    return bits >= SIGN32


@cache
def units(bits: int) -> int:
    """The value of finite float32 bits in units of 2^-149, subnormals included."""
    exponent, fraction = bits >> 23 & 0xFF, bits & 0x7FFFFF
    assert exponent < 255
    value = fraction if exponent == 0 else fraction + (1 << 23) << exponent - 1
    return -value if is_negative(bits) else value


@cache
def value_of(bits: int) -> Fraction:
    """The value of finite float32 bits, subnormals included."""
    return Fraction(units(bits), 1 << 149)


def nearest_even(magnitude: int, cut: int) -> int:
    """`magnitude / 2^cut`, rounded to nearest, ties to even."""
    kept, rest = divmod(magnitude, 1 << cut)
    return kept + (2 * rest > 1 << cut or (2 * rest == 1 << cut and kept % 2))


def flushed(bits: int) -> int:
    """FTZ of an operand."""
    return bits & SIGN32 if bits & INF32 == 0 else bits


def rounded(value: Fraction, *, negative_zero: bool = False) -> int:
    """RN to 24 bits with unlimited exponent, then FTZ and overflow, as float32 bits.

    Of a fraction whose denominator is a power of two.
    """
    places = value.denominator.bit_length() - 1
    assert value.denominator == 1 << places
    return _rounded(value.numerator, -places, negative_zero=negative_zero)


def _rounded(number: int, exponent: int, *, negative_zero: bool) -> int:
    """The same for `number * 2^exponent`."""
    if number == 0:
        return SIGN32 if negative_zero else 0
    sign = SIGN32 if number < 0 else 0
    cut = max(abs(number).bit_length() - 24, 0)
    significand = nearest_even(abs(number), cut)
    length = significand.bit_length()
    exponent += cut + length - 1
    if exponent < -126:
        return sign
    if exponent > 127:
        return sign | INF32
    return sign | (exponent + 126 << 23) + (significand << 24 >> length)


def fma(a: int, b: int, c: int) -> int:
    a, b, c = flushed(a), flushed(b), flushed(c)
    if is_nan(a) or is_nan(b) or is_nan(c):
        return NAN32
    sign = (a ^ b) & SIGN32
    if is_inf(a) or is_inf(b):
        zero_times_inf = a & ~SIGN32 == 0 or b & ~SIGN32 == 0
        return NAN32 if zero_times_inf or (is_inf(c) and c & SIGN32 != sign) else sign | INF32
    if is_inf(c):
        return c
    product = units(a) * units(b)
    both_minus_zero = product == 0 and sign != 0 and c == SIGN32
    return _rounded(product + (units(c) << 149), -298, negative_zero=both_minus_zero)


def add(a: int, b: int) -> int:
    return fma(a, ONE, b)


def mul(a: int, b: int) -> int:
    return fma(a, b, (a ^ b) & SIGN32)  # adding a zero of the product's sign changes nothing


def minimum(a: int, b: int) -> int:
    return _first_in_order(a, b, -1)


def maximum(a: int, b: int) -> int:
    return _first_in_order(a, b, 1)


def _first_in_order(a: int, b: int, direction: int) -> int:
    a, b = flushed(a), flushed(b)
    if is_nan(a) or is_nan(b):
        return NAN32 if is_nan(a) and is_nan(b) else b if is_nan(a) else a

    def rank(bits: int) -> tuple[int, int, bool]:
        if is_inf(bits):
            return (-1 if is_negative(bits) else 1), 0, True
        return 0, units(bits), not is_negative(bits)  # -0 < +0

    ordered = sorted((a, b), key=rank)
    return ordered[0] if direction < 0 else ordered[1]


def to_bf16(bits: int) -> int:
    """float32 bits to bf16 bits: RN, subnormals kept."""
    if is_nan(bits):
        return NAN16
    if is_inf(bits):
        return bits >> 16
    sign = bits >> 31 << 15
    magnitude = abs(units(bits))
    cut = max(magnitude.bit_length() - 8, 16)  # 16 where the exponent is the least one
    return sign | (cut - 16 << 7) + nearest_even(magnitude, cut)


def tensor_core_step(a: Sequence[int], b: Sequence[int], c: int) -> int:
    """Section 3, "One tensor-core step"; a and b are bf16 bits, c and the result float32 bits."""
    infinities = set()
    terms: list[tuple[int, int]] = []  # exponent, value in units of 2^-298
    if is_nan(c):
        return NAN32
    if is_inf(c):
        infinities.add(c)
    elif units(c):
        terms.append((_exponent(c), units(c) << 149))
    for x, y in ((i << 16, j << 16) for i, j in zip(a, b, strict=True)):
        if is_nan(x) or is_nan(y):
            return NAN32
        if is_inf(x) or is_inf(y):
            if x & ~SIGN32 == 0 or y & ~SIGN32 == 0:
                return NAN32
            infinities.add((x ^ y) & SIGN32 | INF32)
        elif product := units(x) * units(y):
            terms.append((_exponent(x) + _exponent(y), product))
    if infinities:
        return infinities.pop() if len(infinities) == 1 else NAN32
    if not terms:
        return 0
    cut = 298 + max(exponent for exponent, _ in terms) - 25
    total = sum(value >> cut if value > 0 else -(-value >> cut) for _, value in terms)  # toward zero
    sign, magnitude = (SIGN32 if total < 0 else 0), abs(total) << cut
    exponent = max(magnitude.bit_length() - 299, -126)
    if exponent > 127:
        return sign | INF32
    significand = magnitude >> 298 + exponent - 23
    return sign | (exponent + 126 << 23) + significand if significand else 0


def _exponent(bits: int) -> int:
    """Of a bf16 or float32 number: subnormals have -126."""
    return max(bits >> 23 & 0xFF, 1) - 127


def sm90_scale(byte: int) -> int:
    """A UE8M0 byte is a float32 exponent field."""
    return byte << 23


def group_order(num_groups: int, tile_k: int) -> list[int]:
    """Within the first and the last tile ascending; in every tile between the last two groups are swapped."""
    per_tile = tile_k // 32
    tiles = [list(range(k, k + per_tile)) for k in range(0, num_groups, per_tile)]
    for tile in tiles[1:-1]:
        tile[-2:] = [tile[-1], tile[-2]]
    return [group for tile in tiles for group in tile]


def gemm_element(
    x: Sequence[int], codes: Sequence[int], scales: Sequence[int], order: Sequence[int], *, swapped: bool
) -> int:
    """One accumulator after the epilogue: x bf16 bits [K], codes [K], scale bytes [K/32]."""
    weights = [bf16_of_code(code) for code in codes]
    taken = []
    for group in order:
        t = 0
        for k in (32 * group, 32 * group + 16):
            t = tensor_core_step(x[k : k + 16], weights[k : k + 16], t)
        taken.append((t, sm90_scale(scales[group])))
    if len(taken) > 1 and swapped:
        acc = fma(*taken[0], mul(*taken[1]))
    elif len(taken) > 1:
        acc = fma(*taken[1], mul(*taken[0]))
    else:
        acc = mul(*taken[0])
    for t, scale in taken[2:]:
        acc = fma(t, scale, acc)
    return add(acc, 0)


@cache
def bf16_of_code(code: int) -> int:
    value = E2M1[code & 7]
    sign = code >> 3 << 15
    return sign if value == 0 else sign | rounded(value) >> 16


def activation(gate: int, up: int, alpha: int | None, beta: int | None, limit: int | None) -> int:
    """Section 4 after the bias; all float32 bits."""
    if alpha is None and beta is None and limit is None:
        return mul(mul(gate, sigmoid(gate)), up)
    high = INF32 if limit is None else limit
    up = maximum(minimum(up, high), high ^ SIGN32)
    gate = minimum(gate, high)
    scaled = mul(gate, ONE if alpha is None else alpha)
    return mul(mul(gate, sigmoid(scaled)), add(up, 0 if beta is None else beta))


def swiglu_step(gate: int, up: int, limit: int | None) -> int:
    """The same for SwigluStep."""
    high = 0x40E00000 if limit is None else limit  # 7
    return mul(minimum(mul(gate, sigmoid(gate)), high), maximum(minimum(up, high), high ^ SIGN32))


def geglu(gate: int, up: int) -> int:
    """The same for Geglu."""
    return mul(gelu(gate), up)


def gelu(x: int) -> int:
    """Of the activations without a gate, like those below, whose last step is a product by one."""
    return mul(mul(0x3F000000, x), add(ONE, erf(mul(x, 0x3F3504F3))))


def silu(x: int) -> int:
    return mul(x, sigmoid(x))


def relu(x: int) -> int:
    return mul(x if is_nan(x) else maximum(x, 0), ONE)


def relu2(x: int) -> int:
    return mul(relu(x), relu(x))


def identity(x: int) -> int:
    return mul(x, ONE)


def erf(x: int) -> int:
    """CUDA's erff with FTZ: polynomials in |x| or x^2 by Horner's rule."""
    x = flushed(x)
    magnitude = x & ~SIGN32
    large = not is_nan(x) and magnitude >= 0x3F8060FE
    if large:
        factor, power = magnitude | SIGN32, magnitude
        terms = [0x38EB4C3A, 0xBAAE005B, 0x3C09919F, 0xBD24D99A, 0x3E235519, 0x3F69B4F9, 0x3F210A14]
    else:
        factor, power = x, mul(x, x)
        terms = [0x38B1E96A, 0xBA574D20, 0x3BAAD5EA, 0xBCDC1BE7, 0x3DE718AF, 0xBEC093AC, 0x3E0375D3]
    total = terms[0]
    for term in terms[1:]:
        total = fma(total, power, term)
    total = fma(total, factor, factor)
    return add(ONE, ex2(total) ^ SIGN32) | x & SIGN32 if large else total


def situ(gate: int, up: int, beta: int | None, linear_beta: int | None) -> int:
    """The same for Situ."""
    b = 0x40800000 if beta is None else beta  # 4
    c = 0x41C80000 if linear_beta is None else linear_beta  # 25
    gated = mul(mul(tanh(mul(gate, rcp(b))), sigmoid(gate)), b)
    return mul(gated, mul(tanh(mul(up, rcp(c))), c))


def tanh(z: int) -> int:
    return fma(sigmoid(mul(z, 0x40000000)), 0x40000000, ONE | SIGN32)


def sigmoid(z: int) -> int:
    return rcp(add(ONE, ex2(mul(z ^ SIGN32, 0x3FB8AA3B))))


def ex2(y: int) -> int:
    y = flushed(y)
    if is_nan(y):
        return NAN32
    if is_inf(y):
        return 0 if is_negative(y) else INF32
    n, f = divmod(abs(units(y)) >> 149 - 23, 1 << 23)
    if is_negative(y) and f:
        exponent, fraction = -(n + 1), int(_table("ex2")[(1 << 23) - 1 - f])
    else:
        exponent, fraction = -n if is_negative(y) else n, int(_table("ex2")[f])
    if exponent < -126:
        return 0
    return INF32 if exponent > 127 else (exponent + 127 << 23) + (fraction & 0x7FFFFF)


def rcp(x: int) -> int:
    x = flushed(x)
    sign, magnitude = x & SIGN32, x & ~SIGN32
    if is_nan(x):
        return NAN32
    if magnitude == 0 or is_inf(x):
        return sign | (INF32 if magnitude == 0 else 0)
    exponent, fraction = magnitude >> 23, magnitude & 0x7FFFFF
    result = int(_table("rcp")[fraction]) - (exponent - 127 << 23)
    return sign | (result if result >> 23 > 0 else 0)


@cache
def _table(unit: str) -> np.ndarray:
    """The recorded float32 bits of a unit's results on [1, 2), `[2^23]`."""
    with np.load(Path(__file__).parents[1] / "recordings" / "mufu.npz") as file:
        first, differences = file[f"{unit}_1_2_first"], file[f"{unit}_1_2_diff"]
    return np.cumsum(np.concatenate([first, differences.astype(np.int64)]))


def finalize_element(slots: Iterable[tuple[int, int, int | None]]) -> int:
    """Section 5 for the slots that count: (routing weight, y, bias or None), float32 bits, before bf16."""
    acc = 0
    for weight, y, bias in slots:
        acc = fma(weight, y if bias is None else add(y, bias), acc)
    return acc
