"""Routers that differ from the presets of `mxfp4ref.routing.presets`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref.defects.definition import Applies, defect
from mxfp4ref.defects.variants.rounding import bf16
from mxfp4ref.defects.variants.router import (
    RoutingCall,
    Selecting,
    rerouted,
    route,
    score_by_preset,
    select,
    unpadded_logits,
)
from mxfp4ref.routing import scoring
from mxfp4ref.routing.presets import RoutedScaling, Routing, routing_weights
from mxfp4ref.routing.selection import select_experts
from mxfp4ref.sm90 import fp32


def _of(*presets: str) -> Applies:
    return lambda call: call.preset in presets


def _has(option: str) -> Applies:
    return lambda call: call.options.get(option) is not None


def _has_factor(call: RoutingCall) -> bool:
    in_weights = call.options.get("routed_scaling", RoutedScaling.IN_WEIGHTS) is RoutedScaling.IN_WEIGHTS
    factor_is_one = call.options.get("routed_scaling_factor") == 1.0
    return call.preset.startswith("deepseek") and in_weights and not factor_is_one


def _scores_table(call: RoutingCall) -> bool:
    return call.options.get("tid2eid") is None


def _selected(scores: Tensor, ids: Tensor) -> Tensor:
    return scores.gather(1, ids.long())


def _total(selected: Tensor, epsilon: float) -> Tensor:
    """The sum in the order of the slots."""
    total = torch.zeros_like(selected[:, :1])
    for score in selected.unbind(1):
        total = total + score.unsqueeze(1)
    return total + torch.tensor(epsilon, dtype=selected.dtype, device=selected.device)


@defect("routing", "sglang#8688", applies=_has_factor)
def rsf_missing(call: RoutingCall) -> RoutingCall:
    """routed scaling factor left out"""
    return call.having(routed_scaling=RoutedScaling.NONE)


@defect("routing", "sglang#8333", applies=_has_factor)
def rsf_twice(call: RoutingCall) -> Routing:
    """routed scaling factor applied twice"""
    base = route(call)
    factor = torch.tensor(base.routed_scaling_factor, dtype=torch.float32, device=base.ids.device)
    return replace(base, scales=base.scales * factor)


@defect("router.weigh", "sglang#8364")
def renorm_missing(scores: Tensor, ids: Tensor, call: RoutingCall) -> Tensor:
    """top-k weights not normalised (gpt-oss: softmax over all experts)"""
    return _selected(scoring.softmax(scores) if call.preset == "gpt_oss" else scores, ids)


@defect("router.weigh", "DeepSeek ports", applies=_has("correction_bias"))
def gate_bias_weights(scores: Tensor, ids: Tensor, call: RoutingCall) -> Tensor:
    """weights taken from the biased scores"""
    selected = _selected(scores + call.options["correction_bias"], ids)
    return selected / _total(selected, call.epsilon)


@defect("router.score", "flashinfer#5190", applies=_of("deepseek_v4"))
def softplus_as_sigmoid(logits: Tensor, call: RoutingCall) -> Tensor:
    """sigmoid scores where sqrt(softplus) is meant"""
    return scoring.sigmoid(logits)


@defect("router.select", "vllm#52679", applies=_scores_table)
def tie_highest_id(by: Selecting) -> Tensor:
    """ties go to the highest expert id"""
    bias = None if by.bias is None else by.bias.flip(0)
    return by.scores.shape[1] - 1 - select(replace(by, scores=by.scores.flip(1), bias=bias))


@defect("router.score", "derived from softplus_as_sigmoid", applies=_of("deepseek_v4"))
def sqrt_missing(logits: Tensor, call: RoutingCall) -> Tensor:
    """softplus scores where sqrt(softplus) is meant"""
    return scoring.softplus(logits)


@defect("router.select", "routers of older models", applies=_has("correction_bias"))
def selection_bias_ignored(by: Selecting) -> Tensor:
    """correction bias left out of the selection"""
    return select(replace(by, bias=None))


@defect("router.select", "routers of other models", applies=_of("deepseek_v3"))
def groups_ignored(by: Selecting) -> Tensor:
    """top-k among all experts, without the limitation to groups"""
    return select(replace(by, groups={}))


def _select_in_groups(by: Selecting, best: int, outside: float) -> Tensor:
    """Groups scored by their `best` best experts; those of the other groups get the score `outside`."""
    biased = by.scores if by.bias is None else by.scores + by.bias
    by_group = biased.view(len(biased), by.groups["n_group"], -1)
    group_scores = by_group.sort(dim=2, descending=True).values[:, :, :best].sum(2)
    chosen = select_experts(group_scores, by.groups["topk_group"]).ids
    inside = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, chosen.long(), True)
    return select_experts(by_group.masked_fill(~inside.unsqueeze(2), outside).flatten(1), by.top_k).ids


@defect("router.select", "DeepSeek-V2's rule", applies=_of("deepseek_v3"))
def group_score_best_one(by: Selecting) -> Tensor:
    """a group scores its best expert instead of the sum of its two best"""
    return _select_in_groups(by, 1, float("-inf"))


@defect("router.select", "masked_fill(~mask, 0.0)", applies=_of("deepseek_v3"))
def groups_masked_with_zero(by: Selecting) -> Tensor:
    """experts outside the chosen groups get the score 0, which beats negative ones"""
    return _select_in_groups(by, 2, 0.0)


@defect("routing", "ports without hash layers", applies=_has("tid2eid"))
def table_ignored(call: RoutingCall) -> RoutingCall:
    """hash layers routed by score instead of the table"""
    bias = torch.zeros(call.logits.shape[1], dtype=torch.float32, device=call.logits.device)
    return call.having(token_ids=None, tid2eid=None, correction_bias=bias)


@defect("routing", "batches padded for CUDA graphs", applies=_has("padded"))
def padding_routed(call: RoutingCall) -> RoutingCall:
    """padded rows routed like tokens"""
    return replace(call.having(padded=None), logits=unpadded_logits(call))


@defect("router.select", "unsorted top-k", applies=_scores_table)
def slots_by_id(by: Selecting) -> Tensor:
    """slots in the order of expert ids instead of scores, ids and weights alike"""
    return select(by).sort(1).values


@defect("routing", "derived from slots_by_id")
def ids_sorted_alone(call: RoutingCall) -> Routing:
    """ids sorted, weights left in the order of scores"""
    base = route(call)
    return replace(base, ids=base.ids.sort(1).values)


@defect(
    "routing",
    "routers run under autocast",
    kind="arithmetic",
    applies=lambda call: call.logits.dtype == torch.float32,
)
def logits_bf16(call: RoutingCall) -> RoutingCall:
    """float32 logits rounded to bf16"""
    return replace(call, logits=fp32.to_bf16(call.logits))


@defect(
    "router.score",
    "routers run in bf16",
    kind="arithmetic",
    applies=lambda call: call.preset != "gpt_oss" or call.logits.dtype == torch.float32,
)
def scores_bf16(logits: Tensor, call: RoutingCall) -> Tensor:
    """scores rounded to bf16 before selection and weights"""
    return bf16(score_by_preset(logits, call))


@defect("router.score", "fused score functions", kind="arithmetic", applies=_of("deepseek_v4"))
def score_rounded_once(logits: Tensor, call: RoutingCall) -> Tensor:
    """sqrt(softplus) rounded once instead of after each step"""
    return scoring.sqrt_softplus(logits, rounding="once")


@defect(
    "router.weigh", "formulas that are equal on paper", kind="arithmetic", applies=_of("gpt_oss", "mixtral")
)
def softmax_of_other_set(scores: Tensor, ids: Tensor, call: RoutingCall) -> Tensor:
    """softmax over the k instead of over all and divided by the sum, or the other way round (gpt-oss)"""
    if call.preset == "gpt_oss":
        return routing_weights(scoring.softmax(scores), ids, normalize="sum")
    return routing_weights(unpadded_logits(call), ids, normalize="softmax")


_divides = _of("deepseek_v3", "deepseek_v4", "mixtral")


@defect("router.weigh", "fused top-k kernels", kind="arithmetic", applies=_divides)
def reciprocal_of_sum(scores: Tensor, ids: Tensor, call: RoutingCall) -> Tensor:
    """scores times the rounded reciprocal of their sum"""
    selected = _selected(scores, ids)
    return selected * (torch.ones_like(selected) / _total(selected, call.epsilon))


@defect("router.weigh", "wider references", kind="arithmetic", applies=_divides)
def score_sum_float64(scores: Tensor, ids: Tensor, call: RoutingCall) -> Tensor:
    """sum and division in float64, rounded once"""
    selected = _selected(scores, ids).to(torch.float64)
    return (selected / _total(selected, call.epsilon)).to(torch.float32)


@defect("router.weigh", "routers of other models", kind="arithmetic", applies=_of("deepseek_v3"))
def epsilon_missing(scores: Tensor, ids: Tensor, call: RoutingCall) -> Tensor:
    """scores divided by their sum without 1e-20"""
    selected = _selected(scores, ids)
    return selected / _total(selected, 0.0)


@defect("routing", "reordered products", kind="arithmetic", applies=_has_factor)
def factor_before_division(call: RoutingCall) -> Routing:
    """(score * factor) / sum instead of (score / sum) * factor"""
    base = route(call)
    factor = torch.tensor(base.routed_scaling_factor, dtype=torch.float32, device=base.ids.device)

    def weigh(scores: Tensor, ids: Tensor, call: RoutingCall) -> Tensor:
        selected = _selected(scores, ids)
        return (selected * factor) / _total(selected, call.epsilon)

    unscaled = call.having(routed_scaling=RoutedScaling.NONE)
    return replace(base, scales=rerouted(unscaled, weigh=weigh).scales)
