"""Of which experts' right outputs a token's row is the sum, and with which weights: solved, where it is unique."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from mxfp4ref._words import shortened
from mxfp4ref.conformance.families.distances import last_place, may_underflow, solvable
from mxfp4ref.conformance.families.hypothesis import Pipeline, slot_outputs
from mxfp4ref.conformance.families.slot_kinds import position_in_expert
from mxfp4ref.conformance.families.solved.known_factors import factor_in_words
from mxfp4ref.conformance.families.solved.solved_weights import Weights, in_common, powers_of, unsure_of
from mxfp4ref.conformance.findings.finding import OTHER_EXPERTS, Evidence
from mxfp4ref.conformance.findings.index_words import pair_words
from mxfp4ref.conformance.findings.reduction import by_every_expert, expert_numbers
from mxfp4ref.sm90 import fp32

__all__ = ["other_sums"]

_WORK = 1 << 29  # multiplications for one token's outputs of all experts
_ROUNDING = 2.0**-8  # of bf16, and of the slots' sum
_SAME = 2.0**-6  # that two weights may differ by, of the token's largest
_FEW = 8  # slots, of which all sums of weights are looked at
_RIGHT = "GEMM1, activation and GEMM2 are right for the experts that were computed"


def _allowed(weights: Tensor, y: Tensor) -> Tensor:
    """How far a sum of rounded rows may be off the numbers, by column."""
    return _ROUNDING * (weights.abs() @ y.abs())


def _expert_weights(pipeline: Pipeline, got: Tensor, token: int) -> dict[int, tuple[float, float]] | None:
    """With which weights the token's row is a sum of the experts' outputs, and how unsure these are.

    None if it is no such sum, or not uniquely.
    """
    call = pipeline.call
    experts = call.experts
    count, hidden = experts.num_experts, experts.hidden_size
    if count * 3 * hidden * experts.intermediate_size > _WORK or count * 2 > hidden:
        return None
    everyone = by_every_expert(call, torch.tensor([token], device=got.device))
    y = fp32.widen(slot_outputs(replace(pipeline, call=everyone))[0].contiguous()).to(torch.float64)
    if experts.fc2_biases is not None and call.tp_rank == 0:
        y = y + fp32.widen(experts.fc2_biases).to(torch.float64)
    target = fp32.widen(got[token].contiguous()).to(torch.float64)
    lengths = y.norm(dim=1)
    if not bool(y.isfinite().all() & target.isfinite().all() & (lengths > 0).all()) or not solvable(target):
        return None
    directions = y / lengths[:, None]
    chosen = list(range(count))
    for _ in range(8):  # all of them, then those that count
        part = directions[chosen]
        if (least := float(torch.linalg.svdvals(part).min())) < 2.0**-4:
            return None
        solution = torch.linalg.lstsq(part.T, target[:, None], driver="gelsd").solution[:, 0]
        nothing = 8 * _ROUNDING * float(target.norm()) * hidden**-0.5 / least
        kept = [e for e, c in zip(chosen, solution.tolist(), strict=True) if abs(c) > nothing]
        if not kept:
            return None
        if kept == chosen:
            break
        chosen = kept
    else:
        return None
    weights = solution / lengths[chosen]
    if bool(((target - weights @ y[chosen]).abs() > _allowed(weights, y[chosen])).any()):
        return None
    unsure = unsure_of(y[chosen], last_place(target).square() / 12)
    return dict(zip(chosen, zip(weights.tolist(), unsure.tolist(), strict=True), strict=True))


def other_sums(
    pipeline: Pipeline, got: Tensor, wrong: Tensor, local: Tensor, tokens: list[int]
) -> Iterator[Evidence]:
    """Whether the output is a sum of right expert outputs, of which experts, with which weights."""
    call = pipeline.call
    fits: list[tuple[int, dict[int, float], dict[int, float]]] = []
    unsure: dict[int, dict[int, float]] = {}
    for token in tokens:
        solved = _expert_weights(pipeline, got, token)
        if solved is None:
            continue
        found = {e: weight for e, (weight, _) in solved.items()}
        unsure[token] = {e: off for e, (_, off) in solved.items()}
        asked = {
            e: float(w)
            for e, w in zip(local[token].tolist(), call.token_final_scales[token].tolist(), strict=True)
            if e >= 0
        }
        fits.append((token, asked, found))
    if 3 * len(fits) < 2 * len(tokens) or len(fits) < min(2, len(tokens)):
        return
    first = call.ep_rank * call.experts.num_experts
    if all(_close(asked, found) for _, asked, found in fits):
        return  # too little is wrong to show here
    if added := _foreign_slots(pipeline, fits, local):
        kind = "slots that are another rank's, or padded, are computed and added"
        # By experts that the token has anyway: these may as well get the weights that such slots leave.
        own = all(set(found) <= set(asked) for _, asked, found in fits)
        kind += ", or the weights are normalised without them" * own
        yield Evidence.of_kind(("slots", "finalize")[: 1 + own], kind, f"{added}; {_RIGHT}", 3)
        return
    same_experts = all(set(asked) == set(found) for _, asked, found in fits)
    told = [_weights(fit, unsure[fit[0]], local, first) for fit in fits]
    token, asked, found = next(fit for fit in fits if not _close(fit[1], fit[2]))
    shown = next(str(w) for w in told if w.token == token)
    if same_experts:
        ratios = [found[e] / asked[e] for _, asked, found in fits for e in asked if asked[e]]
        if max(ratios) - min(ratios) < 2.0**-5 * abs(ratios[0]):
            known = factor_in_words(ratios[0], [call], unsure=_ROUNDING)
            yield Evidence.of_kind(
                ("finalize", "fc2"),
                f"every token that was looked at is the right output times {ratios[0]:.4g}, as far as bf16 shows",
                f"a factor on the routing weights, in the sum, or on GEMM2's result{'; ' * bool(known)}{known}",
                3,
            )
            return
        twice = [(t, e) for t, asked, found in fits for e in asked if found[e] > 1.5 * asked[e] > 0]
        if twice and all(_counted(asked[e], found[e]) for _, asked, found in fits for e in asked):
            which = (f"token {t}'s of expert {e + first}" for t, e in twice)
            details = f"{shortened(which, 4)}; {_RIGHT}"
            yield Evidence.of_kind(("slots", "finalize"), "some slots' terms are added twice", details, 3)
            return
    conserved = all(_sums_of(call.token_final_scales[token].tolist(), found) for token, _, found in fits)
    fewer = all(set(found) <= set(asked) for _, asked, found in fits)
    if same_experts or (fewer and not conserved):
        power = powers_of(told)
        factor, experts = (power, set()) if power else in_common(told)
        used = torch.isin(local, torch.tensor(sorted(experts), device=local.device) - first).any(1)
        scaled = experts and not bool((used & ~wrong.any(1)).any())  # whatever the slot, and in every token
        scaled = scaled or bool(power)
        after = (
            "a factor on GEMM2's result or in the sum" if scaled else "GEMM1, activation and GEMM2 are right"
        )
        # Slots in another order than their weights may be what is meant as well, and of a token's only slot its own
        # weight is not told from those of foreign slots that are added.
        moved = all(_alike(sorted(asked.values()), sorted(found.values())) for _, asked, found in fits)
        told_apart = any(len(asked) > 1 for _, asked, _ in fits) or bool((local >= 0).all())
        sure = ("finalize",) if same_experts and told_apart and not moved else ("finalize", "slots")
        yield Evidence.of_kind(
            ("finalize", "fc2") if scaled else sure,
            "the routing weights used are others",
            f"{factor}{'; ' * bool(factor)}{shown}{f'; {after}' * (same_experts or bool(scaled))}",
            3,
        )
        return
    subset = all(set(found) < set(asked) or _close(asked, found) for _, asked, found in fits) and all(
        abs(found[e] / asked[e] - 1) < 2.0**-5 for _, asked, found in fits for e in found
    )
    if subset:
        if _may_be_small(pipeline, fits, local):
            return
        missing = sorted(set(asked) - set(found))
        slots = [local[token].tolist().index(e) for e in missing]
        places = {local[t].tolist().index(e) for t, a, found in fits for e in set(a) - set(found)}
        ended = len(places) == 1 and bool(wrong.any(1)[local[:, min(places)] >= 0].all())
        bare = (call.experts.fc2_biases is None or call.tp_rank > 0) and not ended
        yield Evidence.of_kind(
            # Without a bias a row of zeros adds nothing; a sum may end early.
            ("slots", "fc2") if bare else ("slots", "finalize")[: 1 + ended],
            f"slots are left out{', or GEMM2 gives zeros for their rows' * bare}",
            f"token {token} lacks slot{'s' * (len(slots) > 1)} {', '.join(map(str, slots))} (expert "
            f"{', '.join(str(e + first) for e in missing)}), its other slots are added with the right weights",
            3,
        )
        return
    swaps = [_exchanged(asked, found) for _, asked, found in fits]
    pairs = sorted({pair for swap in swaps if swap for pair in swap})
    kept = {(e, e) for _, asked, found in fits for e in set(asked) & set(found)}
    rule = pair_words(((a + first, b + first) for a, b in {*pairs, *kept}), "expert", expert_numbers(call))
    mapping = (
        f" ({f'{rule}: ' * bool(rule)}{', '.join(f'expert {a + first} by {b + first}' for a, b in pairs[:6])})"
        if pairs
        else ""
    )
    some = _of_which_rows(local, wrong, {a for a, _ in pairs}) if pairs else ""
    sentence = f"{OTHER_EXPERTS}{mapping}{some}: {shown}; {_RIGHT}"
    yield Evidence(("slots",) if conserved else ("slots", "finalize"), sentence, 3, kind=OTHER_EXPERTS)


def _alike(asked: list[float], found: list[float]) -> bool:
    return all(abs(a - f) <= _SAME * max(map(abs, asked)) for a, f in zip(asked, found, strict=True))


def _sums_of(weights: list[float], found: dict[int, float]) -> bool:
    """Whether all weights found are sums of those of the token, as where other experts compute its slots."""
    near = _SAME * max(map(abs, weights))
    most = len(weights) if len(weights) <= _FEW else _FEW // 2
    sums = [sum(c) for n in range(1, most + 1) for c in combinations(weights, n)]
    return all(any(abs(w - one) <= near for one in sums) for w in found.values())


def _foreign_slots(
    pipeline: Pipeline, fits: list[tuple[int, dict[int, float], dict[int, float]]], local: Tensor
) -> str:
    """Which slots that are not this rank's were computed by which experts, if that is all that the sums have more."""
    call, told = pipeline.call, list[str]()
    if all(_rescaled(asked, found) for _, asked, found in fits):
        return ""  # a factor of each token's own, as of weights that are normalised otherwise
    for token, asked, found in fits:
        foreign = (local[token] < 0).nonzero().flatten().tolist()
        weights = call.token_final_scales[token].tolist()
        near = _SAME * max(map(abs, weights))
        more = {e: found.get(e, 0.0) - asked.get(e, 0.0) for e in asked.keys() | found.keys()}
        for expert, extra in sorted(more.items()):
            if abs(extra) <= near:
                continue
            some = (c for n in range(1, min(len(foreign), 4) + 1) for c in combinations(foreign, n))
            slots = next((c for c in some if abs(extra - sum(weights[s] for s in c)) <= near), ())
            if not slots:
                return ""
            foreign = [s for s in foreign if s not in slots]
            ids = ", ".join(str(int(call.token_selected_experts[token, s])) for s in slots)
            which = expert + call.ep_rank * call.experts.num_experts
            told.append(f"id{'s' * (len(slots) > 1)} {ids} of token {token} by expert {which}")
    return shortened(told, 4)


