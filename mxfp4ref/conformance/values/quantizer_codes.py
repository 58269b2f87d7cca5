"""What the codes of a wrong quantiser follow from, under the scales that came with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from mxfp4ref.conformance.findings.conditions import condition, indices_words
from mxfp4ref.conformance.number_formats import to_tf32
from mxfp4ref.conformance.values.quantizer_groups import (
    ENOUGH,
    MAGNITUDES,
    MIDPOINTS,
    Groups,
    Words,
    nearest_codes,
)
from mxfp4ref.formats.mxfp4 import GROUP_SIZE

__all__ = ["code_words"]

_OFTEN = 0.25  # of the groups, that an element is wrong in where it is wrong in itself
_CLOSE = 2.0**-6  # of a midpoint: farther off nobody would say that a value was rounded twice


_QUOTIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": lambda x: x.float().bfloat16(),
    "fp16": lambda x: x.float().half(),
    "tf32": lambda x: to_tf32(x.float()),
    "float8 e4m3": lambda x: x.float().clamp(-448, 448).to(torch.float8_e4m3fn),
    "float8 e5m2": lambda x: x.float().clamp(-57344, 57344).to(torch.float8_e5m2),
}


def code_words(of: Groups) -> Words | None:
    """What explains the codes under the scales that came with them; no words where they follow from them."""
    scaled, codes = of.scaled(of.ordinary), of.codes[of.ordinary]
    sign = torch.where(torch.signbit(scaled), 8, 0)
    if torch.equal(nearest_codes(scaled) + sign, codes):
        return [], True
    for name, rounded in _QUOTIENTS.items():
        if torch.equal(nearest_codes(rounded(scaled).double()) + sign, codes):
            count = int((nearest_codes(scaled) + sign != codes).sum())
            return [
                f"values over their scale are rounded to {name} before they become codes: {count:,} differ"
            ], True
    size, magnitude = scaled.abs(), codes & 7
    signs = [] if torch.equal(codes & 8, sign) else ["signs differ, too"]
    found = _boundaries(size, magnitude) or _rounded_twice(size, magnitude) or _random(size, magnitude)
    if found is None:
        return _in_some_groups(of, nearest_codes(scaled) + sign != codes)
    return [*found[0], *signs], found[1] and not signs


def _boundaries(size: Tensor, magnitude: Tensor) -> Words | None:
    """Between which values each code gives way to the next, if a code follows from the value alone."""
    told = []
    ends = [(size[magnitude == code], code) for code in range(8)]
    held = [(float(one.min()), float(one.max()), code) for one, code in ends if len(one)]
    for (_, below, one), (above, _, other) in itertools.pairwise(held):
        if below > above:
            return None
        middles = [float(m) for m in MIDPOINTS[one:other]]
        if below == above or (other - one == 1 and below <= middles[0] <= above):
            continue
        near = f"{above:.4g}" if above - below < 1e-3 else f"{below:.4g} to {above:.4g}"
        instead = f"{middles[0]:g}" if other - one == 1 else "the points halfway between"
        told.append(f"{MAGNITUDES[one]:g} gives way to {MAGNITUDES[other]:g} at {near} instead of {instead}")
    if not told or len(held) < ENOUGH:
        return None
    return ["codes give way to the next at other points: " + ", ".join(told)], False


def _rounded_twice(size: Tensor, magnitude: Tensor) -> Words | None:
    """Codes one off, all close to the middle between two."""
    right = nearest_codes(size)
    wrong = right != magnitude
    if int(wrong.sum()) < ENOUGH or bool(((right - magnitude).abs() > 1).any()):
        return None
    middle = MIDPOINTS[torch.minimum(right, magnitude)[wrong]]
    off = ((size[wrong] - middle) / middle).abs()
    if float(off.max()) > _CLOSE:
        return None
    up = int((magnitude > right).sum())
    tied = not bool(off.any())
    what = "ties are not rounded to even" if tied else "values over their scale are rounded twice"
    near = "in the middle of two codes" if tied else _within(float(off.max()))
    return [f"{what}: codes differ by one in {len(off):,} places, {up:,} upward, all {near}"], False


def _within(off: float) -> str:
    return f"within 2^{max(-52, int(torch.tensor(off).log2().ceil()))} of the middle of two codes"


def _random(size: Tensor, magnitude: Tensor) -> Words | None:
    """Either neighbour, the nearer one more often."""
    below = (size[..., None] >= MAGNITUDES[1:]).sum(-1)
    above = (below + (size != MAGNITUDES[below])).clamp_max(7)
    if not bool(((magnitude == below) | (magnitude == above)).all()):
        return None
    between = above != below
    part = ((size - MAGNITUDES[below]) / (MAGNITUDES[above] - MAGNITUDES[below]).clamp_min(0.5))[between]
    up = (magnitude == above)[between].to(torch.float64)
    wrong = int((nearest_codes(size) != magnitude).sum())
    if len(up) < 16 * ENOUGH or not wrong:
        return None
    words = "each value gets one of the two codes next to it, not always the nearer one"
    details = f"{wrong:,} of {size.numel():,} do not"
    thirds = [up[(part >= low) & (part < low + 1 / 3)] for low in (0.0, 1 / 3, 2 / 3)]
    means = [float(one.mean()) if len(one) else -1.0 for one in thirds]
    if 0 < means[0] < means[1] < means[2] < 1:
        shown = ", ".join(f"{mean:.0%}" for mean in means)
        words += ", as stochastic rounding does"
        details += f", upward in {shown} of the lowest, middle and highest thirds of the way"
    return [f"{words}: {details}"], False


def _in_some_groups(of: Groups, wrong: Tensor) -> Words | None:
    """Where codes do not follow from the scales, if that can be said."""
    groups = wrong.any(1)
    where = condition(groups, {name: one[of.ordinary] for name, one in of.places().items()})
    if where and int(groups.sum()) >= ENOUGH:
        return [
            f"codes do not follow from the scales in some groups: the {int(groups.sum()):,} {where}"
        ], False
    lanes = wrong.any(0)
    often = float(wrong[:, lanes].float().mean()) if bool(lanes.any()) else 0.0  # a few may be so by chance
    if int(wrong.sum()) < 4 * ENOUGH or int(lanes.sum()) > GROUP_SIZE // 2 or often < _OFTEN:
        return None
    zero = ", and are 0" * (not bool(of.codes[of.ordinary][:, lanes].any()))
    return [
        f"codes do not follow from the scales in some elements of a group: {indices_words(lanes, 'element')}{zero}"
    ], False
