"""What is wrong with a router where no hypothesis explains it: solved from its ids and weights.

A sentence is given where what was solved then predicts all ids and weights, or, last of all, all weights for the ids
that came with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.routers.router_scores import changed_logits
from mxfp4ref.conformance.routers.router_weights import weight_words
from mxfp4ref.conformance.routers.routing_hypotheses import Selection, View, near
from mxfp4ref.conformance.routers.routing_weighings import Weighing

__all__ = ["ids_of_a_rank", "right_half", "solved_router"]

_Pair = tuple[Tensor, ...]
_FEWEST = 4  # tokens from which something is told


def solved_router(view: View, got: _Pair, want: _Pair) -> str:
    """What accounts for all ids and weights, or "".

    Args:
        view: the inputs.
        got, want: ids `[T, k] int64` and weights `[T, k] float64`, of the router and the right ones.
    """
    if got[0].shape != want[0].shape or len(got[0]) < _FEWEST:
        return ""
    for solve in (_of_other_slots, _of_some_experts, _of_part_of_the_bias, changed_logits, _of_weights):
        if words := solve(view, got, want):
            return words
    return ""


def right_half(view: View, got: _Pair, want: _Pair) -> str:
    """What is known of a selection that nothing explains, if the weights are right for what it selects."""
    ids, weights = got
    if ids.shape != want[0].shape or not _valid(view, ids) or not _right(view, ids, weights):
        return ""
    wrong = (ids != want[0]).any(1)
    if int(wrong.sum()) < _FEWEST:
        return ""
    missed = [k - len(set(a) & set(b)) for k, a, b in _token_sets(ids, want[0]) if a != b]
    details = f"{int(wrong.sum())} of {len(ids)} tokens have other ids, up to {max(missed)} of {ids.shape[1]}"
    head = "other experts are selected"
    if view.n_group > 1 and _best_of_their_groups(view, ids):
        head = "other groups of experts are selected, and of those groups the right experts"
    else:
        details += _never(view, ids, want[0])
    return f"{head}: {details}; weights are right for these ids"


def _token_sets(ids: Tensor, want: Tensor) -> Iterator[tuple[int, list[int], list[int]]]:
    for a, b in zip(ids.tolist(), want.tolist(), strict=True):
        yield len(a), a, b


def _never(view: View, ids: Tensor, want: Tensor) -> str:
    """Experts that should be selected often, and never are."""
    size = view.logits.shape[1]
    asked, taken = (torch.bincount(one.flatten(), minlength=size) for one in (want, ids))
    never = ((taken == 0) & (asked >= _FEWEST)).nonzero().flatten().tolist()
    return f", and experts {', '.join(map(str, never[:8]))} never, which should be" if never else ""


def _best_of_their_groups(view: View, ids: Tensor) -> bool:
    keys = Selection(groups=(1, 1)).keys(view)
    size = keys.shape[1] // view.n_group
    groups = torch.zeros(len(ids), view.n_group, dtype=torch.bool).scatter_(1, ids // size, True)
    if bool((groups.sum(1) > view.topk_group).any()):
        return False
    inside = keys.masked_fill(~groups.repeat_interleave(size, 1), -torch.inf)
    best = inside.topk(ids.shape[1]).values
    return bool(near(keys.gather(1, ids), best).all())


def _valid(view: View, ids: Tensor) -> bool:
    return bool(((ids >= 0) & (ids < view.logits.shape[1])).all())


def _right(view: View, ids: Tensor, weights: Tensor) -> bool:
    return bool(near(weights, Weighing().weights(view, ids) * view.factor).all())


def ids_of_a_rank(view: View, got: _Pair, want: _Pair) -> str:
    """Ids less the first expert of a rank, and one number for all others."""
    ids, right = got[0], want[0]
    if ids.shape != right.shape or len(ids) < _FEWEST or torch.equal(ids, right):
        return ""
    for own in Counter((right - ids).flatten().tolist()).most_common(3):
        here = right - ids == own[0]
        others = Counter(ids[~here].tolist()).most_common(1)
        here &= ids != (others[0][0] if others else None)
        if not bool(here.any()) or len(set(right[~here].tolist())) < 2 or len(set(ids[~here].tolist())) > 1:
            continue
        low, high = int(right[here].min()), int(right[here].max())
        if low < high and torch.equal((right >= low) & (right <= high), here):
            break
    else:
        return ""
    if not bool((near(got[1], want[1]) | (got[1] == 0)).all()):
        return ""
    shift = own[0]
    less = f"less {shift}" if shift > 0 else "as they are" if shift == 0 else f"plus {-shift}"
    stay = "the weights stay" if bool(near(got[1], want[1]).all()) else "their weights are 0"
    head = "ids are those of one rank's experts, and the others have one id"
    return f"{head}: of experts {low} to {high} {less}, of the others {others[0][0]}, and {stay}"


# Slots that are not chosen by score.


def _of_other_slots(view: View, got: _Pair, want: _Pair) -> str:
    """Slots that hold one expert in all tokens, or another slot's again, beside those of a smaller top-k."""
    ids, weights = got
    top_k = ids.shape[1]
    odd: dict[int, str] = {}
    for slot in range(top_k):
        values = set(ids[:, slot].tolist())
        if len(values) == 1 and len(set(want[0][:, slot].tolist())) > 1:
            odd[slot] = _held(view, values.pop())
        else:
            same = [s for s in range(slot) if s not in odd and torch.equal(ids[:, s], ids[:, slot])]
            if same:
                odd[slot] = f"is the expert of slot {same[0]} again"
    if not odd or len(odd) == top_k:
        return ""
    left = [slot for slot in range(top_k) if slot not in odd]
    if (how := _rest(view, (ids[:, left], weights[:, left]), want, left)) is None:
        return ""
    told = ", ".join(
        f"slot {slot} of {top_k} {words}{_weight(weights[:, slot])}" for slot, words in odd.items()
    )
    which = "the last slot is" if list(odd) == [top_k - 1] else "some slots are"
    return f"{which} not selected by score: {told}; the others are {how}"