def _rescaled(asked: dict[int, float], found: dict[int, float]) -> bool:
    """Whether a token's weights are those asked for times one number."""
    ratios = [found[e] / asked[e] for e in asked if asked[e]] if set(asked) == set(found) else []
    return bool(ratios) and max(ratios) - min(ratios) < 2.0**-5 * abs(ratios[0])


def _of_which_rows(local: Tensor, wrong: Tensor, experts: set[int]) -> str:
    """That not all slots of these experts are concerned, and which rows are, where right tokens show it; else ""."""
    position, _ = position_in_expert(local)
    token_wrong = wrong.any(1)[:, None].expand_as(local)
    firsts, exact = set(), True
    for expert in sorted(experts):
        ours = local == expert
        right, off = position[ours & ~token_wrong], position[ours & token_wrong]
        if len(right):
            firsts.add(int(off.min()))
            exact &= int(right.max()) < int(off.min())
    if not firsts:
        return ""
    if exact and len(firsts) == 1 and 0 not in firsts:
        return f", in rows from {firsts.pop()} on of an expert only"
    return ", not in all of their rows"


def _may_be_small(
    pipeline: Pipeline, fits: list[tuple[int, dict[int, float], dict[int, float]]], local: Tensor
) -> bool:
    """Whether the rows that are missing are so small that GEMM2, or what is before it, may give zeros for them."""
    y = fp32.widen(slot_outputs(pipeline)[[token for token, *_ in fits]].contiguous()).double()
    sizes = y.square().mean(2).sqrt()
    here = local[[token for token, *_ in fits]]
    kept = torch.stack(
        [
            torch.isin(row, torch.tensor(list(found), device=row.device))
            for row, (*_, found) in zip(here, fits, strict=True)
        ]
    )
    return may_underflow(sizes[~kept & (here >= 0)], sizes[kept])


