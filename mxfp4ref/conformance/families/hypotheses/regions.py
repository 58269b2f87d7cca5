"""Hypotheses on a part of a GEMM's weights: some of K, or some rows, dropped, rescaled, or another place's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.index_maps import shifted
from mxfp4ref.conformance.families.hypotheses.tensors import mapped
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.findings.reach import passes_factors
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.model.call import MoeCall

__all__ = ["half_hypotheses", "k_hypotheses", "k_regions", "or_operand", "row_hypotheses", "rows_at"]

_BYTES = GROUP_SIZE // 2  # of a K group's codes
_On = Callable[[Tensor], Tensor]
_Where = Callable[[int], Tensor]
_Region = tuple[str, _Where, float]  # words, the size to `[n] bool`, cost


def k_regions(groups: int) -> Iterator[_Region]:
    """Places along K, by group of 32."""
    for size in (128, 256, 512, 1024):
        whole = size // GROUP_SIZE
        if groups > whole and groups % whole:
            yield (
                f"the rest of K beyond whole tiles of {size}",
                lambda n, w=whole: torch.arange(n) >= n // w * w,
                1,
            )
    for count in (1, 2, 3, 4, 6, 8, 12, 16):
        if count < groups:
            of_k = f"{f'{count} K groups' if count > 1 else 'K group'} ({GROUP_SIZE * count} of K)"
            yield f"the last {of_k}", lambda n, c=count: torch.arange(n) >= n - c, 1.1 + count / 40
            yield f"the first {of_k}", lambda n, c=count: torch.arange(n) < c, 1.2 + count / 40
    if groups > 2:
        yield "the second half of K", lambda n: torch.arange(n) >= n // 2, 1.05
        yield "the first half of K", lambda n: torch.arange(n) < n // 2, 1.06
    for size in (1, 2, 4):
        unit = "K group" if size == 1 else f"K tile of {size * GROUP_SIZE}"
        for step, word in ((2, "second"), (3, "third"), (4, "fourth"), (8, "eighth")):
            if groups > step * size or (groups == step * size > 2):
                for at in range(step):
                    yield (
                        f"every {word} {unit} from {at} on",
                        lambda n, s=step, a=at, z=size: torch.arange(n) // z % s == a,
                        1.5 + 0.1 * (size > 1) + 0.1 * (step == 3),
                    )
    for tile in (2, 4, 8):
        if groups > tile:
            for at in range(groups // tile):
                words = f"K tile of {tile * GROUP_SIZE} number {at}"
                yield words, lambda n, t=tile, a=at: torch.arange(n) // t == a, 1.6
    for at in range(min(groups, 64)):
        words = f"K group {at} (K {GROUP_SIZE * at} to {GROUP_SIZE * at + GROUP_SIZE - 1})"
        yield words, lambda n, a=at: torch.arange(n) == a, 1.7


def _row_regions(inner: int) -> Iterator[_Region]:
    """Places among the rows of fc1, up first and then gate."""
    for part, halves, extra in (
        (" of the up half", (0,), 0),
        (" of the gate half", (1,), 0),
        (" of each half", (0, 1), 0.2),
    ):

        def rows(inside: Callable[[Tensor, int], Tensor], halves: tuple[int, ...] = halves) -> _Where:
            return _in_halves(inside, halves)

        yield f"the rows{part}", rows(lambda i, n: i >= 0), 1.1 + 2 * extra
        for block in (64, 128, 32, 16, 8):
            if block >= inner:
                continue
            yield f"the last {block} rows{part}", rows(lambda i, n, b=block: i >= n - b), 1.4 + extra
            for at in (1, 0):
                yield (
                    f"every second {block} rows{part}, from {at * block} on",
                    rows(lambda i, n, b=block, a=at: i // b % 2 == a),
                    1.7 + extra,
                )
            for at in range(inner // block) if inner // block <= 32 else ():
                yield (
                    f"rows {at * block} to {at * block + block - 1}{part}",
                    rows(lambda i, n, b=block, a=at: i // b == a),
                    1.9 + extra,
                )
        for step, word in ((2, "second"), (4, "fourth")):
            for at in range(step):
                yield (
                    f"every {word} row{part} from {at} on",
                    rows(lambda i, n, s=step, a=at: i % s == a),
                    1.8 + extra,
                )
        yield f"the last row{part}", rows(lambda i, n: i == n - 1), 1.5 + extra
        yield f"the first row{part}", rows(lambda i, n: i == 0), 1.6 + extra


def _in_halves(inside: Callable[[Tensor, int], Tensor], halves: tuple[int, ...]) -> _Where:
    """The same rows of up (0), of gate (1), or of both; of the rows' numbers in a half and how many it has."""

    def where(n: int) -> Tensor:
        chosen = inside(torch.arange(n // 2), n // 2)
        return torch.cat([chosen if half in halves else torch.zeros_like(chosen) for half in (0, 1)])

    return where


def _roll(dim: int, by: int) -> _On:
    return lambda t: t.roll(by, dim)


def _rolled_but(by: int, kept: int) -> _On:
    """The experts' tensors shifted, but for one that keeps its own."""

    def change(t: Tensor) -> Tensor:
        moved = t.roll(by, 0)
        moved[kept] = t[kept]
        return moved

    return change


def _pairs_swapped(scales: Tensor) -> Tensor:
    groups = torch.arange(scales.shape[2], device=scales.device)
    return scales[:, :, (groups ^ 1).clamp(max=len(groups) - 1)]


def _agreeing(place: str, what: str) -> str:
    """What happens there, of one place or of several."""
    one = place.startswith(("K ", "every ", "the rest ")) or "half of K" in place or " K group (" in place
    return what.replace("are ", "is ", 1).replace("have ", "has ", 1) if one else what


_Base = tuple[str, tuple[str, ...], _On, float]
_OF_THE_OTHER_HALF: _Base = (
    "are those of the other half (up for gate, gate for up)",
    ("weights", "scales"),
    lambda t: t.roll(t.shape[1] // 2, 1),
    0.3,
)


def _bases(kind: str) -> Iterator[_Base]:
    """What may happen there: words, which tensors, the change, its cost."""
    yield "are left out (taken as zero)", ("weights",), torch.zeros_like, 0
    for shift, words in ((1, "2x"), (2, "4x"), (-1, "0.5x"), (-2, "0.25x")):
        yield (
            f"have scales of {words} their value",
            ("scales",),
            lambda s, d=shift: (s.to(torch.int16) + d).clamp(0, 255).to(torch.uint8),
            0.3,
        )
    yield "have their scales taken as 1 (byte 127)", ("scales",), lambda s: torch.full_like(s, 127), 0.3
    yield "have the opposite sign", ("weights",), lambda p: p ^ 0x88, 0.5
    for words, by, extra in (("next", -1, 0.0), ("previous", 1, 0.1)):
        yield f"have the scales of the {words} expert", ("scales",), _roll(0, by), 0.4 + extra
        yield f"are the {words} expert's", ("weights", "scales"), _roll(0, by), 0.4 + extra
        yield (
            f"have the {words} expert's codes (and their own scales)",
            ("weights",),
            _roll(0, by),
            0.5 + extra,
        )
    for words, by, kept, extra in (("previous", 1, 0, 0.1), ("next", -1, -1, 0.1)):
        own = "first" if by > 0 else "last"
        yield (
            f"are the {words} expert's, the {own} one keeping its own",
            ("weights", "scales"),
            _rolled_but(by, kept),
            0.5 + extra,
        )
    if kind == "rows":
        for block in (1, 8, 16, 32, 64):
            yield f"are those {block} before them", ("weights", "scales"), _roll(1, block), 0.6
            yield f"have the scales of those {block} before them", ("scales",), _roll(1, block), 0.6
        yield "have the scales of the row after", ("scales",), _roll(1, -1), 0.6
    else:
        yield "have the two codes of each byte swapped", ("weights",), lambda p: p >> 4 | p << 4, 0.5
        for block, (by, way) in product((1, 2, 4), ((1, "further on"), (-1, "before"))):
            words = f"have the scales {block} K group{'s' * (block > 1)} {way} ({GROUP_SIZE * block} of K)"
            yield (
                words,
                ("scales",),
                lambda s, n=by * block: s[:, :, shifted(s.shape[2], n).to(s.device)],
                0.5,
            )
        yield "have the scales of the other K group of their pair", ("scales",), _pairs_swapped, 0.5
        for row, by in (("after", -1), ("before", 1)):
            yield f"have the codes of the row {row} (and their own scales)", ("weights",), _roll(1, by), 0.6
            yield f"are those of the row {row}", ("weights", "scales"), _roll(1, by), 0.6


def or_operand(call: MoeCall, fc: str, *, zero: bool) -> tuple[tuple[str, ...], str]:
    """The stages of some K of a GEMM that is left out or scaled, and words: so may be what it is multiplied with.

    A factor on GEMM1's output is one on GEMM2's input only where nothing is added or clamped between them.
    """
    if fc == "fc1":
        return ("fc1", "input"), f", or the input is {'zero' if zero else 'scaled so'} there"
    if zero:
        return ("fc2", "fc1"), ", or GEMM1 gives zeros for them"
    return (
        (("fc2", "fc1"), ", or what GEMM1 gives for them is scaled so")
        if passes_factors(call)
        else (("fc2",), "")
    )


def k_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Some of K, of either GEMM."""
    experts = call.experts
    yield from _of(call, "K", "fc2", list(k_regions(experts.intermediate_size // GROUP_SIZE)))
    yield from _of(call, "K", "fc1", list(k_regions(experts.hidden_size // GROUP_SIZE)))


def row_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Some rows of the halves of fc1; of fc2 the wrong columns tell which rows, so that it is tried elsewhere."""
    if not call.experts.gated:
        return
    yield from _of(call, "rows", "fc1", list(_row_regions(call.experts.intermediate_size)))


def half_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Some rows of up that are gate's, or of gate that are up's."""
    if call.experts.gated:
        regions = list(_row_regions(call.experts.intermediate_size))
        yield from _of(call, "rows", "fc1", regions, [_OF_THE_OTHER_HALF])


def rows_at(call: MoeCall, first: int, last: int) -> Iterator[Hypothesis]:
    """Rows `first` to `last` of up, of gate, or of both."""
    regions: list[_Region] = []
    for size in (1, 8, 16, 32, 64):
        low, high = first // size * size, last // size * size + size - 1
        for part, halves in (
            (" of the up half", (0,)),
            (" of the gate half", (1,)),
            (" of each half", (0, 1)),
        ):
            where = _in_halves(lambda i, _, a=low, b=high: (i >= a) & (i <= b), halves)
            regions.append((f"rows {low} to {high}{part}", where, 1.2 + size / 100 + 0.2 * len(halves)))
    yield from _of(call, "rows", "fc1", regions)


def _of(
    call: MoeCall, kind: str, fc: str, regions: list[_Region], bases: Iterable[_Base] | None = None
) -> Iterator[Hypothesis]:
    for base, which, change, extra in bases or _bases(kind):
        for words, where, cost in regions:
            if "tile of 64" in words and "left out" not in base:
                continue
            zero = "left out" in base
            scaled = zero or "x their value" in base or "sign" in base
            stages, also = or_operand(call, fc, zero=zero) if kind == "K" and scaled else ((fc,), "")
            yield Hypothesis(
                "part of K" if kind == "K" else "some rows",
                stages,
                f"GEMM{fc[-1]}: {words} {_agreeing(words, base)}{also}",
                mapped(tuple(f"{fc}_{w}" for w in which), _in_region(kind, where, change)),
                cost + extra + 0.6,
            )


def _in_region(kind: str, where: _Where, change: _On) -> Callable[[str, Tensor], Tensor]:
    def on(name: str, tensor: Tensor) -> Tensor:
        if kind == "rows":
            chosen = where(tensor.shape[1])[None, :, None]
        else:
            unit = _BYTES if name.endswith("weights") else 1
            chosen = where(tensor.shape[2] // unit).repeat_interleave(unit)[None, None]
        return torch.where(chosen.to(tensor.device), change(tensor), tensor)

    return on
