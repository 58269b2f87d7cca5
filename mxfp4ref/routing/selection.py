"""Which experts a token goes to: top-k, group-limited top-k, or a table (docs/arithmetic.md, section 7)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._ieee import to_fp32, to_fp64
from mxfp4ref._validate import check_float, check_ids, check_int, check_same_device, check_tensor

__all__ = ["AMBIGUOUS_ULPS", "Selection", "hash_experts", "select_experts"]

# A float32 chain of exp, log1p, division and square root is good to about 4 ulp, and two scores are compared.
AMBIGUOUS_ULPS = 8.0


class Selection(NamedTuple):
    """`ids [M, k] int32` by descending selection score, and `ambiguous [M] bool`."""

    ids: Tensor
    ambiguous: Tensor


@uncompiled
def select_experts(
    scores: Tensor,
    top_k: int,
    *,
    correction_bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    ambiguous_ulps: float = AMBIGUOUS_ULPS,
) -> Selection:
    """The top-k experts of each token, by descending score; equal scores (-0 equals +0) by ascending id.

    Args:
        scores: `[M, E] float32`, without NaN.
        top_k: k, experts per token.
        correction_bias: `[E] float32`, added to the scores (one float32 addition) for the selection only.
        n_group: with more than one, DeepSeek-V3's limitation: E is cut into `n_group` groups of neighbours,
            a group scores the float32 sum of its two best experts, and only the `topk_group` best groups
            (equal ones by ascending index) take part.
        topk_group: how many groups take part.
        ambiguous_ulps: a token is ambiguous if another set or order of its k experts (or another set of
            groups) would follow from moving each score by less than half this many ulp, that is, if two
            competitors lie less than this many ulp apart. An ulp is that of the score before or after the
            bias, whichever is larger, and for a group the sum of its two best experts'. 0 calls no token
            ambiguous, 1 calls those with exact ties so.

    Raises:
        TypeError: wrong dtypes.
        ValueError: NaN, k > E or more than the groups hold, groups that do not divide E or hold less than
            two experts.
    """
    check_tensor("scores", scores, dtype=torch.float32, shape=("M", "E"))
    num_experts = scores.shape[1]
    check_int("top_k", top_k, minimum=1, maximum=num_experts)
    check_int("n_group", n_group, minimum=1)
    check_int("topk_group", topk_group, minimum=1, maximum=n_group)
    ambiguous_ulps = check_float("ambiguous_ulps", ambiguous_ulps, minimum=0.0)
    selection_scores = scores.detach()
    if correction_bias is not None:
        check_tensor("correction_bias", correction_bias, dtype=torch.float32, shape=(num_experts,))
        check_same_device({"scores": scores, "correction_bias": correction_bias})
        selection_scores = to_fp32(to_fp64(selection_scores) + to_fp64(correction_bias.detach()))
    for name, values in (("scores", scores), ("scores + correction_bias", selection_scores)):
        if bool(torch.isnan(values).any()):
            raise ValueError(
                f"{name}: expected no NaN, got one at {torch.isnan(values).nonzero()[0].tolist()}"
            )

    keys = _order_keys(selection_scores)
    reach = torch.maximum(_ulp(scores), _ulp(selection_scores)) * (ambiguous_ulps / 2)
    low, high = to_fp64(selection_scores) - reach, to_fp64(selection_scores) + reach
    ambiguous = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    if n_group > 1:
        group_size = _check_groups(num_experts, n_group, topk_group, top_k)
        best_two = _descending(keys.reshape(-1, n_group, group_size))[:, :, :2]
        best = to_fp64(_take(selection_scores, best_two))
        group_scores = to_fp32(best[:, :, 0] + best[:, :, 1])
        order = _descending(_order_keys(group_scores))
        group_reach = _take(reach, best_two).sum(dim=2)
        group_low = (to_fp64(group_scores) - group_reach).gather(1, order)
        group_high = (to_fp64(group_scores) + group_reach).gather(1, order)
        if topk_group < n_group:
            ambiguous |= group_low[:, :topk_group].amin(1) < group_high[:, topk_group:].amax(1)
        inside = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, order[:, :topk_group], True)
        inside = inside.repeat_interleave(group_size, dim=1)
        keys = torch.where(inside, keys, torch.iinfo(torch.int32).min)  # below -inf
        high = torch.where(inside, high, -math.inf)

    order = _descending(keys)
    low, high = low.gather(1, order), high.gather(1, order)
    # The highest value that anything ranked behind a slot can reach.
    behind = high.flip(1).cummax(dim=1).values.flip(1)[:, 1 : top_k + 1]
    ambiguous |= (low[:, : behind.shape[1]] < behind).any(dim=1)
    return Selection(order[:, :top_k].to(torch.int32), ambiguous)


@uncompiled
def hash_experts(token_ids: Tensor, tid2eid: Tensor, *, num_experts: int) -> Tensor:
    """The experts that a table gives each token, `[M, k] int32` in table order (DeepSeek-V4's first layers).

    Args:
        token_ids: `[M]` int32 or int64 vocabulary ids.
        tid2eid: `[V, k]` int32 or int64, expert ids of each vocabulary id.
        num_experts: E.

    Raises:
        ValueError: a token id beyond the table, an expert id outside `[0, E)` anywhere in the table, or a
            token whose row names an expert twice.
    """
    integers = (torch.int32, torch.int64)
    check_tensor("token_ids", token_ids, dtype=integers, shape=("M",))
    check_tensor("tid2eid", tid2eid, dtype=integers, shape=("V", "k"))
    check_same_device({"token_ids": token_ids, "tid2eid": tid2eid})
    check_int("num_experts", num_experts, minimum=1)
    check_ids("token_ids", token_ids, maximum=len(tid2eid) - 1)
    check_ids("tid2eid", tid2eid, maximum=num_experts - 1)
    ids = tid2eid[token_ids.long()]
    ordered = ids.sort(dim=1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
    if bool(repeated.any()):
        token = int(token_ids[repeated.nonzero()[0, 0]])
        raise ValueError(
            f"tid2eid: expected distinct experts in a row, got {tid2eid[token].tolist()} in row {token}"
        )
    return ids.to(torch.int32)


def _order_keys(values: Tensor) -> Tensor:
    """int32 keys that compare as the float32 values do; torch's own sorts differ in how they treat -0."""
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    return torch.where(bits < 0, -magnitude, magnitude)


def _descending(keys: Tensor) -> Tensor:
    return torch.sort(keys, dim=-1, descending=True, stable=True).indices


def _take(values: Tensor, best_two: Tensor) -> Tensor:
    """`[M, n_group, 2]` of `[M, E]` values, at indices within the groups."""
    groups, num_experts = best_two.shape[1], values.shape[1]
    return values.reshape(-1, groups, num_experts // groups).gather(2, best_two)


def _ulp(values: Tensor) -> Tensor:
    """The spacing of float32 at each value, float64; 0 for infinities."""
    exponent = (values.view(torch.int32).to(torch.int64) >> 23) & 0xFF
    spacing = ((exponent.clamp_min(1) - 150 + 1023) << 52).view(torch.float64)
    return torch.where(exponent == 255, 0.0, spacing)


def _check_groups(num_experts: int, n_group: int, topk_group: int, top_k: int) -> int:
    group_size, rest = divmod(num_experts, n_group)
    if rest or group_size < 2:
        raise ValueError(
            f"n_group: expected a divisor of E={num_experts} that leaves groups of at least 2, got {n_group}"
        )
    if top_k > topk_group * group_size:
        raise ValueError(
            f"top_k: expected at most topk_group * E / n_group = {topk_group * group_size}, got {top_k}"
        )
    return group_size
