"""Which tiles a kernel ran with, from the bits of its output alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from mxfp4ref._validate import check_bool, check_instance, check_tensor
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.formats.generations import Generation
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward, trace
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["Fit", "closest_kernel", "fitting_kernels"]

_PROBED = 2  # tokens, the first ones: rows keep their positions among those of their expert
_Pair = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """A pair of K tiles by which the oracle gives an output, in every bit.

    Attributes:
        kernel: one kernel with these tiles.
        tile_n: the pairs of N tiles that give it; all that go with the K tiles, unless the N tile shows in this call.
        all_tile_n: whether they are all.
    """

    kernel: Sm90Kernel
    tile_n: tuple[_Pair, ...]
    all_tile_n: bool

    def __str__(self) -> str:
        name = "{}x{}".format(*self.kernel.tile_k)
        if self.all_tile_n:
            return name
        return f"{name} with N tiles {' or '.join('{}x{}'.format(*pair) for pair in self.tile_n)}"

    def has(self, kernel: Sm90Kernel) -> bool:
        """Whether a kernel has these tiles."""
        return kernel.tile_k == self.kernel.tile_k and kernel.tile_n in self.tile_n


def fitting_kernels(call: MoeCall, output: Tensor, *, first: bool = False) -> tuple[Fit, ...]:
    """Every pair of K tiles by which the oracle gives exactly this output; none, if the output is wrong.

    Each pair is tried on two tokens first, and those that fit there on all of them. The default comes first.

    Args:
        call: the call, of any tactics.
        output: `[M, H] bf16`, what the kernel gave for it.
        first: stop at the first pair that fits.

    Raises:
        TypeError, ValueError: the output is not the call's in dtype or shape.
    """
    _check(call, output, first)
    found: list[Fit] = []
    for pair in _tile_k_pairs(call):
        if (fit := _fit(call, output, pair)) is not None:
            found.append(fit)
            if first:
                break
    return tuple(found)


def closest_kernel(call: MoeCall, output: Tensor) -> Sm90Kernel:
    """The kernel of those with default N tiles whose output differs from this one in the fewest elements.

    Raises:
        TypeError, ValueError: the output is not the call's in dtype or shape.
    """
    _check(call, output)
    kernels = [_kernel(call, pair) for pair in _tile_k_pairs(call)]
    for tokens in (_PROBED, call.num_tokens):
        counts = [_count(call, kernel, output, tokens) for kernel in kernels]
        kernels = [kernel for kernel, count in zip(kernels, counts, strict=True) if count == min(counts)]
        if len(kernels) == 1:
            break
    return kernels[0]


def _check(call: MoeCall, output: Tensor, first: bool = False) -> None:
    check_instance("call", call, MoeCall)
    check_tensor("output", output, dtype=torch.bfloat16, shape=tuple(call.input.shape))
    check_bool("first", first)


def _count(call: MoeCall, kernel: Sm90Kernel, output: Tensor, tokens: int) -> int:
    """In how many elements of the first tokens the kernel's output differs."""
    some = slice(0, tokens)
    return int(differing(forward(replace(call.select(some), kernel=kernel)), output[some]).sum())


def _equal(call: MoeCall, kernel: Sm90Kernel, output: Tensor) -> bool:
    return not _count(call, kernel, output, _PROBED) and (
        call.num_tokens <= _PROBED or not _count(call, kernel, output, call.num_tokens)
    )


def _fit(call: MoeCall, output: Tensor, tile_k: _Pair) -> Fit | None:
    """How one pair of K tiles fits, by which N tiles."""
    kernels = _by_behaviour(call, tile_k)
    (default, pairs), *others = kernels
    equal = _equal(call, default, output)
    if not others or not _first_groups_may_leave_range(replace(call, kernel=default)):
        return Fit(default, tuple(pair for _, some in kernels for pair in some), True) if equal else None
    fitting = [(default, pairs)] if equal else []
    fitting += [(kernel, some) for kernel, some in others if _equal(call, kernel, output)]
    if not fitting:
        return None
    return Fit(
        fitting[0][0], tuple(pair for _, some in fitting for pair in some), len(fitting) == len(kernels)
    )


def _kernel(call: MoeCall, tile_k: _Pair) -> Sm90Kernel:
    if not call.experts.quantized:
        return call.kernel
    return Sm90Kernel.of_tiles(tile_k, generation=call.kernel.generation)


def _tile_k_pairs(call: MoeCall) -> Iterator[_Pair]:
    """The pairs of K tiles that divide the call's K, smallest first; bf16 weights have one, never looked at."""
    if not call.experts.quantized:
        yield call.kernel.tile_k
        return
    offered = sorted({tile[2] for tile in call.kernel.generation.tiles})
    depths = (call.experts.hidden_size, call.experts.intermediate_size)
    yield from product(*([k for k in offered if depth % k == 0] for depth in depths))


def _by_behaviour(call: MoeCall, tile_k: _Pair) -> list[tuple[Sm90Kernel, list[_Pair]]]:
    """Kernels with these K tiles that may give different bits, the default first, and the N tiles of each."""
    if not call.experts.quantized:
        return [(call.kernel, [call.kernel.tile_n])]
    generation = call.kernel.generation
    positions = torch.arange(max(call.num_tokens, 1))  # no expert has more rows
    of_gemm = [_n_tiles_by_behaviour(generation, k, positions) for k in tile_k]
    return [
        (Sm90Kernel.of_tiles(tile_k, (some[0], other[0]), generation), list(product(some, other)))
        for some, other in product(*of_gemm)
    ]


def _n_tiles_by_behaviour(generation: Generation, tile_k: int, positions: Tensor) -> list[list[int]]:
    """The N tiles that run with a K tile, those together that round the first two groups alike in every row."""
    groups: dict[bytes, list[int]] = {}
    for n in sorted(
        {n for m, n, k in generation.tiles if k == tile_k and (m, n, k) not in generation.refused}
    ):
        swapped = generation.first_pair_swapped(positions, n, tile_k)
        groups.setdefault(swapped.numpy().tobytes(), []).append(n)
    return list(groups.values())


def _first_groups_may_leave_range(call: MoeCall) -> bool:
    """Whether a product of a group and its scale may over- or underflow, without which no N tile shows.

    See `docs/arithmetic.md`, "The first two groups out of range". A group's sum is at most 32 products of at most
    6 |x|. If it is not zero, it is a multiple of the last place of the smallest |x|, halved, or of something larger.
    False is certain, True a guess.
    """
    steps = trace(call)
    experts = call.experts
    for x, scales in ((call.input, experts.fc1_scales), (steps.activation, experts.fc2_scales)):
        assert scales is not None
        values = x.abs().to(torch.float64)
        values = values[values > 0]
        exponents = torch.unique(scales.view(torch.uint8)).to(torch.float64) - 127
        exponents = exponents[exponents > -127]  # byte 0 is the number 0
        if not len(values) or not len(exponents):
            continue
        largest = 32 * 6 * values.max() * 2.0 ** exponents.max()
        smallest = 2.0 ** (values.min().log2().floor() - 8 + exponents.min())
        if not bool(largest < 2.0**128) or bool(smallest < 2.0**-126):
            return True
    return False
