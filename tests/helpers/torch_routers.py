"""Routers in plain torch, as inference engines write them: right, and with other roundings than the package's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.routing.models import PRESETS


def router(
    preset: str,
    logits: Tensor,
    correction_bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    padded: Tensor | None = None,
    routed_scaling: str = "in_weights",
    routed_scaling_factor: float = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
    by_formulas: bool = False,
    stable: bool = False,
    **options: Any,
) -> dict[str, Tensor]:
    """The published models' routers.

    Args:
        dtype: of all arithmetic; weights are rounded to float32 at the end.
        by_formulas: scores written out in exp and log1p, a reciprocal of the sum, the factor multiplied in first.
        stable: ties to the lowest id, by a stable sort, instead of `torch.topk`.
    """
    x = logits.to(dtype)
    if padded is not None:
        x = x.masked_fill(padded[:, None], 0.0)
    scores = _scores(preset, x, by_formulas)
    top_k = options.get("top_k", PRESETS[preset].top_k)
    if tid2eid is not None and token_ids is not None:
        ids = torch.zeros(len(x), top_k, dtype=torch.int64)
        rows = torch.ones(len(x), dtype=torch.bool) if padded is None else ~padded
        ids[rows] = tid2eid.long()[token_ids.long()[rows]]
    else:
        biased = scores if correction_bias is None else scores + correction_bias.to(dtype)
        groups = (options.get(name, getattr(PRESETS[preset], name)) for name in ("n_group", "topk_group"))
        ids = _best(_limited(biased, *groups), top_k, stable)
    weights = scores.gather(1, ids)
    if preset == "gpt_oss":
        weights = weights.softmax(1)
    else:
        total = weights.sum(1, keepdim=True) + PRESETS[preset].epsilon
        weights = weights * (1 / total) if by_formulas else weights / total
    if routed_scaling == "in_weights":
        weights = weights * routed_scaling_factor
    if padded is not None:
        ids, weights = ids.masked_fill(padded[:, None], -1), weights.masked_fill(padded[:, None], 0.0)
    return {"ids": ids.to(torch.int32), "scales": weights.to(torch.float32)}


def _scores(preset: str, x: Tensor, by_formulas: bool) -> Tensor:
    if preset == "deepseek_v3":
        return 1 / (1 + (-x).exp()) if by_formulas else x.sigmoid()
    if preset == "deepseek_v4":
        if by_formulas:
            return (x.clamp_min(0) + (-x.abs()).exp().log1p()).sqrt()
        return torch.nn.functional.softplus(x).sqrt()
    if preset == "mixtral":
        powers = (x - x.amax(1, keepdim=True)).exp()
        return powers / powers.sum(1, keepdim=True) if by_formulas else x.softmax(1)
    return x


def _limited(scores: Tensor, n_group: int, topk_group: int) -> Tensor:
    if n_group == 1:
        return scores
    by_group = scores.view(len(scores), n_group, -1)
    chosen = by_group.topk(2).values.sum(2).topk(topk_group).indices
    outside = torch.ones(len(scores), n_group, dtype=torch.bool).scatter_(1, chosen, False)
    return by_group.masked_fill(outside[..., None], -torch.inf).flatten(1)


def _best(scores: Tensor, top_k: int, stable: bool) -> Tensor:
    if stable:
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return scores.topk(top_k).indices


def _variant(**how: Any) -> Callable[..., dict[str, Tensor]]:
    return lambda **inputs: router(**inputs, **how)


RIGHT: dict[str, Callable[..., dict[str, Tensor]]] = {
    "float32": _variant(),
    "float32 with stable ties": _variant(stable=True),
    "float64": _variant(dtype=torch.float64),
    "formulas": _variant(by_formulas=True),
    "formulas in float64": _variant(by_formulas=True, dtype=torch.float64, stable=True),
}
