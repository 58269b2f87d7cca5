"""What is wrong with a router, from its ids and weights: solved for where it can be, searched where not.

A sentence is only given where it accounts for every id and weight: ids exactly, but for scores a few ulp apart, and
weights to within a few float32 ulp.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.conformance.bounds.router_bounds import routing_outside
from mxfp4ref.conformance.comparison import differing, ulp_distance
from mxfp4ref.conformance.findings.finding import Finding
from mxfp4ref.conformance.findings.index_words import map_words
from mxfp4ref.conformance.routers.router_solving import ids_of_a_rank, right_half, solved_router
from mxfp4ref.conformance.routers.router_weights import some_weights
from mxfp4ref.conformance.routers.routing_factors import factor_between, factor_words, factors_by_part
from mxfp4ref.conformance.routers.routing_hypotheses import (
    Selection,
    View,
    near,
    rows_of_the_table,
    selections,
)
from mxfp4ref.conformance.routers.routing_weighings import Weighing, weighings

__all__ = ["routing_finding"]

_STAY = "while the weights stay where they were"
_FEWEST = 4  # weights from which a factor is told
_BF16, _FP16 = 2.0**-8, 2.0**-11
# Of a sentence, what is right or a matter of rounding, and the numbers of its own case.
_RIGHT = ("ids are right", "weights are right for these ids", "the others are right")
_TIED = "ids differ only where scores tie or are a few ulp apart"
_OWN = re.compile(
    r"all weights are \S+ the right ones: |(?<=the routed scaling factor) [\d.]+"
    r"|(?<=a factor of its own), .*|(?<=a factor of each expert): .*"
    r"|(?<=before dividing by it): .*|(?<=by a number): .*|(?<=. / c): .*"
    r"|(?<=number in the selection): .*|(?<=tanh.logit / c.): .*|(?<=all logits): .*"
    r"| instead of (sigmoid|softmax|sqrt|logit).*"
    r"|(?<=largest magnitude): .*|(?<=never selected): .*|(?<=selected by score): .*|(?<=others have one id): .*"
    r"|(?<=experts are selected): .*|(?<=the right experts): .*|(?<=some weights are .): .*|(?<=router of fewer) .*"
)
_CORRECT = 8  # ulp, within which weights are a matter of rounding


def routing_finding(
    inputs: Mapping[str, Any], outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Finding:
    """What a router did instead.

    Args:
        inputs: of a golden case of kind "routing".
        outputs, expected: `ids` and `scales`; those of the router may have another integer dtype, or another k.
    """
    got = outputs["ids"].cpu().long(), outputs["scales"].cpu().to(torch.float64)
    want = expected["ids"].cpu().long(), expected["scales"].cpu().to(torch.float64)
    words = []
    if outputs["ids"].dtype != expected["ids"].dtype:
        dtypes = (str(ids.dtype).removeprefix("torch.") for ids in (outputs["ids"], expected["ids"]))
        words.append("ids are {} instead of {}".format(*dtypes))
    rows = torch.ones(len(want[0]), dtype=torch.bool)
    if (padded := inputs.get("padded")) is not None:
        rows = ~padded.cpu()
        if any(bool((one[~rows] != other).any()) for one, other in zip(got, (-1, 0), strict=True)):
            words.append(_padded_words(inputs, (got[0][~rows], got[1][~rows])))
    tokens = _token_words(View.of(inputs, rows), *(tuple(t[rows] for t in pair) for pair in (got, want)))
    if tokens is None or "" in words:
        return Finding(("routing",), "", False)
    exact = bool(words) and not tokens[0]
    if not exact and not tokens[0]:
        tokens = _rounding_words(inputs, outputs, expected), False
    sentence = "; ".join([*words, *filter(None, [tokens[0]])])
    parts = [part for part in sentence.split("; ") if part not in (*_RIGHT, _TIED)]
    kind = "; ".join(_OWN.sub("", part) for part in parts)
    return Finding(("routing",), sentence, exact or tokens[1], kind=kind if kind != sentence else "")


def _padded_words(inputs: Mapping[str, Any], got: tuple[Tensor, Tensor]) -> str:
    """Of rows that are no tokens, where they are not -1 and 0; "" if nothing explains them."""
    ids, weights = got
    values = sorted(set(ids.flatten().tolist()))
    zero = bool((weights == 0).all())
    if len(values) == 1:
        held = f"id {values[0]}"
    elif bool(View.of({**inputs, "padded": None}, inputs["padded"].cpu()).logits.isfinite().all()):
        held = "ids of experts, as if they were tokens,"
    else:
        return ""
    return (
        f"padded rows have {held} and weights {'0' if zero else 'other than 0'} instead of id -1 and weight 0"
    )


def _token_words(view: View, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> tuple[str, bool] | None:
    """What explains all tokens, or those that differ; "" where nothing does but roundings, None where nothing."""
    if of_a_rank := ids_of_a_rank(view, got, want):
        return of_a_rank, False
    found = _explained(view, got, want)
    if found is not None and not _of_two(found[0]):
        return found
    if solved := solved_router(view, got, want):
        return solved, False
    if found is not None:
        return found
    wrong = torch.ones(len(view.logits), dtype=torch.bool)
    if got[0].shape == want[0].shape:
        wrong = (got[0] != want[0]).any(1) | (~near(got[1], want[1])).any(1)
    if 1 < int(wrong.sum()) < len(wrong):
        pairs = (tuple(t[wrong] for t in pair) for pair in (got, want))
        found = _explained(view.take(wrong), *pairs)
        if found is not None and found[0]:
            return f"in {_rows(wrong)}: {found[0]}", False
    if got[0].shape != want[0].shape:
        return None
    if torch.equal(got[0], want[0]) and (some := some_weights(view, *got)):
        return some, False
    found = _other_tokens(got, want) or _explained(view, got, want, by_part=True)
    half = right_half(view, got, want) if found is None else ""
    return (half, False) if half else found


def _of_two(sentence: str) -> bool:
    """Whether it says of two things that they are wrong."""
    return sum(part not in _RIGHT for part in sentence.split("; ")) > 1


def _rows(wrong: Tensor) -> str:
    rows = wrong.nonzero().flatten().tolist()
    if rows[-1] - rows[0] + 1 == len(rows):
        return f"tokens {rows[0]} to {rows[-1]} of {len(wrong)}"
    return f"{len(rows)} of {len(wrong)} tokens, from {rows[0]} on"


def _other_tokens(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> tuple[str, bool] | None:
    """Whether each token has the ids and weights of another."""
    same = (got[0][:, None] == want[0][None]).all(2) & near(got[1][:, None], want[1][None]).all(2)
    if len(same) < _FEWEST or not bool(same.any(1).all()):
        return None
    words = map_words(same.to(torch.uint8).argmax(1), "token", len(same))
    return (f"ids and weights are those of other tokens: {words}", False) if words else None


def _explained(
    view: View, got: tuple[Tensor, ...], want: tuple[Tensor, ...], *, by_part: bool = False
) -> tuple[str, bool] | None:
    """The explanation with the fewest parts: what is wrong with ids and weights alike is one.

    With `by_part`, weights that are right up to factors by token, slot or expert are explained too.
    """
    ids, weights = got
    best: tuple[list[str], bool] | None = None
    left: list[
        _Candidate
    ] = []  # whose weights are not simply right: looked at where nothing simpler explains all
    for candidate in _selected(view, ids, want[0]):
        if best is not None and len(best[0]) <= candidate[0]:
            break
        if left and candidate[0] > left[0][0]:
            best, left = _better(best, left, view, weights, by_part), []
        right = _right_weights(view, candidate[2], weights)
        if right is None:
            left.append(candidate)
        elif best is None or len(candidate[1]) < len(best[0]):
            best = candidate[1], right
        if best is not None and len(best[0]) <= 1:
            break  # there is nothing simpler, and what comes next takes longer
    if best is None or len(best[0]) > 1:
        best = _better(best, left, view, weights, by_part)
    if best is None:
        return None
    parts, exact = best
    if parts and torch.equal(ids, want[0]):
        parts = [_RIGHT[0], *parts]
    elif len(parts) == 1 and not parts[0].endswith(_STAY) and _right_weights(view, ids, weights) is not None:
        parts = [*parts, _RIGHT[1]]
    return "; ".join(parts), exact


def _better(
    best: tuple[list[str], bool] | None, left: list[_Candidate], view: View, weights: Tensor, by_part: bool
) -> tuple[list[str], bool] | None:
    """The better of what there is and what other weights make of some candidates."""
    known: dict[int, tuple[list[str], bool] | None] = {}
    for _, selected, experts in left:
        if id(experts) not in known:
            known[id(experts)] = _weighed(view, experts, weights, by_part)
        weighed = known[id(experts)]
        if weighed is not None:
            parts = _parts(selected, weighed[0])
            if best is None or len(parts) < len(best[0]):
                best = parts, weighed[1]
    return best


def _parts(selected: list[str], weighed: list[str]) -> list[str]:
    """What is wrong with ids and weights, once where it is the same."""
    both = {words.replace("scores are", "weights are made of") for words in selected} | set(selected)
    return [*selected, *(words for words in weighed if words not in both)]


_Candidate = tuple[int, list[str], Tensor]


def _selected(view: View, ids: Tensor, want: Tensor) -> Iterator[_Candidate]:
    """What may explain the ids, by the number of changes, and the experts whose weights then lie in the slots."""
    same_shape = ids.shape == want.shape
    if same_shape and torch.equal(ids, want):
        yield 0, [], want
    elif view.table is not None:
        yield from _from_table(view, ids, want) if same_shape else ()
    else:
        if bool(view.selectable(ids).all()):
            if not same_shape:
                yield 0, [f"top-{ids.shape[1]} is taken instead of top-{view.top_k}"], ids
            elif bool(Selection(high=True).agrees(view, ids).all()):
                yield 0, ["ties are broken to the higher id instead of the lower"], ids
            else:
                yield 0, [_TIED], ids
        if same_shape:
            yield from _moved(view, ids, want)
        if bool(((ids >= 0) & (ids < view.logits.shape[1])).all()):
            yield from _by_id(view, ids)
            for changes, one in selections(view):
                if bool(one.agrees(view, ids).all()):
                    yield changes, one.words(view), ids
    if same_shape:
        yield from _in_another_order(ids, want)
        yield from _fewer(ids, want)


def _from_table(view: View, ids: Tensor, want: Tensor) -> Iterator[_Candidate]:
    if bool(Selection().agrees(view, ids).all()):
        yield 1, ["experts are selected by score instead of by the table of token ids"], ids
    yield from _moved(view, ids, want)
    for words in rows_of_the_table(view, ids):
        yield 1, [words], ids


def _moved(view: View, ids: Tensor, want: Tensor) -> Iterator[_Candidate]:
    """The right experts in another order of slots, or under other numbers."""
    scores = view.scores(view.right_score).gather(1, want)
    by_score = scores.sort(dim=1, descending=True, stable=True).indices
    orders = {
        "in ascending order of ids": want.sort(dim=1).values,
        "in descending order of ids": want.sort(dim=1, descending=True).values,
        "in ascending order of scores": want.flip(1),
        "in the order of scores without the bias": want.gather(1, by_score),
        **{f"rotated by {n} slots": want.roll(n, 1) for n in range(1, want.shape[1])},
    }
    for order, one in orders.items():
        if torch.equal(one, ids):
            words = f"each token has its right experts, {order}"
            yield 1, [f"{words}, {_STAY}"], want
            yield 1, [words], ids
    if words := map_words(ids.flatten(), "id", view.logits.shape[1], of=want.flatten()):
        yield 1, [f"ids are renumbered: {words}"], want


def _by_id(view: View, ids: Tensor) -> Iterator[_Candidate]:
    """Experts that a right router may select, other ones among those that tie, in the order of their ids."""
    keys = Selection(groups=(1, 1)).keys(view).gather(1, ids)
    by_score = ids.gather(1, keys.sort(dim=1, descending=True, stable=True).indices)
    for order, descending in (("ascending", False), ("descending", True)):
        sorted_ids = ids.sort(dim=1, descending=descending).values
        if ids.shape[1] > 1 and torch.equal(sorted_ids, ids) and bool(view.selectable(by_score).all()):
            words = f"each token has its right experts, in {order} order of ids"
            yield 1, [f"{words}, {_STAY}"], by_score
            yield 1, [words], ids


def _in_another_order(ids: Tensor, want: Tensor) -> Iterator[_Candidate]:
    if torch.equal(ids.sort(dim=1).values, want.sort(dim=1).values):
        yield 3, [f"each token has its right experts in another order, {_STAY}"], want
        yield 3, ["each token has its right experts in another order"], ids


def _fewer(ids: Tensor, want: Tensor) -> Iterator[_Candidate]:
    """Right slots before others that all hold one number."""
    for count in range(want.shape[1]):
        rest = set(ids[:, count:].flatten().tolist())
        if torch.equal(ids[:, :count], want[:, :count]) and len(rest) == 1:
            which = f"slots from {count} on have id" if count else "all ids are"
            yield 3, [f"{which} {rest.pop()} instead of experts"], want
            return


def _right_weights(view: View, experts: Tensor, weights: Tensor) -> bool | None:
    """Whether right weights are so in every bit; None if they are not right."""
    if not bool(((experts >= 0) & (experts < view.logits.shape[1])).all()) or weights.shape != experts.shape:
        return None
    right = Weighing().weights(view, experts) * view.factor
    if not bool(near(weights, right).all()):
        return None
    return torch.equal(weights.to(torch.float32), right.to(torch.float32))


def _weighed(view: View, experts: Tensor, weights: Tensor, by_part: bool) -> tuple[list[str], bool] | None:
    """What explains wrong weights of these experts."""
    if not bool(((experts >= 0) & (experts < view.logits.shape[1])).all()) or weights.shape != experts.shape:
        return None
    if by_part:
        return factors_by_part(experts, weights, Weighing().weights(view, experts) * view.factor)
    values = set(weights.flatten().tolist())
    if (
        (len(values) == 1 or bool(weights.isnan().all()))
        and weights.numel() >= _FEWEST
        and experts.shape[1] > 1
    ):
        return [f"all weights are {values.pop():g}"], True
    for rounding, name in ((0.0, ""), (_BF16, "bf16"), (_FP16, "fp16")):
        if name and not torch.equal(weights, weights.to(_DTYPES[name]).to(torch.float64)):
            continue
        for one in weighings(view):
            made = one.weights(view, experts)
            factor = factor_between(weights, made, view, rounding)
            if factor is None:
                continue
            words = [*one.words(view), *factor_words(factor, view, plain=not one.changes)]
            words += [f"weights are rounded to {name}"] if name else []
            exact = torch.equal(weights.to(torch.float32), (made * factor).to(torch.float32))
            return words, exact and not name
    return None


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _rounding_words(
    inputs: Mapping[str, Any], outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> str:
    """Where all is right but roundings."""
    got, want = outputs["scales"].cpu(), expected["scales"].cpu()
    if not torch.equal(outputs["ids"].cpu(), expected["ids"].cpu()):
        return ""
    most = int(ulp_distance(got, want).max())
    count = int(differing(got, want).sum())
    if most > _CORRECT:
        return ""
    words = f"ids are right, {count:,} weights are up to {most} ulp off: roundings"
    return words + (
        ", as a correct float32 evaluation may give" if not routing_outside(inputs, outputs) else ""
    )