def _counted(asked: float, found: float) -> bool:
    """Whether a weight is the right one, once or twice."""
    return any(abs(found - n * asked) <= 2.0**-5 * abs(n * asked) for n in (1, 2))


def _close(asked: dict[int, float], found: dict[int, float]) -> bool:
    if set(asked) != set(found):
        return False
    return all(abs(found[e] - w) <= 2.0**-5 * max(abs(w), 1e-30) for e, w in asked.items())


def _exchanged(asked: dict[int, float], found: dict[int, float]) -> list[tuple[int, int]]:
    """Which expert stands for which, by their weights."""
    pairs = []
    for expert in set(asked) - set(found):
        others = [
            e
            for e in set(found) - set(asked)
            if abs(found[e] - asked[expert]) <= 2.0**-5 * abs(asked[expert])
        ]
        if len(others) == 1:
            pairs.append((expert, others[0]))
    return pairs


def _weights(
    fit: tuple[int, dict[int, float], dict[int, float]], unsure: dict[int, float], local: Tensor, first: int
) -> Weights:
    """Of a token, its own experts in the order of its slots, then the others."""
    token, asked, found = fit
    row = local[token].tolist()
    experts = [*asked, *(e for e in found if e not in asked)]
    return Weights(
        token,
        tuple(row.index(e) if e in asked else -1 for e in experts),
        tuple(e + first for e in experts),
        *(tuple(by.get(e, 0.0) for e in experts) for by in (asked, found, unsure)),
    )
