"""What the scale bytes of a wrong quantiser follow from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.findings.conditions import condition
from mxfp4ref.conformance.values.quantizer_groups import (
    ENOUGH,
    MAGNITUDES,
    NAN_BYTE,
    Groups,
    Words,
    nearest_codes,
    other_rule,
)
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, SCALE_BIAS
from mxfp4ref.formats.quantize import SCALE_RULES, quantize

__all__ = ["scale_words"]


def scale_words(of: Groups) -> Words | None:
    """What explains the scale bytes of ordinary groups; no words where they are right."""
    got, right = of.scales[of.ordinary], of.right[of.ordinary]
    if torch.equal(got, right):
        return [], True
    for explained in (_clamped, _of_statistic, _least_error, _cut_exponent, _threshold, _conditional):
        if (found := explained(of)) is not None:
            return found
    return None


def _clamped(of: Groups) -> Words | None:
    """Right but for a least or a greatest byte."""
    one, largest = of.scales[of.ordinary], of.largest[of.ordinary]
    for rule in (of.rule, *(other for other in SCALE_RULES if other != of.rule)):
        made = _bytes(of.largest.nan_to_num(0, 0, 0), rule)[of.ordinary]
        for low, high in ((int(one.min()), 254), (0, int(one.max())), (int(one.min()), int(one.max()))):
            if torch.equal(made.clamp(low, high), one):
                words = [] if rule == of.rule else [other_rule(rule, of.rule)]
                for chosen, limit, how in ((made < low, low, "least"), (made > high, high, "greatest")):
                    if bool(chosen.any()):
                        small = how == "least"
                        side = largest[chosen].max() if small else largest[chosen].min()
                        words.append(
                            f"groups of {'small' if small else 'large'} values get the {how} scale byte, as if their "
                            f"largest magnitude were clamped: byte {limit} (2^{limit - SCALE_BIAS}) in "
                            f"{int(chosen.sum()):,} groups, whose largest magnitude is "
                            f"{'at most' if small else 'at least'} {side:.4g}"
                        )
                return words, True
    return None


def _of_statistic(of: Groups) -> Words | None:
    """Right for something else than the largest magnitude of the group; bytes 0 and beyond are limits."""
    for words, statistic in _statistics(of):
        if torch.equal(statistic, of.largest.nan_to_num(0, 0, 0)):
            continue
        for rule in (of.rule, *(other for other in SCALE_RULES if other != of.rule)):
            if torch.equal(_bytes(statistic, rule)[of.ordinary], of.scales[of.ordinary]):
                more = [] if rule == of.rule else [other_rule(rule, of.rule)]
                return [f"scales are made of {words}", *more], True
    return None


def _least_error(of: Groups) -> Words | None:
    """The scale with the least squared error among some near the right one."""
    groups, bytes_ = of.groups[of.ordinary], of.right[of.ordinary]
    for shifts in ((0, 1), (1, 0), (0, -1), (-1, 0), (-1, 0, 1), (1, 0, -1), (0, 1, 2)):
        near = [(bytes_ + shift).clamp(0, NAN_BYTE - 1) for shift in shifts]
        errors = torch.stack([_error(groups, one) for one in near])
        made = torch.stack(near).gather(0, errors.argmin(0, True))[0]
        if torch.equal(made, of.scales[of.ordinary]):
            tried = ", ".join(f"{shift:+d}" if shift else "the right one" for shift in shifts)
            count = int((made != bytes_).sum())
            return [
                f"a group has the scale byte of the least squared error near the right one: "
                f"among {tried}, and {count:,} of {len(made):,} differ"
            ], True
    return None


def _error(groups: Tensor, bytes_: Tensor) -> Tensor:
    unit = (bytes_ - SCALE_BIAS).to(torch.float64).exp2()[:, None]
    return (MAGNITUDES[nearest_codes(groups / unit)] * unit - groups.abs()).square().sum(1)


def _cut_exponent(of: Groups) -> Words | None:
    """Of exponents that were cut towards zero by a cast to an integer, not rounded down."""
    largest = of.largest[of.ordinary]
    for name, exponents in (("log2 amax", largest.log2()), ("log2(amax / 6)", (largest / 6).log2())):
        for shift in (-2, 0, -1, 1):
            made = (exponents.trunc() + shift + SCALE_BIAS).clamp(0, NAN_BYTE - 1).to(torch.int64)
            if torch.equal(made, of.scales[of.ordinary]):
                more = f" {shift:+d}" if shift else ""
                return [f"scales are 2^({name} cut to an integer towards zero{more})"], True
    return None


def _threshold(of: Groups) -> Words | None:
    """A scale that follows from the exponent of the largest magnitude, and from its significand beyond some point."""
    mantissa, exponent = torch.frexp(of.largest[of.ordinary])
    above = of.scales[of.ordinary] - (exponent.to(torch.int64) - 1 + SCALE_BIAS)
    free = (of.scales[of.ordinary] > 0) & (of.scales[of.ordinary] < NAN_BYTE - 1)
    kinds = sorted(set(above[free].tolist()))
    if len(kinds) != 2 or kinds[1] != kinds[0] + 1:
        return None
    low, high = (2 * mantissa[free & (above == kind)] for kind in kinds)
    if min(len(low), len(high)) < ENOUGH or not low.max() < high.min():
        return None
    point = float(high.min())
    made = exponent.to(torch.int64) - 1 + SCALE_BIAS + kinds[0] + (2 * mantissa >= point)
    if not torch.equal(made.clamp(0, NAN_BYTE - 1), of.scales[of.ordinary]):
        return None
    return [
        f"scales turn over at another point of the largest magnitude's significand: they are 2^(floor(log2 amax) "
        f"{kinds[0]:+d}), and twice that from a point between {float(low.max()):.6g} and {point:.6g} on"
    ], True


def _conditional(of: Groups) -> Words | None:
    """How far off the bytes are, in which groups."""
    shift = of.scales - of.right
    wrong = (shift != 0) & of.ordinary
    where = condition(wrong[of.ordinary], {name: one[of.ordinary] for name, one in of.places().items()})
    if not where or int(wrong.sum()) < ENOUGH:
        return None
    shifts = sorted(set(shift[wrong].tolist()))
    if len(set(of.scales[wrong].tolist())) == 1:
        how = f"scale bytes are {int(of.scales[wrong][0])}"
    elif len(shifts) == 1:
        how = f"scale bytes are {abs(shifts[0])} {'higher' if shifts[0] > 0 else 'lower'}"
    else:
        how = f"scale bytes are off by {shifts[0]:+d} to {shifts[-1]:+d}"
    return [
        f"{how} in some groups: in {int(wrong.sum()):,} of {int(of.ordinary.sum()):,}, exactly those {where}"
    ], len(shifts) == 1


def _statistics(of: Groups) -> Iterator[tuple[str, Tensor]]:
    """What a scale may be made of instead of the largest magnitude of its group, `[G] float64`."""
    size, largest = of.groups.abs().nan_to_num(0, 0, 0), of.largest.nan_to_num(0, 0, 0)
    signed = of.groups.nan_to_num(0, 0, 0)
    yield (
        "the largest value, without taking magnitudes (signed, no absolute value)",
        signed.amax(1).clamp_min(0),
    )
    yield "the magnitude of the smallest value", (-signed.amin(1)).clamp_min(0)
    for part in (2, 4, 8, 16):
        for n, lanes in enumerate(size.view(len(size), part, -1).unbind(1)):
            width = GROUP_SIZE // part
            where = f"elements {n * width} to {(n + 1) * width - 1} of {GROUP_SIZE}"
            yield f"the largest magnitude of {where}", lanes.amax(1)
        for n in range(part):
            where = f"every {part}th element" if part > 2 else "every second element"
            yield f"the largest magnitude of {where}, from {n} on", size[:, n::part].amax(1)
    for n in (1, 2, 31):
        yield f"the largest magnitude of all elements but the last {n}", size[:, :-n].amax(1)
        yield f"the largest magnitude of all elements but the first {n}", size[:, n:].amax(1)
    yield "the second largest magnitude", size.topk(2, 1).values[:, 1]
    rows = largest.view(-1, of.columns)
    count = 2
    while count <= of.columns:
        if of.columns % count == 0:
            together = rows.view(len(rows), -1, count).amax(2, True).expand(-1, -1, count)
            yield (
                f"the largest magnitude of {count} groups together (blocks of {32 * count} values)",
                together.reshape(-1),
            )
        count *= 2
    if of.columns > 1:
        yield "the largest magnitude of the row up to the group's end", rows.cummax(1).values.flatten()
        yield "the largest magnitude of the row", rows.amax(1, True).expand_as(rows).flatten()
        before = torch.cat([rows[:, :1], rows[:, :-1]], 1)
        yield "the largest magnitude of the group before, the first group's of its own", before.flatten()
        after = torch.cat([rows[:, 1:], rows[:, -1:]], 1)
        yield "the largest magnitude of the group after, the last group's of its own", after.flatten()
    for n in (2, 16, 32):
        if len(rows) % n == 0 and len(rows) > 1:
            block = rows.view(-1, n, of.columns).amax(1, True).expand(-1, n, -1)
            yield f"the largest magnitude of {n} rows together", block.reshape(-1)
    yield "the largest magnitude of the tensor", largest.amax().expand_as(largest)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp8 e4m3", torch.float8_e4m3fn)):
        yield (
            f"the largest magnitude rounded to {name}",
            largest.float().to(dtype).double().nan_to_num(0, 0, 0),
        )
    yield "the mean magnitude", size.mean(1)
    yield "twice the mean magnitude", 2 * size.mean(1)
    yield "the root mean square", size.square().mean(1).sqrt()


def _bytes(statistic: Tensor, rule: str) -> Tensor:
    """Scale bytes by a rule of whatever takes the place of the largest magnitude."""
    values = torch.zeros(len(statistic), GROUP_SIZE)
    values[:, 0] = statistic.float()
    return quantize(values, rule=rule)[1].flatten().to(torch.int64)  # type: ignore[arg-type]
