"""The counter-based generator of golden tensors: any byte of any tensor, in any order, in any language.

All arithmetic is on unsigned 64-bit integers modulo 2^64; `>>` and `^` are shift and exclusive or.

    mix(z):           z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
                      z = (z ^ (z >> 27)) * 0x94D049BB133111EB
                      return z ^ (z >> 31)
    hash(name):       h = 0xCBF29CE484222325; for each ASCII byte b: h = (h ^ b) * 0x100000001B3; return h
    key(seed, name):  mix(hash(name) ^ mix(seed + 0x9E3779B97F4A7C15))
    word(i):          mix(key + (i + 1) * 0x9E3779B97F4A7C15)
    byte(j):          (word(j / 8) >> (8 * (j mod 8))) & 255

(SplitMix64 started at a key of its own for every tensor, FNV-1a for its name.) Element j of a tensor, counted
in C order, is made of byte(j) alone by one of the rules of `element_rule`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mxfp4ref._validate import check_choice, check_instance, check_int

__all__ = ["RULES", "element_rule", "generate", "key", "random_bytes"]

RULES = ("bytes", "range", "bf16")

_MASK = (1 << 64) - 1
_MOST_BYTES = 1 << 62  # beyond any memory, and far from where 64-bit indices end
_GAMMA = 0x9E3779B97F4A7C15
_WORDS_AT_ONCE = 1 << 17  # keeps the intermediate words in the cache


def key(seed: int, name: str) -> int:
    """The generator's key for the tensor `name` of a case with this seed, an unsigned 64-bit integer."""
    check_int("seed", seed, minimum=0, maximum=_MASK)
    check_instance("name", name, str)
    if not name.isascii():
        raise ValueError(f"name: expected ASCII characters, got {name!r}")
    digest = 0xCBF29CE484222325
    for byte in name.encode("ascii"):
        digest = (digest ^ byte) * 0x100000001B3 & _MASK
    return _mix(digest ^ _mix((seed + _GAMMA) & _MASK))


def random_bytes(seed: int, name: str, start: int, count: int) -> NDArray[np.uint8]:
    """Bytes `start` to `start + count` of the stream of a tensor, `[count] uint8`."""
    check_int("start", start, minimum=0, maximum=_MOST_BYTES)
    check_int("count", count, minimum=0, maximum=_MOST_BYTES)
    first, last = start // 8, -(-(start + count) // 8)
    stream_key = np.uint64(key(seed, name))
    out = np.empty(last - first, dtype="<u8")
    for offset in range(first, last, _WORDS_AT_ONCE):
        stop = min(offset + _WORDS_AT_ONCE, last)
        z = np.arange(offset + 1, stop + 1, dtype=np.uint64)  # unsigned arrays wrap modulo 2^64
        z *= np.uint64(_GAMMA)
        z += stream_key
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        out[offset - first : stop - first] = z
    return out.view(np.uint8)[start - 8 * first :][:count]


def element_rule(data: NDArray[np.uint8], rule: str, *, low: int = 0, high: int = 0) -> Tensor:
    """Turn bytes b into elements, one each, shape kept.

    - "bytes": uint8 b.
    - "range": uint8 low + ((b * (high - low + 1)) >> 8), from `low` to `high`.
    - "bf16": bf16 (b if b < 128 else b - 256) * 2^low, exact.
    """
    check_choice("rule", rule, RULES)
    if rule == "bytes":
        return torch.from_numpy(data)
    if rule == "range":
        check_int("high", high, minimum=check_int("low", low, minimum=0), maximum=255)
        scaled = data.astype(np.uint16) * np.uint16(high - low + 1) >> 8
        return torch.from_numpy((scaled + low).astype(np.uint8))
    check_int("low", low, minimum=-126, maximum=120)
    return torch.from_numpy(np.ldexp(data.view(np.int8).astype(np.float32), low)).to(torch.bfloat16)


def generate(
    seed: int, name: str, shape: tuple[int, ...], rule: str, *, start: int = 0, **limits: int
) -> Tensor:
    """The tensor `name`, or as much of it as `shape` holds from element `start` on, by `element_rule`."""
    count = int(np.prod(shape, dtype=np.int64))
    data: NDArray[Any] = random_bytes(seed, name, start, count).reshape(shape)
    return element_rule(data, rule, **limits)


def _mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)
