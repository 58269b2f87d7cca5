"""Hypotheses on how a loader prepares weights and scales: order of codes, tiles of scales, shards, blocks of rows.

What a step does that is done once too often is as if its inverse were left out, and the other way round: of each
both are tried, for codes, for scales and for both, of either GEMM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor

from mxfp4ref.conformance.families.hypotheses.tensors import mapped, of_gemms
from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.families.solved.tensor_groups import GEMMS
from mxfp4ref.formats import humming
from mxfp4ref.formats.generations import BYTEWISE, WORDWISE, Generation
from mxfp4ref.formats.layout import (
    deinterleave_weights_sm90,
    fold_scales_sm90,
    interleave_weights_sm90,
    unfold_scales_sm90,
)
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.model.call import MoeCall

__all__ = ["loading_hypotheses", "preparation_hypotheses"]

_BYTES = GROUP_SIZE // 2  # of a K group's codes
_On = Callable[[Tensor], Tensor]
_PARTS = (
    ("scales", ("scales",)),
    ("weights (codes without the scales)", ("weights",)),
    ("weights with their scales", ("weights", "scales")),
)
_SHARDS = (2, 4, 8)
_LATE = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32)  # K groups after which a ring of buffers begins again


def loading_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Steps of a loader that are left out, done twice, or those of another kernel."""
    return chain(_interleaved(), _folded(), _tiled(call), _shards(call))


def preparation_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """These, and blocks of rows and tiles of K that have another one's weights or scales."""
    return chain(loading_hypotheses(call), _rows_of_blocks(call), _stages_of_a_ring(call))


def _of(fcs: tuple[str, ...], words: str, what: str, change: _On, cost: float) -> Hypothesis:
    return of_gemms("rows", fcs, words, what, change, cost + 0.1 * len(fcs))


def _interleaved() -> Iterator[Hypothesis]:
    """The order that a kernel's weights have in memory."""
    old, new = "flashinfer 0.6.10 to 0.6.15", "flashinfer from 0.6.16 on"
    steps: list[tuple[str, _On]] = []
    for release, kernel in ((old, BYTEWISE), (new, WORDWISE)):
        steps += [
            (
                f"interleaved once too often (layout of {release})",
                lambda t, k=kernel: interleave_weights_sm90(t.contiguous(), k),
            ),
            (
                f"not interleaved (raw, where a kernel of {release} reads its layout)",
                lambda t, k=kernel: deinterleave_weights_sm90(t.contiguous(), k),
            ),
        ]
    steps += [
        (f"interleaved for {old} and read by {new}", lambda t: _read(t, BYTEWISE, WORDWISE)),
        (f"interleaved for {new} and read by {old}", lambda t: _read(t, WORDWISE, BYTEWISE)),
        ("interleaved for Humming's FP8 kernel once too often", lambda t: humming.interleave(t.contiguous())),
        ("not interleaved for Humming's FP8 kernel", lambda t: humming.deinterleave(t.contiguous())),
    ]
    for fcs, whose in GEMMS:
        for words, change in steps:
            yield _of(fcs, f"{whose} weights are {words}", "weights", change, 1.0)


def _read(packed: Tensor, stored: Generation, read: Generation) -> Tensor:
    return deinterleave_weights_sm90(interleave_weights_sm90(packed.contiguous(), stored), read)


def _folded() -> Iterator[Hypothesis]:
    """The order that a kernel's scales have in memory."""
    for kernel, release in ((BYTEWISE, "0.6.10 to 0.6.15"), (WORDWISE, "from 0.6.16 on")):

        def raw(t: Tensor, kernel: Generation = kernel) -> Tensor:
            return unfold_scales_sm90(t.reshape(kernel.layout.folded_shape(*t.shape)), kernel).view_as(t)

        def twice(t: Tensor, kernel: Generation = kernel) -> Tensor:
            return fold_scales_sm90(t.contiguous(), kernel).reshape(t.shape)

        for fcs, whose in GEMMS:
            by = f"(layout of flashinfer {release})"
            yield _of(fcs, f"{whose} scales are not folded {by}", "scales", raw, 1.0)
            yield _of(fcs, f"{whose} scales are folded once too often {by}", "scales", twice, 1.1)


