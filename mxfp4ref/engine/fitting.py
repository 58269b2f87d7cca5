"""Which tiles a kernel ran with, from the bits of its output alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from mxfp4ref._spans import spans
from mxfp4ref._validate import check_bool, check_instance, check_tensor
from mxfp4ref.conformance.comparison import differing
from mxfp4ref.formats.generations import Generation
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward, trace
from mxfp4ref.sm90.tactics import Sm90Kernel

__all__ = ["PROBED", "Fit", "closest_kernel", "fitting_kernels", "tile_k_kernels"]

_TOKENS_AT_ONCE = 512  # bounds the memory of a trace
PROBED = 2  # tokens, the first ones: rows keep their positions among those of their expert
_FIRST_PAIR = 2 * GROUP_SIZE  # columns, in whose two groups alone the N tile may show
_Pair = tuple[int, int]
_Ranges = tuple[_Pair | None, ...]  # of the scales of both GEMMs


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
    scales = tuple(map(_range, (call.experts.fc1_scales, call.experts.fc2_scales)))
    for pair in _tile_k_pairs(call):
        if (fit := _fit(call, output, pair, scales)) is not None:
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
    kernels = tile_k_kernels(call)
    for tokens in (PROBED, call.num_tokens):
        counts = [_count(call, kernel, output, tokens) for kernel in kernels]
        kernels = [kernel for kernel, count in zip(kernels, counts, strict=True) if count == min(counts)]
        if len(kernels) == 1:
            break
    return kernels[0]


def tile_k_kernels(call: MoeCall) -> list[Sm90Kernel]:
    """A kernel for each pair of K tiles that divides the call's K, with default N tiles; the default comes first."""
    if not call.experts.tactics_show:
        return [call.kernel]
    return [Sm90Kernel.of_tiles(pair, generation=call.kernel.generation) for pair in _tile_k_pairs(call)]


def _check(call: MoeCall, output: Tensor, first: bool = False) -> None:
    check_instance("call", call, MoeCall)
    check_tensor("output", output, dtype=call.input.dtype, shape=tuple(call.input.shape))
    check_bool("first", first)


def _count(call: MoeCall, kernel: Sm90Kernel, output: Tensor, tokens: int) -> int:
    """In how many elements of the first tokens the kernel's output differs."""
    some = slice(0, tokens)
    return int(differing(forward(replace(call.select(some), kernel=kernel)), output[some]).sum())


def _fit(call: MoeCall, output: Tensor, tile_k: _Pair, scales: _Ranges) -> Fit | None:
    """How one pair of K tiles fits, by which N tiles."""
    kernels = _by_behaviour(call, tile_k)
    of_default = replace(call, kernel=kernels[0][0])
    for tokens in sorted({min(PROBED, call.num_tokens), call.num_tokens}):
        equal, n_tile_may_show = _looked_at(of_default.select(slice(0, tokens)), output[:tokens], scales)
        if n_tile_may_show:
            kernels = [(kernel, pairs) for kernel, pairs in kernels if _equal(call, kernel, output)]
            break
        if not equal:
            return None
    if not kernels:
        return None
    tile_n = tuple(pair for _, pairs in kernels for pair in pairs)
    return Fit(kernels[0][0], tile_n, len(tile_n) == sum(len(p) for _, p in _by_behaviour(call, tile_k)))


def _looked_at(call: MoeCall, output: Tensor, scales: _Ranges) -> tuple[bool, bool]:
    """Whether the call's kernel gives this output, and whether one with other N tiles might give another.

    A difference ends it, if the N tile does not show up to there: then no other N tile gives this output either.
    """
    if _may_leave_range(call.input, scales[0]):
        return False, True
    # As long as no position shows, some tokens at a time give what all together do.
    for some in spans(call.num_tokens, _TOKENS_AT_ONCE):
        steps = trace(call.select(some))
        if _may_leave_range(steps.activation, scales[1]):
            return False, True
        if bool(differing(steps.output, output[some]).any()):
            return False, False
    return True, False


def _equal(call: MoeCall, kernel: Sm90Kernel, output: Tensor) -> bool:
    return not _count(call, kernel, output, PROBED) and not _count(call, kernel, output, call.num_tokens)


def _tile_k_pairs(call: MoeCall) -> Iterator[_Pair]:
    """The pairs of K tiles that divide the call's K, smallest first; bf16 weights have one, never looked at."""
    if not call.experts.tactics_show:
        yield call.kernel.tile_k
        return
    offered = sorted({tile[2] for tile in call.kernel.generation.tiles})
    depths = (call.experts.hidden_size, call.experts.intermediate_size)
    yield from product(*([k for k in offered if depth % k == 0] for depth in depths))


def _by_behaviour(call: MoeCall, tile_k: _Pair) -> list[tuple[Sm90Kernel, list[_Pair]]]:
    """Kernels with these K tiles that may give different bits, the default first, and the N tiles of each."""
    if not call.experts.tactics_show:
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


def _range(scales: Tensor | None) -> _Pair | None:
    """Smallest and largest exponent of scales; None of bf16 weights, which have none, and if all are 0."""
    if scales is None:
        return None
    scale_bytes = scales.view(torch.uint8)
    smallest = int((scale_bytes - 1).min()) + 1  # byte 0, the number 0, becomes the largest
    return None if smallest == 256 else (smallest - 127, int(scale_bytes.max()) - 127)


def _may_leave_range(x: Tensor, exponents: _Pair | None) -> bool:
    """Whether a product of a group and its scale may over- or underflow in a GEMM, without which no N tile shows.

    See `docs/arithmetic.md`, "The first two groups out of range": others do not matter. A group's sum is at most
    32 products of at most 6 |x|. If it is not zero, it is a multiple of the last place of the smallest |x|, halved,
    or of something larger.
    False is certain, True a guess.
    """
    values = x[:, :_FIRST_PAIR].abs().to(torch.float64)
    values = values[values != 0]
    if exponents is None or not len(values):
        return False
    largest = 32 * 6 * float(values.max()) * 2.0 ** exponents[1]
    smallest = 2.0 ** (float(values.min().log2().floor()) - 8 + exponents[0])
    return not largest < 2.0**128 or smallest < 2.0**-126  # the former of NaN too
