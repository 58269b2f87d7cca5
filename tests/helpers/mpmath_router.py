"""The routers of docs/arithmetic.md, section 7, written down a second time: one row, mpmath, Python's sort."""

from __future__ import annotations

from functools import lru_cache

import mpmath
import numpy as np

mp = mpmath.mp.clone()
mp.prec = 250
HALF_OF_LEAST = mp.mpf(2) ** -150


def nearest_float32(value: mpmath.mpf) -> np.float32:
    """Nearest even at 24 bits, or at multiples of 2^-149, on integers."""
    if value < HALF_OF_LEAST:
        return np.float32(0)
    _, mantissa, exponent, bits = value._mpf_
    drop = max(bits - 24, -149 - exponent)
    if drop > 0:
        quotient, rest = divmod(int(mantissa), 1 << drop)
        half = 1 << (drop - 1)
        mantissa = quotient + (rest > half or (rest == half and quotient % 2 == 1))
        exponent += drop
    return np.float32(np.ldexp(np.float64(int(mantissa)), exponent))  # exact in float64, so exact here


def sigmoid(x: float) -> mpmath.mpf:
    return 1 / (1 + mp.exp(-mp.mpf(x)))


@lru_cache(maxsize=1 << 17)  # the four tests over all bf16 logits share it
def softplus(x: float) -> mpmath.mpf:
    return mp.mpf(x) if x > 20 else mp.log1p(mp.exp(mp.mpf(x)))


def sqrt_softplus(x: float) -> mpmath.mpf:
    return mp.sqrt(softplus(x))


def sqrt_softplus_each_step(x: float) -> mpmath.mpf:
    return mp.sqrt(mp.mpf(float(nearest_float32(softplus(x)))))


def softmax(row: list[float]) -> list[np.float32]:
    largest = max(row)
    powers = [mp.exp(mp.mpf(x) - mp.mpf(largest)) if x != -np.inf else mp.mpf(0) for x in row]
    total = mp.fsum(powers)
    return [nearest_float32(p / total) for p in powers]


def top_k(scores: list[np.float32], k: int, allowed: set[int] | None = None) -> list[int]:
    ids = [e for e in range(len(scores)) if allowed is None or e in allowed]
    return sorted(ids, key=lambda e: (-float(scores[e]), e))[:k]


def over_their_sum(weights: list[np.float32], epsilon: float = 0.0) -> list[np.float32]:
    total = weights[0]
    for weight in weights[1:]:
        total = np.float32(total + weight)
    total = np.float32(total + np.float32(epsilon))
    return [np.float32(weight / total) for weight in weights]


def scaled(weights: list[np.float32], factor: float) -> list[np.float32]:
    return [np.float32(weight * np.float32(factor)) for weight in weights]


def deepseek_v4(
    row: list[float], bias: list[float], k: int, factor: float
) -> tuple[list[int], list[np.float32]]:
    scores = [nearest_float32(sqrt_softplus_each_step(x)) for x in row]
    ids = top_k([np.float32(s + np.float32(b)) for s, b in zip(scores, bias, strict=True)], k)
    return ids, scaled(over_their_sum([scores[e] for e in ids]), factor)


def deepseek_v4_hash(row: list[float], ids: list[int], factor: float) -> tuple[list[int], list[np.float32]]:
    scores = [nearest_float32(sqrt_softplus_each_step(x)) for x in row]
    return ids, scaled(over_their_sum([scores[e] for e in ids]), factor)


def deepseek_v3(
    row: list[float], bias: list[float], k: int, n_group: int, topk_group: int, factor: float
) -> tuple[list[int], list[np.float32]]:
    scores = [nearest_float32(sigmoid(x)) for x in row]
    biased = [np.float32(s + np.float32(b)) for s, b in zip(scores, bias, strict=True)]
    size = len(row) // n_group
    group_scores = []
    for g in range(n_group):
        best = sorted(biased[g * size : (g + 1) * size], key=float)[-2:]
        group_scores.append(np.float32(best[0] + best[1]))
    allowed = {g * size + i for g in top_k(group_scores, topk_group) for i in range(size)}
    ids = top_k(biased, k, allowed)
    return ids, scaled(over_their_sum([scores[e] for e in ids], 1e-20), factor)


def gpt_oss(row: list[float], k: int) -> tuple[list[int], list[np.float32]]:
    ids = top_k([np.float32(x) for x in row], k)
    return ids, softmax([row[e] for e in ids])


def mixtral(row: list[float], k: int) -> tuple[list[int], list[np.float32]]:
    scores = softmax(row)
    ids = top_k(scores, k)
    return ids, over_their_sum([scores[e] for e in ids])