def _tiled(call: MoeCall) -> Iterator[Hypothesis]:
    """Scales in tiles, as other kernels want them, that are read row by row, and the other way round."""
    for fcs, whose in GEMMS:
        for reading, order in (
            ("lie in {} and are read row by row", 0),
            ("lie row by row and are read as {}", 1),
        ):
            yield _of(
                fcs,
                f"{whose} scales {reading.format('the blocks of 128x4 that Blackwell wants (swizzled layout)')}",
                "scales",
                lambda t, o=order: _blackwell(t, back=bool(o)),
                1.2,
            )
            for rows in (8, 16, 32, 64, 128):
                for groups in (2, 4, 8):
                    for turned in (False, True):
                        tile = f"tiles of {rows} rows x {groups} K groups" + ", column by column" * turned
                        yield _of(
                            fcs,
                            f"{whose} scales {reading.format(f'{tile} (a layout of tiles)')}",
                            "scales",
                            lambda t, r=rows, g=groups, x=turned, o=order: _in_tiles(t, r, g, x, bool(o)),
                            1.6,
                        )


def _blackwell(scales: Tensor, *, back: bool) -> Tensor:
    """In blocks of 128 rows x 4 K groups, in each the rows 0, 32, 64, 96, 1, 33 and so on; or from there."""
    experts, rows, groups = scales.shape
    if rows % 128 or groups % 4:
        raise ValueError("scales: no whole blocks of 128x4")
    return _laid_out(scales, (experts, rows // 128, 4, 32, groups // 4, 4), (0, 1, 4, 3, 2, 5), back)


def _in_tiles(scales: Tensor, tall: int, wide: int, turned: bool, back: bool) -> Tensor:
    """Tile after tile, each row by row or column by column; or from there."""
    experts, rows, groups = scales.shape
    if rows % tall or groups % wide or (rows == tall and groups == wide and not turned):
        raise ValueError("scales: no whole tiles")
    sizes = (experts, rows // tall, tall, groups // wide, wide)
    return _laid_out(scales, sizes, (0, 1, 3, 4, 2) if turned else (0, 1, 3, 2, 4), back)


def _laid_out(scales: Tensor, sizes: tuple[int, ...], order: tuple[int, ...], back: bool) -> Tensor:
    """With axes of these sizes in this order in memory; or from there."""
    if not back:
        return scales.reshape(sizes).permute(order).reshape(scales.shape)
    stored = scales.reshape([sizes[d] for d in order])
    return stored.permute([order.index(d) for d in range(len(order))]).reshape(scales.shape)


def _shards(call: MoeCall) -> Iterator[Hypothesis]:
    """Rows of up and gate of each tensor-parallel shard, joined as if each were one half, and taken apart so."""
    if not call.experts.gated:
        return
    kinds = (
        *_PARTS,
        ("biases", ("biases",)),
        ("weights, scales and biases", ("weights", "scales", "biases")),
    )
    for kind, names in kinds:
        tensors = tuple(f"fc1_{name}" for name in names)
        for shards in _SHARDS:
            for joined, words in (
                (True, "joined shard by shard [up; gate; up; gate; ...]"),
                (False, "taken apart as if they were joined shard by shard [up; gate; up; gate; ...]"),
            ):
                if shards == 2 and not joined:  # which is the same
                    continue
                yield Hypothesis(
                    "rows",
                    ("fc1", "activation") if names == ("biases",) else ("fc1",),
                    f"GEMM1's {kind} are {words}, of {shards} shards, where [all of up; all of gate] is expected: "
                    "rows of up and gate are exchanged in blocks",
                    mapped(tensors, lambda _, t, n=shards, j=joined: _by_shard(t, n, j)),
                    1.3,
                )


def _by_shard(rows: Tensor, shards: int, joined: bool) -> Tensor:
    experts, count = rows.shape[:2]
    if count % (2 * shards):
        raise ValueError("rows: no whole shards")
    sizes = (2, shards) if joined else (shards, 2)
    parts = rows.reshape(experts, *sizes, count // (2 * shards), -1)
    return parts.transpose(1, 2).reshape(rows.shape)


def _rows_of_blocks(call: MoeCall) -> Iterator[Hypothesis]:
    """Of each two neighbouring blocks of rows, as of two warpgroups, one has the other's."""
    for fc in ("fc1", "fc2"):
        for kind, names in _PARTS:
            tensors = tuple(f"{fc}_{name}" for name in names)
            for size in (2, 4, 8, 16, 32, 64, 128, 256):
                for second in (False, True):
                    one, other = ("first", "last") if second else ("last", "first")
                    yield Hypothesis(
                        "rows",
                        (fc,),
                        f"GEMM{fc[-1]}'s {kind} are in the {one} {size} of each {2 * size} rows those of the {other} "
                        f"{size}",
                        mapped(tensors, lambda _, t, s=size, o=second: _one_of_two(t, s, o)),
                        1.4,
                    )


def _one_of_two(rows: Tensor, size: int, second: bool) -> Tensor:
    count = rows.shape[1]
    if count <= 2 * size:
        raise ValueError("rows: no two pairs of blocks")
    row = torch.arange(count, device=rows.device)
    return rows[:, ((row | size) if second else row & ~size).clamp(max=count - 1)]


def _stages_of_a_ring(call: MoeCall) -> Iterator[Hypothesis]:
    """K tiles of which some are read from a ring of buffers before they arrive: those of some tiles before."""
    for fc, stage in (("fc1", "GEMM1"), ("fc2", "GEMM2")):
        for kind, names in _PARTS:
            tensors = tuple(f"{fc}_{name}" for name in names)
            for late in _LATE:
                start = late * GROUP_SIZE
                for words, change in _rings(late):
                    yield Hypothesis(
                        "K groups",
                        (fc,),
                        f"{stage}'s {kind} are from K = {start} on those of {words}, as where tiles of a ring of "
                        f"{_stages(late)} are read before they are loaded",
                        mapped(tensors, lambda name, t, c=change: _along_k(name, t, c)),
                        1.5 + 0.02 * late,
                    )


def _stages(late: int) -> str:
    """ "3 stages of 64": how many tiles so many K groups may be."""
    sizes = [n for n in (2, 4, 8) if late % n == 0 and 2 <= late // n <= 8]
    counted = [f"{late // n} of {n * GROUP_SIZE}" for n in sizes[:2]]
    return f"stages ({' or '.join(counted)} elements)" if counted else "stages"


def _rings(late: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    start = late * GROUP_SIZE
    yield f"{start} elements before (stale)", lambda g: torch.where(g >= late, g - late, g)
    yield f"the first {start} elements again (stale)", lambda g: g % late
    for tile in (1, 2, 4, 8):
        if tile < late and late % tile == 0:
            yield (
                f"the tile of {tile * GROUP_SIZE} before it, again and again (stale)",
                lambda g, t=tile: torch.where(g >= late, late - t + g % t, g),
            )


def _along_k(name: str, tensor: Tensor, index: Callable[[Tensor], Tensor]) -> Tensor:
    unit = _BYTES if name.endswith("weights") else 1
    parts = tensor.reshape(*tensor.shape[:2], -1, unit)
    group = torch.arange(parts.shape[2], device=tensor.device)
    read = index(group)
    if bool((read == group).all()):
        raise ValueError("K: too short")
    return parts[:, :, read].reshape(tensor.shape)
