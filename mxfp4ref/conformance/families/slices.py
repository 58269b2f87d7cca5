"""Hypotheses on GEMMs of which slices of K are computed alone and added up, as split-K and stream-K do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from mxfp4ref.conformance.families.hypothesis import Hypothesis
from mxfp4ref.conformance.reduction import is_heavy
from mxfp4ref.defects.variants.rounding import bf16, keep
from mxfp4ref.formats.mxfp4 import GROUP_SIZE
from mxfp4ref.model.call import MoeCall
from mxfp4ref.sm90 import fp32
from mxfp4ref.sm90.gemm.cpu import group_scaled_gemm

__all__ = ["slice_hypotheses"]

_TILE = 128
_SUMS: tuple[tuple[str, Callable[[Tensor], Tensor], float], ...] = (
    ("that are added in float32", keep, 0.0),
    ("each rounded to bf16", bf16, 0.15),
    ("each rounded to float16", lambda x: x.half().float(), 0.2),
)
_Ends = Callable[[int], list[int]]  # of a depth, where slices end


def slice_hypotheses(call: MoeCall) -> Iterator[Hypothesis]:
    """Each slice as the kernel computes one, in its order, and their results added one after the other."""
    if is_heavy(call):
        return
    depth = max(call.experts.hidden_size, call.experts.intermediate_size)
    for words, ends, cost in _slices(depth):
        for how, rounding, more in _SUMS:
            for fcs in (("fc1",), ("fc2",), ("fc1", "fc2")):
                gemm = _gemm(ends, rounding)
                yield Hypothesis(
                    "order of sums",
                    fcs,
                    f"in {f'GEMM{fcs[0][-1]}' if len(fcs) == 1 else 'both GEMMs'} K is split in {words} {how}",
                    lambda p, fcs=fcs, gemm=gemm: p.staging(**{f"{fc}_gemm": gemm for fc in fcs}),
                    cost + more + 0.1 * (len(fcs) - 1),
                    slow=True,
                )


def _slices(depth: int) -> Iterator[tuple[str, _Ends, float]]:
    for count in (2, 3, 4, 8):
        for unit, units, more in ((_TILE, f"tiles of {_TILE}", 0.0), (GROUP_SIZE, "groups", 0.05)):
            for last, longer in enumerate(("first", "last")):

                def ends(k: int, count: int = count, unit: int = unit, last: int = last) -> list[int]:
                    up = 0 if last else count - 1
                    return [(i * (k // unit) + up) // count * unit for i in range(1, count)]

                words = f"{count} slices of whole {units} (the {longer} ones longer where they are not alike)"
                yield words, ends, 1.1 + more + 0.02 * last
    for end in range(_TILE, depth, _TILE):
        yield f"2 slices (K 0 to {end - 1} and the rest)", lambda k, end=end: [end], 1.25


def _gemm(ends: _Ends, rounding: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def gemm(x: Tensor, packed: Tensor, scales: Tensor, **how: object) -> Tensor:
        depth = x.shape[-1]
        inside = sorted({end for end in ends(depth) if 0 < end < depth})
        if not inside:
            return group_scaled_gemm(x, packed, scales, **how)  # type: ignore[arg-type]
        total: Tensor | None = None
        for start, end in zip([0, *inside], [*inside, depth], strict=True):
            parts = (
                x[..., start:end],
                packed[..., start // 2 : end // 2],
                scales[..., start // 32 : end // 32],
            )
            part = rounding(group_scaled_gemm(*(t.contiguous() for t in parts), **how))  # type: ignore[arg-type]
            total = part if total is None else rounding(fp32.add(total, part))
        assert total is not None
        return total

    return gemm
