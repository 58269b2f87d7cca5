"""How weights differ from the right ones of the same experts: by the sum they are divided by, or some of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mxfp4ref.conformance.findings.conditions import condition
from mxfp4ref.conformance.number_formats import NUMBER_FORMATS
from mxfp4ref.conformance.routers.routing_hypotheses import View, near
from mxfp4ref.conformance.routers.routing_weighings import Weighing

__all__ = ["some_weights", "weight_words"]

_ENOUGH = 4  # weights or tokens from which something is told
_RATIO = 2.0**-19
_ULPS = 2.0**-20


def weight_words(view: View, ids: Tensor, weights: Tensor) -> str:
    """What accounts for all weights of these ids, `[T, k]`; "" if nothing does."""
    size = view.logits.shape[1]
    if not bool(((ids >= 0) & (ids < size)).all()):
        return ""
    right = Weighing().weights(view, ids) * view.factor
    if not bool(right.isfinite().all()) or bool(near(weights, right).all()):
        return ""
    return _moved(weights, right) or _of_a_sum(view, ids, weights, right) or _as_numbers(weights, right)


def _moved(weights: Tensor, right: Tensor) -> str:
    """Whether the weights are the right ones of other tokens, or of other slots of their token."""
    if len(right) < _ENOUGH:
        return ""
    moved = {f"tokens, {abs(n)} {'before' if n > 0 else 'after'} them": right.roll(n, 0) for n in (1, -1)}
    moved["tokens, in reverse order"] = right.flip(0)
    moved["slots, in reverse order"] = right.flip(1)
    for order, descending in (("the largest", True), ("the smallest", False)):
        moved[f"slots: sorted by size, {order} first, which the ids are not"] = right.sort(
            dim=1, descending=descending
        ).values
    for n in range(1, right.shape[1]):
        moved[f"slots, {n} before them, around the end"] = right.roll(n, 1)
    for words, made in moved.items():
        if bool(near(weights, made).all()):
            return f"weights are those of other {words}"
    return ""


def _of_a_sum(view: View, ids: Tensor, weights: Tensor, right: Tensor) -> str:
    """Each token's weights over another number than the sum of its scores, if that number follows from the sum."""
    scores = view.scores(view.right_score).gather(1, ids)
    what = "the sum of the scores"
    if view.preset.normalize == "softmax":
        scores, what = (scores - view.logits.amax(1, True)).exp(), "the sum of softmax's exponentials"
    usable = (scores > 0) & (right > 0)
    if not bool(usable.any(1).all()) or bool((weights <= 0)[usable].any()):
        return ""
    total = scores.sum(1) + view.preset.epsilon
    best = scores.argmax(1, True)  # the most exact one of each token
    ratio = (weights / right).gather(1, best)
    if not bool(near(weights, right * ratio, _RATIO).all()):
        return ""
    over = total / ratio[:, 0]
    added = over - total
    reach = 4 * _ULPS * over
    middle = float(added[(reach / added.abs()).argmin()])
    for one in (float(f"{middle:.1g}"), float(f"{middle:.2g}"), float(f"{middle:.3g}"), middle):
        if one and bool(((added - one).abs() <= reach).all()) and len(added) >= _ENOUGH:
            return f"a constant is added to {what} before dividing by it: {one:.4g}"
    if view.preset.normalize == "softmax" and len(over) >= _ENOUGH and bool((added > 0).all()):
        further = view.logits.amax(1).double() + added.log()
        unsure = reach / added + 2.0**-23
        middle = float(further[unsure.argmin()])
        for digits in range(4):
            if bool(((further - (one := round(middle, digits))).abs() <= unsure).all()):
                return f"the softmax has one logit more in its sum, {one + 0:g} in every token, as an attention sink"
    for limit, inside, words in (
        (over.min(), total < over.min(), "smaller ones count as"),
        (over.max(), total > over.max(), "larger ones count as"),
    ):
        made = torch.where(inside, limit, total)
        if _ENOUGH <= int(inside.sum()) < len(over) and bool(near(over, made, _RATIO).all()):
            return f"{what} is limited before dividing by it: {words} {float(limit):.5g}"
    for words, made in _other_sums(view, ids, scores):
        if len(over) >= _ENOUGH and bool(near(over, made, _RATIO).all()):
            return f"the scores are divided by {words}, not by the sum of all that were selected"
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if bool(near(over, total.to(dtype).to(torch.float64), _RATIO).all()):
            return f"{what} is rounded to {name} before dividing by it"
    return ""


def _other_sums(view: View, ids: Tensor, scores: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What weights may be divided by, in words and by token, where `scores` are those of the selected experts."""
    if bool(view.bias.any()):
        yield "the sum of the scores with the correction bias", (scores + view.bias[ids]).sum(1)
    for count in range(1, scores.shape[1]):
        yield f"the sum of the first {count}", scores[:, :count].sum(1)
        yield f"the sum without the first {count}", scores[:, count:].sum(1)
    yield "the root of the sum of their squares", scores.square().sum(1).sqrt()


def _as_numbers(weights: Tensor, right: Tensor) -> str:
    """Each the number of some format that is next to the right weight; a few ulp may take it to the other side."""
    for words, rounded in NUMBER_FORMATS.items():
        near_ones = [rounded((right * (1 + off)).float()).double() for off in (-_ULPS, 0.0, _ULPS)]
        fits = torch.stack([(weights - one).abs() <= 2.0**-23 * one.abs() for one in near_ones]).any(0)
        if bool(fits.all()):
            return f"weights are {words}"
    return ""


def some_weights(view: View, ids: Tensor, weights: Tensor) -> str:
    """Right weights of right ids, but some are 0, or one number, or a number of times too large: which ones."""
    right = Weighing().weights(view, ids) * view.factor
    wrong = ~near(weights, right)
    count = int(wrong.sum())
    if count < _ENOUGH or count == wrong.numel():
        return ""
    held = weights[wrong]
    factors = (held / right[wrong])[right[wrong] != 0]
    if bool((held == held[0]).all()):
        how = f"some weights are {float(held[0]):.4g}"
    elif len(factors) and bool(near(factors, factors[0].expand_as(factors), _RATIO).all()):
        how = f"some weights are {float(factors[0]):.4g}x the right ones"
    else:
        return ""
    where = condition(wrong.flatten(), _places(view, ids, right))
    some = f"{count} of {wrong.numel()}"
    return f"ids are right; {how}: {some}, exactly {where}; the others are right" if where else ""


def _places(view: View, ids: Tensor, right: Tensor) -> dict[str, Tensor]:
    """What may tell some weights from others, `[T * k]` each."""
    tokens, slots = torch.meshgrid(torch.arange(len(ids)), torch.arange(ids.shape[1]), indexing="ij")
    flat = ids.flatten()
    earlier = torch.tril(flat[:, None] == flat[None], -1).sum(1)  # rows of the same expert before this one
    return {
        "those whose right weight is": right.float().flatten(),
        "those in slots": slots.flatten(),
        "those of tokens": view.places[tokens.flatten()],
        "those of experts": flat,
        "those whose expert's earlier rows, as under a capacity, number": earlier,
        "those whose logit is": view.logits.gather(1, ids).float().flatten(),
    }
