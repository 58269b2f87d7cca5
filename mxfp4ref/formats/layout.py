"""Where the bytes lie: order of gate and up rows, padding, the SM90 weight interleave and scale fold.

See `docs/arithmetic.md`, "Tensors and layouts". Nothing here looks at values, only at positions; every function has
its inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._validate import check_int, check_tensor
from mxfp4ref.formats import compiled
from mxfp4ref.formats.generations import GENERATIONS, NEWEST, Generation, check_generation
from mxfp4ref.formats.mxfp4 import PACKED_DTYPES, SCALE_DTYPES

__all__ = [
    "deinterleave_weights_sm90",
    "fold_scales_sm90",
    "halves_to_interleaved",
    "interleave_weights_sm90",
    "interleaved_to_halves",
    "pad_halves",
    "swap_gate_up",
    "unfold_scales_sm90",
    "unpad_halves",
]


def swap_gate_up(t: Tensor, dim: int = 1) -> Tensor:
    """Exchange the two halves along `dim`: [w1(gate); w3(up)] <-> [w3(up); w1(gate)], its own inverse.

    Weights, scales and biases of fc1 have to be swapped alike.

    Raises:
        TypeError: not a tensor, or `dim` not an int.
        ValueError: `dim` out of range, or an odd size along it.
    """
    first, second = _halves(t, dim)
    return torch.cat((second, first), dim)


def interleaved_to_halves(t: Tensor, dim: int = 1) -> Tensor:
    """Bring gpt-oss rows gate0, up0, gate1, up1, ... along `dim` into the kernel's order [up; gate].

    Raises:
        TypeError: not a tensor, or `dim` not an int.
        ValueError: `dim` out of range, or an odd size along it.
    """
    dim = _check_dim(t, dim, divisor=2)
    by_pair = t.reshape(*t.shape[:dim], t.shape[dim] // 2, 2, *t.shape[dim + 1 :])
    return torch.cat((by_pair.select(dim + 1, 1), by_pair.select(dim + 1, 0)), dim)


def halves_to_interleaved(t: Tensor, dim: int = 1) -> Tensor:
    """Bring the kernel's rows [up; gate] along `dim` into gpt-oss's order gate0, up0, gate1, up1, ...

    Raises:
        TypeError: not a tensor, or `dim` not an int.
        ValueError: `dim` out of range, or an odd size along it.
    """
    up, gate = _halves(t, dim)
    dim %= t.dim()
    return torch.stack((gate, up), dim + 1).flatten(dim, dim + 1)


def pad_halves(t: Tensor, multiple: int = 128, dim: int = 1) -> Tensor:
    """Append zeros to each of the two halves along `dim` until its size is a multiple of `multiple`.

    Padding after the halves have been joined would shift the border between up and gate. Zero bytes are zero
    codes under any scale.

    Raises:
        TypeError: not a tensor, or `dim` or `multiple` not an int.
        ValueError: `dim` out of range, an odd size along it, or `multiple` below 1.
    """
    check_int("multiple", multiple, minimum=1)
    first, second = _halves(t, dim)
    shape = list(first.shape)
    shape[dim] = -shape[dim] % multiple
    zeros = t.new_zeros(shape)
    return torch.cat((first, zeros, second, zeros), dim)


def unpad_halves(t: Tensor, size: int, dim: int = 1) -> Tensor:
    """Keep the first `size` entries of each of the two halves along `dim`, the inverse of `pad_halves`.

    Raises:
        TypeError: not a tensor, or `dim` or `size` not an int.
        ValueError: `dim` out of range, an odd size along it, or `size` larger than a half.
    """
    first, second = _halves(t, dim)
    check_int("size", size, minimum=0, maximum=first.shape[dim])
    return torch.cat((first.narrow(dim, 0, size), second.narrow(dim, 0, size)), dim)


@uncompiled
def interleave_weights_sm90(packed: Tensor, generation: Generation = NEWEST) -> Tensor:
    """Return packed weights in the byte order that the SM90 kernel takes.

    Args:
        packed: `[E, R, K/2]` uint8 (or int8, float4_e2m1fn_x2: the same bytes), R % 16 == 0, K % 64 == 0.
        generation: whose order; see `mxfp4ref.formats.generations`.

    Returns:
        `[E, R, K/2] uint8`.

    Raises:
        TypeError: another dtype, or no `Generation`.
        ValueError: another number of dimensions, or R or K not aligned.
    """
    check_generation(generation)
    return compiled.interleave(_check_weights("packed", packed), generation.layout)


@uncompiled
def deinterleave_weights_sm90(interleaved: Tensor, generation: Generation = NEWEST) -> Tensor:
    """Return packed weights in logical order, the inverse of `interleave_weights_sm90`; arguments as there."""
    check_generation(generation)
    return compiled.deinterleave(_check_weights("interleaved", interleaved), generation.layout)


@uncompiled
def fold_scales_sm90(scales: Tensor, generation: Generation = NEWEST) -> Tensor:
    """Return scales in the order that the SM90 kernel takes; the call passes the result viewed as int32.

    Args:
        scales: `[E, R, G]` uint8 or float8_e8m0fnu, G = K/32.
        generation: whose order; see `mxfp4ref.formats.generations`.

    Returns:
        uint8, `[E, R/64, G/4, 16, 16]` for `WORDWISE`, `[E, G/4, 4R]` for `BYTEWISE`.

    Raises:
        TypeError: another dtype, or no `Generation`.
        ValueError: another number of dimensions, G % 4 != 0 (K % 128 != 0), or, for `WORDWISE`, R % 64 != 0.
    """
    check_generation(generation)
    scales = check_tensor("scales", scales, dtype=SCALE_DTYPES, shape=("E", "R", "K/32")).view(torch.uint8)
    _, rows, groups = scales.shape
    if rows % generation.layout.SCALE_ROWS or groups % 4:
        raise ValueError(
            f"scales: expected [E, R, K/32] with R % {generation.layout.SCALE_ROWS} == 0 and K % 128 == 0, got "
            f"{list(scales.shape)} (R = {rows}, K = {groups * 32})"
        )
    if not scales.numel():  # no bytes make no words
        return scales.new_empty(generation.layout.folded_shape(*scales.shape))
    return generation.layout.fold(_in_words(scales))


@uncompiled
def unfold_scales_sm90(folded: Tensor, generation: Generation | None = None) -> Tensor:
    """Return scales in logical order, the inverse of `fold_scales_sm90`.

    Args:
        folded: what `fold_scales_sm90` returns, or that viewed as int32 (the last dimension a quarter).
        generation: None to go by the number of dimensions, or the generation whose order it is.

    Returns:
        `[E, R, G] uint8`, G = K/32.

    Raises:
        TypeError: another dtype, or no `Generation`.
        ValueError: a shape that no such scales have.
    """
    folded = check_tensor("folded", folded, dtype=(torch.uint8, torch.int32), shape=("...",))
    if generation is not None:
        check_generation(generation)
    possible = GENERATIONS if generation is None else (generation,)
    for candidate in possible:
        logical = candidate.layout.logical_shape(folded_bytes_shape(folded))
        if logical is not None:
            if not folded.numel():
                return folded.new_empty(logical, dtype=torch.uint8)
            return candidate.layout.unfold(_in_words(folded))
    wanted = " or ".join(f"{g.layout.SCALE_AXES} ({g.name})" for g in possible)
    raise ValueError(
        f"folded: expected scales of shape {wanted} in bytes, or viewed as int32, "
        f"got {folded.dtype} {list(folded.shape)}"
    )


def folded_bytes_shape(folded: Tensor) -> tuple[int, ...]:
    """The shape of folded scales, given as uint8 or viewed as int32, in bytes."""
    return (*folded.shape[:-1], folded.shape[-1] * folded.element_size()) if folded.dim() else ()


def _check_dim(t: Tensor, dim: int, divisor: int) -> int:
    """Return `dim` counted from the front; raise unless the size along it is divisible."""
    check_tensor("t", t, dtype=None, shape=("...",))
    check_int("dim", dim, minimum=-t.dim(), maximum=t.dim() - 1)
    if t.shape[dim] % divisor:
        raise ValueError(f"t: expected a size divisible by {divisor} along dim {dim}, got {list(t.shape)}")
    return dim % t.dim()


def _halves(t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    dim = _check_dim(t, dim, divisor=2)
    half = t.shape[dim] // 2
    return t.narrow(dim, 0, half), t.narrow(dim, half, half)


def _check_weights(name: str, weights: Tensor) -> Tensor:
    weights = check_tensor(name, weights, dtype=PACKED_DTYPES, shape=("E", "R", "K/2"))
    rows, columns = weights.shape[1:]
    if rows % 16 or columns % 32:
        raise ValueError(
            f"{name}: expected [E, R, K/2] with R % 16 == 0 and K % 64 == 0, got {list(weights.shape)} "
            f"(R = {rows}, K = {columns * 2})"
        )
    return _in_words(weights)


def _in_words(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, contiguous and where they can be viewed as words of 32 bits."""
    # Flat in between: a dimension of one element may have any stride, of which a view as bytes makes an error.
    tensor = tensor.contiguous().flatten().view(tensor.shape).view(torch.uint8)
    return tensor.clone() if tensor.storage_offset() % 4 else tensor
