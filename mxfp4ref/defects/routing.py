"""Routers that differ from the presets of `mxfp4ref.routing.presets`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.defects.defect import Applies, Defect, Kind, always
from mxfp4ref.defects.rounding import bf16
from mxfp4ref.defects.variants.router import (
    EPSILON,
    SCORES,
    RoutingCall,
    Select,
    Weigh,
    rerouted,
    route,
    select_by_preset,
    unpadded_logits,
)
from mxfp4ref.routing import scoring
from mxfp4ref.routing.presets import RoutedScaling, Routing, routing_weights
from mxfp4ref.routing.selection import select_experts
from mxfp4ref.sm90 import fp32

__all__ = ["ROUTING_DEFECTS"]


def _weigh_without_sum(call: RoutingCall) -> Weigh:
    if call.preset == "gpt_oss":
        return lambda logits, ids: scoring.softmax(logits).gather(1, ids.long())
    return lambda scores, ids: scores.gather(1, ids.long())


def _weigh_biased(call: RoutingCall) -> Weigh:
    def weigh(scores: Tensor, ids: Tensor) -> Tensor:
        bias: Tensor = call.options["correction_bias"]
        selected = (scores + bias).gather(1, ids.long())
        return selected / _total(selected, EPSILON.get(call.preset, 0.0))

    return weigh


def _weigh_by_other_softmax(call: RoutingCall) -> Weigh:
    if call.preset == "gpt_oss":
        return lambda logits, ids: routing_weights(scoring.softmax(logits), ids, normalize="sum")
    logits = unpadded_logits(call)
    return lambda scores, ids: routing_weights(logits, ids, normalize="softmax")


def _total(selected: Tensor, epsilon: float) -> Tensor:
    total = selected[:, :1]
    for slot in range(1, selected.shape[1]):
        total = total + selected[:, slot, None]
    return total + torch.tensor(epsilon, dtype=torch.float32, device=selected.device)


def _weigh_by_reciprocal(call: RoutingCall) -> Weigh:
    def weigh(scores: Tensor, ids: Tensor) -> Tensor:
        selected = scores.gather(1, ids.long())
        return selected * (torch.ones_like(selected) / _total(selected, EPSILON.get(call.preset, 0.0)))

    return weigh


def _weigh_by_float64_sum(call: RoutingCall) -> Weigh:
    def weigh(scores: Tensor, ids: Tensor) -> Tensor:
        selected = scores.gather(1, ids.long()).to(torch.float64)
        total = torch.zeros_like(selected[:, :1])
        for slot in range(selected.shape[1]):
            total = total + selected[:, slot, None]
        return (selected / (total + EPSILON.get(call.preset, 0.0))).to(torch.float32)

    return weigh


def _weigh_without_epsilon(call: RoutingCall) -> Weigh:
    def weigh(scores: Tensor, ids: Tensor) -> Tensor:
        selected = scores.gather(1, ids.long())
        return selected / _total(selected, 0.0)

    return weigh


def _factor_first(call: RoutingCall) -> Routing:
    base = route(call)
    factor = torch.tensor(base.routed_scaling_factor, dtype=torch.float32, device=base.ids.device)

    def weigh(scores: Tensor, ids: Tensor) -> Tensor:
        selected = scores.gather(1, ids.long())
        return (selected * factor) / _total(selected, EPSILON.get(call.preset, 0.0))

    unscaled = replace(call, options={**call.options, "routed_scaling": RoutedScaling.NONE})
    return replace(base, scales=rerouted(unscaled, weigh=lambda call: weigh).scales)


def _select_from_behind(scores: Tensor, bias: Tensor | None, top_k: int, groups: dict[str, int]) -> Tensor:
    ids = select_by_preset(scores.flip(1), None if bias is None else bias.flip(0), top_k, groups)
    return scores.shape[1] - 1 - ids


def _select_unbiased(scores: Tensor, bias: Tensor | None, top_k: int, groups: dict[str, int]) -> Tensor:
    return select_by_preset(scores, None, top_k, groups)


def _select_ungrouped(scores: Tensor, bias: Tensor | None, top_k: int, groups: dict[str, int]) -> Tensor:
    return select_by_preset(scores, bias, top_k, {})


def _select_in_groups(best: int, outside: float) -> Select:
    """Groups scored by their `best` best experts; those of the other groups get the score `outside`."""

    def select(scores: Tensor, bias: Tensor | None, top_k: int, groups: dict[str, int]) -> Tensor:
        biased = scores if bias is None else scores + bias
        by_group = biased.view(len(biased), groups["n_group"], -1)
        group_scores = by_group.sort(dim=2, descending=True).values[:, :, :best].sum(2)
        chosen = select_experts(group_scores, groups["topk_group"]).ids
        inside = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, chosen.long(), True)
        masked = by_group.masked_fill(~inside.unsqueeze(2), outside).flatten(1)
        return select_experts(masked, top_k).ids

    return select


def _select_by_id(scores: Tensor, bias: Tensor | None, top_k: int, groups: dict[str, int]) -> Tensor:
    return select_by_preset(scores, bias, top_k, groups).sort(1).values


def _without(*options: str) -> Callable[[RoutingCall], RoutingCall]:
    return lambda call: replace(call, options={k: v for k, v in call.options.items() if k not in options})


def _scaled_twice(call: RoutingCall) -> Routing:
    base = route(call)
    factor = torch.tensor(base.routed_scaling_factor, dtype=torch.float32, device=base.ids.device)
    return replace(base, scales=base.scales * factor)


def _weights_by_score(call: RoutingCall) -> Routing:
    base = route(call)
    return replace(base, ids=base.ids.sort(1).values)


def _padding_routed(call: RoutingCall) -> Routing:
    return route(replace(_without("padded")(call), logits=unpadded_logits(call)))


def _table_ignored(call: RoutingCall) -> Routing:
    bias = torch.zeros(call.logits.shape[1], dtype=torch.float32, device=call.logits.device)
    options = _without("token_ids", "tid2eid")(call).options
    return route(replace(call, options={**options, "correction_bias": bias}))


def _of(*presets: str) -> Applies:
    return lambda call: call.preset in presets


def _has(option: str) -> Applies:
    return lambda call: call.options.get(option) is not None


def _has_factor(call: RoutingCall) -> bool:
    in_weights = call.options.get("routed_scaling", RoutedScaling.IN_WEIGHTS) is RoutedScaling.IN_WEIGHTS
    factor_is_one = call.options.get("routed_scaling_factor") == 1.0
    return call.preset.startswith("deepseek") and in_weights and not factor_is_one


def _routing(
    name: str,
    summary: str,
    seen_in: str | tuple[str, ...],
    run: Callable[[RoutingCall], Routing],
    applies: Applies = always,
    kind: Kind = "defect",
) -> Defect:
    seen = (seen_in,) if isinstance(seen_in, str) else seen_in
    return Defect(name, summary, seen, kind, "routing", run, applies)


def _with(**parts: Any) -> Callable[[RoutingCall], Routing]:
    return lambda call: rerouted(call, **parts)


ROUTING_DEFECTS: tuple[Defect, ...] = (
    _routing(
        "rsf_missing",
        "routed scaling factor left out",
        ("sglang#8688",),
        lambda call: route(replace(call, options={**call.options, "routed_scaling": RoutedScaling.NONE})),
        _has_factor,
    ),
    _routing("rsf_twice", "routed scaling factor applied twice", "sglang#8333", _scaled_twice, _has_factor),
    _routing(
        "renorm_missing",
        "top-k weights not normalised (gpt-oss: softmax over all experts)",
        "sglang#8364",
        _with(weigh=_weigh_without_sum),
    ),
    _routing(
        "gate_bias_weights",
        "weights taken from the biased scores",
        "DeepSeek ports",
        _with(weigh=_weigh_biased),
        _has("correction_bias"),
    ),
    _routing(
        "softplus_as_sigmoid",
        "sigmoid scores where sqrt(softplus) is meant",
        "flashinfer#5190",
        _with(score=scoring.sigmoid),
        _of("deepseek_v4"),
    ),
    _routing(
        "tie_highest_id",
        "ties go to the highest expert id",
        "vllm#52679",
        _with(select=_select_from_behind),
        lambda call: not _has("tid2eid")(call),
    ),
    _routing(
        "sqrt_missing",
        "softplus scores where sqrt(softplus) is meant",
        "derived from softplus_as_sigmoid",
        _with(score=scoring.softplus),
        _of("deepseek_v4"),
    ),
    _routing(
        "selection_bias_ignored",
        "correction bias left out of the selection",
        "routers of older models",
        _with(select=_select_unbiased),
        _has("correction_bias"),
    ),
    _routing(
        "groups_ignored",
        "top-k among all experts, without the limitation to groups",
        "routers of other models",
        _with(select=_select_ungrouped),
        _of("deepseek_v3"),
    ),
    _routing(
        "group_score_best_one",
        "a group scores its best expert instead of the sum of its two best",
        "DeepSeek-V2's rule",
        _with(select=_select_in_groups(1, float("-inf"))),
        _of("deepseek_v3"),
    ),
    _routing(
        "groups_masked_with_zero",
        "experts outside the chosen groups get the score 0, which beats negative ones",
        "masked_fill(~mask, 0.0)",
        _with(select=_select_in_groups(2, 0.0)),
        _of("deepseek_v3"),
    ),
    _routing(
        "table_ignored",
        "hash layers routed by score instead of the table",
        "ports without hash layers",
        _table_ignored,
        _has("tid2eid"),
    ),
    _routing(
        "padding_routed",
        "padded rows routed like tokens",
        "batches padded for CUDA graphs",
        _padding_routed,
        _has("padded"),
    ),
    _routing(
        "slots_by_id",
        "slots in the order of expert ids instead of scores, ids and weights alike",
        "unsorted top-k",
        _with(select=_select_by_id),
        lambda call: not _has("tid2eid")(call),
    ),
    _routing(
        "ids_sorted_alone",
        "ids sorted, weights left in the order of scores",
        "derived from slots_by_id",
        _weights_by_score,
    ),
    _routing(
        "logits_bf16",
        "float32 logits rounded to bf16",
        "routers run under autocast",
        lambda call: route(replace(call, logits=fp32.to_bf16(call.logits))),
        lambda call: call.logits.dtype == torch.float32,
        "arithmetic",
    ),
    _routing(
        "scores_bf16",
        "scores rounded to bf16 before selection and weights",
        "routers run in bf16",
        lambda call: rerouted(call, score=lambda logits: bf16(SCORES[call.preset](logits))),
        lambda call: call.preset != "gpt_oss" or call.logits.dtype == torch.float32,
        "arithmetic",
    ),
    _routing(
        "score_rounded_once",
        "sqrt(softplus) rounded once instead of after each step",
        "fused score functions",
        _with(score=lambda logits: scoring.sqrt_softplus(logits, rounding="once")),
        _of("deepseek_v4"),
        "arithmetic",
    ),
    _routing(
        "softmax_of_other_set",
        "softmax over the k instead of over all and divided by the sum, or the other way round (gpt-oss)",
        "formulas that are equal on paper",
        _with(weigh=_weigh_by_other_softmax),
        _of("gpt_oss", "mixtral"),
        "arithmetic",
    ),
    _routing(
        "reciprocal_of_sum",
        "scores times the rounded reciprocal of their sum",
        "fused top-k kernels",
        _with(weigh=_weigh_by_reciprocal),
        _of("deepseek_v3", "deepseek_v4", "mixtral"),
        "arithmetic",
    ),
    _routing(
        "score_sum_float64",
        "sum and division in float64, rounded once",
        "wider references",
        _with(weigh=_weigh_by_float64_sum),
        _of("deepseek_v3", "deepseek_v4", "mixtral"),
        "arithmetic",
    ),
    _routing(
        "epsilon_missing",
        "scores divided by their sum without 1e-20",
        "routers of other models",
        _with(weigh=_weigh_without_epsilon),
        _of("deepseek_v3"),
        "arithmetic",
    ),
    _routing(
        "factor_before_division",
        "(score * factor) / sum instead of (score / sum) * factor",
        "reordered products",
        _factor_first,
        _has_factor,
        "arithmetic",
    ),
)
