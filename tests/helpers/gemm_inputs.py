"""Inputs of a GEMM that show what is wrong with one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxfp4ref.formats.mxfp4 import pack_codes
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm
from mxfp4ref.sm90.gemm.reference import group_scaled_gemm_reference
from tests.helpers import bits

KINDS = (
    "ordinary", "mirrored", "wide", "wider", "raw", "tiny", "subnormal", "huge", "lower", "upper", "sparse", "lonely",
)  # fmt: skip
SCALES = ("ordinary", "spread", "any", "low", "high", "ends", "by column")


def random_x(rng: np.random.Generator, kind: str, batch: int, rows: int, depth: int) -> np.ndarray:
    """bf16 bits [batch, rows, depth]."""
    shape = (batch, rows, depth)
    width = {
        "ordinary": 3,
        "mirrored": 6,
        "wide": 12,
        "wider": 40,
        "tiny": 12,
        "huge": 3,
        "lower": 50,
        "upper": 50,
        "sparse": 20,
        "lonely": 120,
    }
    if kind == "raw":
        return rng.integers(0, 1 << 16, shape)
    if kind == "subnormal":  # in bf16, and mostly in the sum of a group too
        x = rng.integers(0, 2, shape) << 15 | rng.integers(0, 0x0100, shape)
        return np.where(rng.random(shape) < 0.95, x & 0x8000, x)
    centre = {"tiny": 8, "huge": 250, "lower": 62, "upper": 204}.get(kind, 127)
    exponent = np.clip(centre + rng.integers(-width[kind], width[kind] + 1, shape), 0, 254)
    x = rng.integers(0, 2, shape) << 15 | exponent << 7 | rng.integers(0, 128, shape)
    if kind in ("sparse", "lonely"):
        x = np.where(rng.random(x.shape) < {"sparse": 0.8, "lonely": 0.92}[kind], x & 0x8000, x)
    if kind == "mirrored":
        x[..., depth // 2 :] = x[..., : depth // 2] ^ 0x8000
    return x


def random_scales(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    if kind == "ends":
        return rng.choice([0, 1, 2, 120, 127, 134, 253, 254, 255], shape)
    if kind == "by column":  # the lower end in some columns only
        return rng.choice([2, 8, 120], (shape[0], shape[1], 1)) + rng.integers(-2, 3, shape)
    low, high = {
        "ordinary": (118, 124), "spread": (90, 165), "any": (0, 256), "low": (0, 20), "high": (236, 256),
    }[kind]  # fmt: skip
    return rng.integers(low, high, shape)


def problem(
    seed: int,
    x_kind: str,
    scale_kind: str,
    *,
    batch: int = 1,
    rows: int = 5,
    columns: int = 7,
    groups: int = 12,
) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    x = random_x(rng, x_kind, batch, rows, 32 * groups)
    codes = rng.integers(0, 16, (batch, columns, 32 * groups))
    if x_kind == "mirrored":
        codes[..., 16 * groups :] = codes[..., : 16 * groups]
    if x_kind in ("sparse", "lonely"):
        codes = np.where(rng.random(codes.shape) < 0.5, codes & 8, codes)
    scales = random_scales(rng, scale_kind, (batch, columns, groups))
    if rng.random() < 0.3:  # a few of another kind
        other = random_scales(rng, str(rng.choice(SCALES)), scales.shape)
        scales = np.where(rng.random(scales.shape) < 0.02, other, scales)
    if rng.random() < 0.3:
        special = rng.choice([0x7F80, 0xFF80, 0x7FC0, 0xFF81, 0x0000, 0x8000, 0x0001, 0x7F7F], x.shape)
        x = np.where(rng.random(x.shape) < 0.3 / x.shape[2], special, x)
    packed = pack_codes(torch.from_numpy(codes.astype(np.uint8)))
    return bits.bf16(x), packed, torch.from_numpy(scales.astype(np.uint8))


# (tile_n, tile_k) of the tiles that swap the first pair, as `docs/arithmetic.md` lists them.
SWAPPING = [(16, 256), (32, 512), (64, 128), (64, 256), (64, 512), (128, 128), (128, 256)]


def assert_fast_is_slow(x: Tensor, packed: Tensor, scales: Tensor, **options: Any) -> Tensor:
    """The GEMM's result, after it was held against the transcription."""
    got = group_scaled_gemm(x, packed, scales, **options)
    bits.assert_same(got, group_scaled_gemm_reference(x, packed, scales, **options))
    return got
