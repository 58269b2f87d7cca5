"""What the places have in common at which an output differs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from mxfp4ref.conformance.comparison import FAR, ulp_distance
from mxfp4ref.conformance.families.slot_kinds import attributes
from mxfp4ref.conformance.findings.finding import counted
from mxfp4ref.conformance.findings.reach import is_spread
from mxfp4ref.conformance.findings.reduction import local_experts
from mxfp4ref.model.call import MoeCall

__all__ = ["EVERYWHERE", "Pattern", "patterns"]

_COLUMN_BLOCKS = (
    (128, "128-column block"),
    (64, "64-column block"),
    (32, "scale group"),
    (16, "16-row block of fc2"),
)
_MOST_LISTED = 8
_CHANCE = 0.01  # that as many wrong tokens or columns have a pattern, above which it is none
_OF_THOSE = ", of those that could"  # where some could not have differed
EVERYWHERE = "every token differs somewhere"  # which says the least
_ONE = "a single element differs"


@dataclass(frozen=True)
class Pattern:
    """What holds for a mismatch map.

    Attributes:
        words: the sentence.
        place: of those that say which tokens or columns differ, the same without how many there are in all, which
            other cases may share; else "".
    """

    words: str
    place: str = ""

    @classmethod
    def of(cls, which: str, total: int, count: int) -> Pattern:
        """Of `count` tokens or columns among a total."""
        return cls(f"{which} of {total} differ{'s' * (count == 1)}", f"{which} differ{'s' * (count == 1)}")

    @classmethod
    def placed(cls, words: str) -> Pattern:
        return cls(words, words)


def patterns(
    call: MoeCall, got: Tensor, expected: Tensor, mask: Tensor, could: Tensor | None = None
) -> tuple[Pattern, ...]:
    """What holds for the mismatch map of a call, the most telling first.

    Args:
        call: the call.
        got, expected: `[M, H] bf16`.
        mask: `[M, H] bool`, where they differ; somewhere they have to.
        could: `[M, H] bool`, where they could have: right elements elsewhere are no part of a pattern. Everywhere by
            default.
    """
    could = torch.ones_like(mask) if could is None else could | mask
    if int(mask.sum()) == 1 and mask.numel() > 1:  # of which no expert, row or column says more
        token, column = mask.nonzero()[0].tolist()
        near = int(ulp_distance(got[mask], expected[mask]).max()) <= 1
        how = ": by 1 ulp: a rounding, or damaged" if near else ": damaged, or written by something else"
        alone = near or not call.experts.tactics_show or is_spread(call, got, expected, mask, [token])
        found = [Pattern(f"{_ONE}, [{token}, {column}]{how if alone else ''}")]
    else:
        tokens, columns = could.any(1), could.any(0)
        found = [*_experts(call, mask, tokens), *_ranks(call, mask, tokens)]
        found += [*_tokens(mask, tokens), *_slots(call, mask, tokens), *_columns(mask, columns)]
    return (*found, *map(Pattern, _values(got, expected, mask)))


def _experts(call: MoeCall, mask: Tensor, could: Tensor) -> list[Pattern]:
    """The experts that no right token and several wrong ones use, if every wrong token uses one of them.

    `could [M] bool`: the tokens that could have differed, here and below.
    """
    local = local_experts(call)
    wrong = mask.any(1)
    used = set(local[could][local[could] >= 0].tolist())
    without = ~(local >= 0).any(1)
    found = []
    if bool((wrong & without).any()):
        found.append(Pattern("tokens without an expert on this rank differ, which should be zeros"))
    right = local[~wrong & could]
    in_right = set(right[right >= 0].tolist())
    suspects = [e for e in sorted(used - in_right) if int((local[wrong] == e).any(1).sum()) > 1]
    slots = torch.isin(local, torch.tensor(suspects, device=local.device))
    explained = slots.any(1)
    alone = torch.unique(local[slots & (slots.sum(1, keepdim=True) == 1)])  # the only suspects of some tokens
    if torch.equal(torch.isin(local, alone).any(1), explained):  # the others never occur without one of these
        suspects = alone.tolist()
    some = bool(right.numel()) and len(suspects) < len(used)
    if suspects and some and bool((explained | ~wrong).all()):
        ids = [s + call.ep_rank * call.experts.num_experts for s in suspects]
        found.append(Pattern.placed(f"only tokens of expert{_plural(ids)} {_listed(ids)} differ"))
    return found


def _ranks(call: MoeCall, mask: Tensor, could: Tensor) -> list[Pattern]:
    """Whether only tokens differ that have slots on other ranks, or that have padded slots."""
    if not call.num_tokens:
        return []
    wrong = mask.any(1)
    ids, local = call.token_selected_experts, local_experts(call)
    padded = (ids < 0).any(1)
    elsewhere = ((local < 0) & (ids >= 0)).any(1)
    found = []
    for chosen, words in (
        (padded, "exactly the tokens with a padded slot (-1) differ"),
        (elsewhere, "exactly the tokens with a slot on another rank differ"),
    ):
        if bool((wrong == chosen)[could].all()) and not bool(chosen[could].all()):
            found.append(Pattern.placed(words + ("" if torch.equal(wrong, chosen) else _OF_THOSE)))
    return found


def _slots(call: MoeCall, mask: Tensor, could: Tensor) -> list[Pattern]:
    """The rarest kind of slots that every wrong token has and hardly any right one: by their place among rows."""
    wrong = mask.any(1)
    count, total = int(wrong.sum()), int(could.sum())
    kinds = [k for k in attributes(call, local_experts(call)) if "row" in k.words]
    having = [(k.words, k.mask.any(1) & could) for k in kinds if bool((k.mask.any(1) | ~wrong).all())]
    words, rarest = min(having, key=lambda one: int(one[1].sum()), default=("", could))
    others = int(rarest.sum()) - count
    # That some kind would have all of them by chance.
    if Fraction(len(kinds) * math.comb(count + others, count), math.comb(total, count)) > _CHANCE:
        return []
    place = f"every token that differs has slots {words}"
    rest = f"{others} of the {total - count} others do, too" if others else "none of the others does"
    return [Pattern(f"{place}; {rest}", place)]


def _tokens(mask: Tensor, could: Tensor) -> list[Pattern]:
    wrong = mask.any(1)
    if bool(wrong.all()):
        return [Pattern(EVERYWHERE)] if len(wrong) > 1 else []
    if torch.equal(wrong, could):
        return [Pattern(f"{EVERYWHERE}{_OF_THOSE}")] if int(wrong.sum()) > 1 else []
    rows = wrong.nonzero().flatten().tolist()
    regular = _regular(wrong, could, 1, "token")
    return regular or [Pattern.of(f"only token{_plural(rows)} {_listed(rows)}", len(wrong), len(rows))]


def _columns(mask: Tensor, could: Tensor) -> list[Pattern]:
    wrong = mask.any(0)
    width = len(wrong)
    if torch.equal(wrong, could):
        return []
    columns = wrong.nonzero().flatten()
    first, last = int(columns[0]), int(columns[-1])
    for size, name in _COLUMN_BLOCKS:
        if width % size == 0 and width > size:
            if first == last:
                return [Pattern.of(f"only column {first}", width, 1)]
            block = first // size
            if block == last // size and bool(could.view(-1, size).any(1).sum() > 1):
                words = f"only columns of {name} {block} (columns {first} to {last}) differ"
                return [Pattern.placed(words), *_finer(first, last, size)]
            regular = _regular(wrong, could, size, name)
            if regular:
                return regular
    if regular := _regular(wrong, could, 1, "column"):
        return regular
    if last - first + 1 == len(columns):
        return [Pattern.of(f"exactly the columns {first} to {last}", width, len(columns))]
    if len(columns) <= int(could.sum()) // 4:
        return [Pattern.placed(f"only {len(columns)} of {width} columns differ: {_listed(columns.tolist())}")]
    return []


def _finer(first: int, last: int, outer: int) -> list[Pattern]:
    """The smallest block around all columns, if it is smaller than `outer`."""
    inner = [(s, n) for s, n in _COLUMN_BLOCKS if s < outer and first // s == last // s]
    return [Pattern(f"all of them within {inner[-1][1]} {first // inner[-1][0]}")] if inner else []


def _regular(wrong: Tensor, could: Tensor, size: int, name: str) -> list[Pattern]:
    """ "every second ..." where exactly those of one residue modulo 2, 4, 8 or 16 differ, and not by chance.

    Args:
        wrong, could: `[n] bool`, which tokens or columns differ, and could.
        size: how many of them are one of the name's.
        name: of what is counted.
    """
    single = int(wrong.sum())
    wrong, could = (mask.view(-1, size).any(1) for mask in (wrong, could))
    count, all_of_them = int(wrong.sum()), int(could.sum())
    for step, word in ((2, "second"), (4, "fourth"), (8, "eighth"), (16, "sixteenth")):
        if all_of_them < 2 * step:
            break
        # That as many blocks are just those of one residue, and that as many single ones all lie in such blocks.
        if min(step / math.comb(all_of_them, count), float(step) ** (1 - single)) > _CHANCE:
            continue
        for start in range(step):
            chosen = torch.arange(len(wrong), device=wrong.device) % step == start
            if bool((wrong == chosen)[could].all()) and not bool(chosen[could].all()):
                those = "" if torch.equal(wrong, chosen) else _OF_THOSE
                return [Pattern.placed(f"exactly every {word} {name} differs, from {start} on{those}")]
    return []


def _values(got: Tensor, expected: Tensor, mask: Tensor) -> list[str]:
    one, other = got[mask], expected[mask]
    found = []
    distance = ulp_distance(one, other)
    number = distance < FAR
    if bool((~number).any()):
        fresh = int((torch.isnan(one) & torch.isfinite(other)).sum())
        of_infinite = int((torch.isnan(one) & torch.isinf(other)).sum())
        lost = int((torch.isnan(other) & ~torch.isnan(one)).sum())
        parts = {"NaN where a number is expected": fresh, "NaN where an infinity is expected": of_infinite}
        parts["a number where NaN is expected"] = lost
        parts["NaN of other bits than expected"] = int((torch.isnan(one) & torch.isnan(other)).sum())
        found.append("; ".join(f"{what} in {counted(n, 'element')}" for what, n in parts.items() if n))
    if bool((one == 0).all()):
        found.append("every element that differs came out as zero")
    if bool(number.all()) and int(distance.max()) <= 1:
        found.append("no element is more than 1 ulp off: a rounding, or the sign of a zero")
    x, y = one[number].to(torch.float64), other[number].to(torch.float64)
    usable = (y != 0) & torch.isfinite(x) & torch.isfinite(y)
    if int(usable.sum()) >= 8 and not bool((one == 0).all()):
        ratio = x[usable] / y[usable]
        middle = float(ratio.median())
        if abs(middle - 1) > 2.0**-6 and bool(
            ((ratio - middle).abs() <= 2.0**-6 * abs(middle)).float().mean() > 0.98
        ):
            found.append(f"the output is {middle:.4g} times the expected one, as far as bf16 shows")
        if bool((ratio < 0).all()):
            found.append("every element that differs has the other sign")
    return found


def _plural(items: list[int]) -> str:
    return "" if len(items) == 1 else "s"


def _listed(items: list[int]) -> str:
    shown = ", ".join(str(item) for item in items[:_MOST_LISTED])
    return shown if len(items) <= _MOST_LISTED else f"{shown}, ... ({len(items)} in all)"