def _held(view: View, expert: int) -> str:
    size = view.logits.shape[1]
    no = (
        ""
        if 0 <= expert < size
        else f", which is none of the {size} experts of the router, as of a shared expert,"
    )
    return f"is id {expert}{no} in all tokens"


def _weight(weights: Tensor) -> str:
    held = set(weights.tolist())
    return f" with weight {held.pop():.4g}" if len(held) == 1 else ""


def _rest(view: View, got: _Pair, want: _Pair, left: list[int]) -> str | None:
    ids, weights = got
    same = torch.equal(ids, want[0][:, left])
    if same and bool(near(weights, want[1][:, left]).all()):
        return "as they should be"
    if not _valid(view, ids) or view.table is not None:
        return None
    fewer = View(**{**vars(view), "top_k": len(left)})
    if same or bool(Selection().agrees(fewer, ids).all()):
        for factor, words in ((view.factor, ""), (1.0, ", without the routed scaling factor")):
            if bool(near(weights, Weighing().weights(fewer, ids) * factor).all()):
                return f"those of a router of fewer experts{words}: top-{len(left)}"
        return f"the experts of a router of fewer, with other weights: top-{len(left)}"
    return None


# Experts that take no part.


def _of_some_experts(view: View, got: _Pair, want: _Pair) -> str:
    """Only experts from one number to another are seen."""
    ids, weights = got
    if view.table is not None or torch.equal(ids, want[0]):
        return ""
    if not _valid(view, ids) or not _right(view, ids, weights):
        return ""
    last = view.logits.shape[1] - 1
    low, high = int(ids.min()), int(ids.max())
    ways: list[dict[str, Any]] = [{}, *([{"bias": 0}] if view.biased else [])]
    ways += [{"groups": (1, 1)}] if view.n_group > 1 else []
    for way in ways:
        for among in ((0, high), (low, last), (low, high)):
            one = Selection(among=among, **way)
            if among != (0, last) and bool(one.agrees(view, ids).all()):
                return "; ".join([*one.words(view), "weights are right for these ids"])
    return ""


def _of_part_of_the_bias(view: View, got: _Pair, want: _Pair) -> str:
    """A multiple of the bias that selects these experts: between which numbers it lies follows from comparisons."""
    ids, weights = got
    if view.table is not None or not view.biased or torch.equal(ids, want[0]):
        return ""
    if not _valid(view, ids) or not _right(view, ids, weights):
        return ""
    scores = view.scores(view.right_score)
    selected = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, ids, True)
    low, high = 0.0, 16.0
    for slot in ids[:, :, None].unbind(1):
        part = (view.bias[slot] - view.bias).masked_fill(
            selected, 0.0
        )  # of a selected expert before all others
        least = (scores - scores.gather(1, slot)) / part
        if view.n_group > 1:
            size = scores.shape[1] // view.n_group
            part = part.masked_fill(torch.arange(scores.shape[1]) // size != slot // size, 0.0)
        low = max(low, float(least[part > 0].max())) if bool((part > 0).any()) else low
        high = min(high, float(least[part < 0].min())) if bool((part < 0).any()) else high
    if not low <= high:
        return ""
    for digits in range(1, 5):
        number = float(f"{(low + high) / 2:.{digits}g}")
        if low <= number <= high and bool(Selection(bias=number).agrees(view, ids).all()):
            between = f"{number:g} does, as all from {low:.4g} to {high:.4g} may"
            head = "the correction bias is multiplied by a number in the selection"
            return f"{head}: {between}; weights are right for these ids"
    return ""


def _of_weights(view: View, got: _Pair, want: _Pair) -> str:
    """Of right ids, or of ids that differ where scores tie."""
    same = torch.equal(got[0], want[0])
    if not same and (view.table is not None or not bool(view.selectable(got[0]).all())):
        return ""
    words = weight_words(view, *got)
    return f"ids are right; {words}" if words and same else words
