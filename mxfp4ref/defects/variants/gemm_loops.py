"""Sums of products by tensor-core steps of any kind, as a loop for a CPU, by `gemm.tensor_core_sum`.

Products and sums are exact in float64, so that their order does not matter.
"""

from __future__ import annotations

import numpy as np

from mxfp4ref._compiled import compiled

__all__ = ["tensor_core_sum"]

f64, i64 = np.float64, np.int64

SMALLEST, INFINITE = 2.0**-126, 2.0**128  # of float32
EXPONENT = 0x7FF << 52
DROPPED = 29  # bits of a float64 significand that float32 has no room for


@compiled()
def power_of_two(x):
    """As `gemm._power_of_two`; Inf for NaN and Inf."""
    return 0.0 if x == 0 else max(i64(f64(x).view(i64) & EXPONENT).view(f64), SMALLEST)


@compiled(
    "void(float64[:,:,::1], float64[:,:,::1], int64, int64, boolean, float64[:,:,::1])",
    shapes="x[B, M, K] weights[B, N, K] out[B, M, N]",
)
def tensor_core_sum(x, weights, step_size, fraction_bits, toward_zero, out):
    """`x @ weights^T` by steps along K.

    Args:
        x: `[B, M, K]`.
        weights: `[B, N, K]`.
        step_size, fraction_bits, toward_zero: as in `gemm.tensor_core_sum`.
        out: `[B, M, N]`, written.
    """
    depth = x.shape[2]
    x_powers, weight_powers = np.empty((x.shape[1], depth)), np.empty(depth)
    fraction = i64((1023 - fraction_bits) << 52).view(f64)
    for b in range(x.shape[0]):
        for m in range(x.shape[1]):
            for k in range(depth):
                x_powers[m, k] = power_of_two(x[b, m, k])
        for n in range(weights.shape[1]):
            for k in range(depth):
                weight_powers[k] = power_of_two(weights[b, n, k])
            for m in range(x.shape[1]):
                acc = 0.0
                for start in range(0, depth, step_size):
                    stop = min(start + step_size, depth)
                    largest = power_of_two(acc)
                    special = not largest < np.inf
                    for k in range(start, stop):
                        power = x_powers[m, k] * weight_powers[k]
                        special |= not power < np.inf
                        largest = max(largest, power)
                    if special:
                        total = 0.0
                        for k in range(start, stop):
                            total += x[b, m, k] * weights[b, n, k]
                        acc = total + acc
                    elif largest > 0:
                        unit = largest * fraction
                        per_unit = 1 / unit
                        total = np.trunc(acc * per_unit)
                        for k in range(start, stop):
                            total += np.trunc(x[b, m, k] * weights[b, n, k] * per_unit)
                        bits = f64(total * unit).view(i64)
                        if not toward_zero:
                            bits += ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)
                        acc = i64(bits & -(1 << DROPPED)).view(f64)
                        if abs(acc) >= INFINITE:
                            acc *= np.inf
                out[b, m, n] = acc
