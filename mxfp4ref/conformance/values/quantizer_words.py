"""What a wrong quantiser does, solved from its scales and codes where no known rule gives both.

First, whether the quantiser is right for other values. Then each on its own: what the scale bytes follow from, and
where the codes part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mxfp4ref.conformance.number_formats import cut, to_tf32
from mxfp4ref.conformance.values.layout_words import permutation_words
from mxfp4ref.conformance.values.quantizer_codes import code_words
from mxfp4ref.conformance.values.quantizer_groups import Groups, Words, other_rule
from mxfp4ref.conformance.values.quantizer_scales import scale_words
from mxfp4ref.formats.mxfp4 import GROUP_SIZE, unpack_codes
from mxfp4ref.formats.quantize import SCALE_RULES, quantize

__all__ = ["solved_quantizer"]


def solved_quantizer(
    values: Tensor, rule: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor]
) -> tuple[str, bool]:
    """What a quantiser did instead, and whether that accounts for every byte; no words where nothing was found.

    In each part the numbers of this case are after a colon.

    Args:
        values: `[..., K]`, what was quantised.
        rule: by which it should have been.
        got, want: `packed` and `scales`, of a quantiser of its own and of the right one.
    """
    groups = Groups.of(values, rule, got, want)
    if not bool(groups.ordinary.any()):
        return "", False
    words, exact = _of_other_values(groups) or _by_part(groups) or _in_another_order(groups) or ([], False)
    odd = _odd_words(groups) if words else []
    return "; ".join([*words, *odd]), bool(words) and exact and not odd


_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "values are rounded to bf16 before they are quantised, so that some are rounded twice": lambda x: (
        x.bfloat16()
    ),
    "values are rounded to fp16 before they are quantised": lambda x: x.half(),
    "values are rounded to tf32 before they are quantised, so that some are rounded twice": to_tf32,
    "values are cut to bf16 before they are quantised": cut(16),
    "values are cut to tf32 before they are quantised": cut(13),
    "values are rounded to float8 e4m3 before they are quantised": lambda x: x.float().to(
        torch.float8_e4m3fn
    ),
    "values are rounded to float8 e5m2 before they are quantised": lambda x: x.float().to(torch.float8_e5m2),
    "subnormal values are flushed to zero before they are quantised": lambda x: x.float().masked_fill(
        x.abs() < 2.0**-126, 0.0
    ),
    "the magnitudes are quantised, without signs": lambda x: x.abs(),
    "neighbouring values are exchanged before they are quantised": lambda x: (
        x.reshape(*x.shape[:-1], -1, 2).flip(-1).reshape(x.shape)
    ),
}


def _of_other_values(of: Groups) -> Words | None:
    """Whether scales and codes are right for other values, by this rule or another."""
    for words, changed in _VALUES.items():
        made_of = changed(of.values).float()
        if torch.equal(made_of.nan_to_num(), of.values.float().nan_to_num()):
            continue
        for rule in (of.rule, *(other for other in SCALE_RULES if other != of.rule)):
            packed, scales = quantize(made_of, rule=rule)  # type: ignore[arg-type]
            codes = unpack_codes(packed).reshape(-1, GROUP_SIZE).to(torch.int64)
            same = (scales.flatten() == of.scales) & (codes == of.codes).all(1)
            if bool(same[of.ordinary].all()):
                count = int((of.codes != of.right_codes)[of.ordinary].sum())
                more = [] if rule == of.rule else [other_rule(rule, of.rule)]
                return [f"{words}: {count:,} codes differ", *more], True
    return None


def _in_another_order(of: Groups) -> Words | None:
    """Whether scales are right, and codes the right ones at other places of their group."""
    if not torch.equal(of.scales[of.ordinary], of.right[of.ordinary]):
        return None
    one, other = (t[of.ordinary].to(torch.uint8) for t in (of.codes, of.right_codes))
    words = permutation_words(one, other)
    return (["scales are right", words.replace("byte", "code")], True) if words else None


def _by_part(of: Groups) -> Words | None:
    scales = scale_words(of)
    codes = code_words(of)
    if scales is None and codes is None:
        return None
    if scales is None:
        count = int((of.scales != of.right)[of.ordinary].sum())
        scales = [f"{count:,} of {int(of.ordinary.sum()):,} scale bytes are others"], False
        if codes is not None and codes[0] == []:
            return None  # only that codes are right for scales which nothing explains
    if codes is None:
        if not scales[0]:
            return None  # scales are right, and nothing explains the codes
        count = int((of.codes != of.right_codes)[of.ordinary].sum())
        codes = [f"{count:,} codes differ, and are not those that follow from the scales"], False
    elif not codes[0] and scales[0]:
        codes = ["codes follow from the scales"], codes[1]
    elif codes[0] and not scales[0]:
        scales = ["scales are right"], True
    words = [*scales[0], *codes[0]]
    return (words, scales[1] and codes[1]) if scales[0] or codes[0] else None


def _odd_words(of: Groups) -> list[str]:
    """Groups that are not ordinary, where they differ."""
    words = []
    zeros, finite = ~of.groups.any(1), of.groups.isfinite().all(1)
    for name, chosen in (("groups of zeros", zeros), ("groups with NaN or Inf", ~finite)):
        scales = of.scales[chosen] != of.right[chosen]
        codes = (of.codes[chosen] != of.right_codes[chosen]).any(1)
        if bool(scales.any()):
            held = sorted(set(of.scales[chosen].tolist()))
            shown = f"{held[0]}" if len(held) == 1 else f"{held[0]} to {held[-1]}"
            words.append(f"{name} get another scale byte, too: {shown} instead of {int(of.right[chosen][0])}")
        elif bool(codes.any()):
            words.append(f"{name} have other codes")
    return words
