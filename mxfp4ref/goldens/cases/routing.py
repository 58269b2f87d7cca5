"""Suite `routing`: from router logits to ids and weights, to the bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mxfp4ref.goldens.cases.definition import Content, define
from mxfp4ref.goldens.cases.source import Source
from mxfp4ref.routing import presets as routing


def _routed(preset: str, tensors: dict[str, Tensor], **parameters: Any) -> Content:
    """Inputs and results of a preset; every tensor but the logits is passed under its own name."""
    options: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if name != "logits"}
    if "routed_scaling" in parameters:
        options["routed_scaling"] = routing.RoutedScaling(parameters["routed_scaling"])
    options |= {name: value for name, value in parameters.items() if name != "routed_scaling"}
    routed = routing.ROUTERS[preset](tensors["logits"], **options)
    results = {"ids": routed.ids, "scales": routed.scales, "ambiguous": routed.ambiguous}
    return Content(tensors | results, {"preset": preset, **parameters})


def _logits(source: Source, num_tokens: int, num_experts: int) -> Tensor:
    return source.normal("logits", num_tokens, num_experts).to(torch.float32) + source.uniform(
        "logits.fraction", num_tokens, num_experts
    )


def _bias(source: Source, num_experts: int, around: float) -> Tensor:
    return around + source.uniform("bias", num_experts) * 0.25


@define(
    "routing",
    catches="rsf_missing rsf_twice gate_bias_weights softplus_as_sigmoid renorm_missing",
    unique_for="the model's router as it is",
)
def deepseek_v4_flash(source: Source) -> Content:
    """DeepSeek-V4-Flash's router: 256 experts, a correction bias that changes the selection but not the
    weights, factor 1.5.
    """
    tensors = {"logits": _logits(source, 32, 256), "correction_bias": _bias(source, 256, 0.0)}
    return _routed("deepseek_v4", tensors, top_k=6, routed_scaling_factor=1.5, routed_scaling="in_weights")


@define(
    "routing",
    catches="rsf_missing rsf_twice softplus_as_sigmoid renorm_missing",
    unique_for="the model's router as it is",
)
def deepseek_v4_pro(source: Source) -> Content:
    """DeepSeek-V4-Pro's router: 384 experts, a correction bias, factor 2.5, bf16 logits."""
    tensors = {"logits": source.normal("logits", 16, 384), "correction_bias": _bias(source, 384, 0.0)}
    return _routed("deepseek_v4", tensors, top_k=6, routed_scaling_factor=2.5, routed_scaling="in_weights")


@define("routing", catches="tie_highest_id gate_bias_weights", unique_for="ties that only the bias makes")
def deepseek_v4_ties_on_the_bias_grid(source: Source) -> Content:
    """V4-Flash's biases are about 8.08, so that biased scores lie on a grid of 2^-20 and tie although the
    scores do not: the lowest id wins. Also ties of equal logits and biases.
    """
    logits = _logits(source, 32, 256)
    # Scores that differ by less than the grid: neighbouring float32 logits in pairs of experts.
    bits = logits.view(torch.int32)
    bits[:, 1::2] = bits[:, 0::2] + 1
    bias = 8.08 + (source.range("bias", 0, 7, 128).to(torch.float32) * 2.0**-10).repeat_interleave(2)
    logits[:4] = 1.0
    return _routed(
        "deepseek_v4",
        {"logits": logits, "correction_bias": bias},
        top_k=6,
        routed_scaling_factor=1.5,
        routed_scaling="in_weights",
    )


@define("routing", catches="rsf_missing renorm_missing softplus_as_sigmoid")
def deepseek_v4_hash_layer(source: Source) -> Content:
    """A hash layer of DeepSeek-V4-Flash, which its first three are: ids from a table by token id, weights
    from the scores in table order.
    """
    tensors = {
        "logits": _logits(source, 16, 256),
        "token_ids": source.range("token_ids", 0, 99, 16).to(torch.int32),
        "tid2eid": source.distinct("tid2eid", 100, 6, 256),
    }
    return _routed("deepseek_v4", tensors, top_k=6, routed_scaling_factor=1.5, routed_scaling="in_weights")


@define("routing", catches="rsf_missing")
def deepseek_v4_pro_hash_layer_padded(source: Source) -> Content:
    """A hash layer of DeepSeek-V4-Pro: ids from a table by token id, weights from the scores in table order,
    factor 2.5; padded rows get id -1 and weight 0.
    """
    padded = torch.arange(16) % 4 == 3
    tensors = {
        "logits": source.normal("logits", 16, 384),
        "token_ids": source.range("token_ids", 0, 49, 16).to(torch.int32),
        "tid2eid": source.distinct("tid2eid", 50, 6, 384),
        "padded": padded,
    }
    return _routed("deepseek_v4", tensors, top_k=6, routed_scaling_factor=2.5, routed_scaling="in_weights")


@define("routing", catches="softplus_as_sigmoid renorm_missing", unique_for="both ends of softplus")
def deepseek_v4_extreme_logits(source: Source) -> Content:
    """DeepSeek-V4's router with logits of large size: softplus is linear above 20 and nearly 0 far below;
    weights of one token differ by many orders. Some experts are masked with -inf.
    """
    logits = _logits(source, 16, 256) * 12.0
    logits[:, 10:20] = -torch.inf
    tensors = {"logits": logits, "correction_bias": _bias(source, 256, -0.5)}
    return _routed("deepseek_v4", tensors, top_k=6, routed_scaling_factor=1.5, routed_scaling="in_weights")


@define("routing", unique_for="placement of the factor, and padding")
def deepseek_v4_factor_on_output(source: Source) -> Content:
    """DeepSeek-V4's router where the routed scaling factor is left to the layer's output: weights without it.
    Padded rows have id -1 and weight 0.
    """
    tensors = {
        "logits": _logits(source, 16, 256),
        "correction_bias": _bias(source, 256, 0.0),
        "padded": torch.arange(16) >= 13,
    }
    return _routed(
        "deepseek_v4", tensors, top_k=6, routed_scaling_factor=1.5, routed_scaling="on_output_bf16"
    )


@define(
    "routing",
    catches="rsf_missing rsf_twice gate_bias_weights renorm_missing",
    unique_for="the model's router as it is",
)
def deepseek_v3_groups(source: Source) -> Content:
    """DeepSeek-V3's router: sigmoid scores, 8 groups of which 4 take part by the sum of their two best biased
    scores.
    """
    tensors = {"logits": _logits(source, 32, 256), "correction_bias": _bias(source, 256, 0.0)}
    return _routed(
        "deepseek_v3",
        tensors,
        top_k=8,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        routed_scaling="in_weights",
    )


@define("routing", catches="tie_highest_id", unique_for="ties between groups")
def deepseek_v3_tied_groups(source: Source) -> Content:
    """DeepSeek-V3 where whole groups tie, and the best expert of all lies in a group that does not take part."""
    logits = _logits(source, 16, 64)
    logits[:8] = logits[:8, :8].repeat(1, 8)  # all groups alike
    logits[8:, 5] = 9.0
    logits[8:, :5], logits[8:, 6:8] = -9.0, -9.0
    tensors = {"logits": logits, "correction_bias": torch.zeros(64)}
    return _routed(
        "deepseek_v3",
        tensors,
        top_k=4,
        n_group=8,
        topk_group=2,
        routed_scaling_factor=2.5,
        routed_scaling="in_weights",
    )


def _v3_with_negative_scores(source: Source, num_tokens: int, num_experts: int, **parameters: Any) -> Content:
    """All biased scores are negative; half of the tokens have scores around 1e-20."""
    logits = _logits(source, num_tokens, num_experts)
    logits[::2] -= 46.0
    bias = _bias(source, num_experts, -2.0)
    return _routed(
        "deepseek_v3",
        {"logits": logits, "correction_bias": bias},
        routed_scaling_factor=2.5,
        routed_scaling="in_weights",
        **parameters,
    )


@define("routing")
def deepseek_v3_negative_scores(source: Source) -> Content:
    """DeepSeek-V3 where all biased scores are negative, so that a 0 for groups that do not take part would
    win, and scores so small that the 1e-20 in the denominator counts.
    """
    return _v3_with_negative_scores(source, 16, 256, top_k=8, n_group=8, topk_group=4)


@define("routing")
def deepseek_v3_negative_scores_one_group(source: Source) -> Content:
    """DeepSeek-V3's router with 64 experts in four groups, of which only one takes part: all biased scores
    are negative, so that a 0 for groups that do not take part would win.
    """
    return _v3_with_negative_scores(source, 16, 64, top_k=4, n_group=4, topk_group=1)


@define("routing", catches="tie_highest_id renorm_missing")
def gpt_oss_bf16_ties(source: Source) -> Content:
    """gpt-oss's router: the four largest of 32 bf16 logits, many of them equal, where ties go to the lowest
    id; softmax over the four.
    """
    return _routed("gpt_oss", {"logits": (source.normal("logits", 64, 32) * 4).round() / 4}, top_k=4)


@define("routing", catches="renorm_missing")
def mixtral(source: Source) -> Content:
    """Mixtral's router: softmax over eight experts, the two best, divided by their sum."""
    return _routed("mixtral", {"logits": _logits(source, 64, 8)}, top_k=2)


@define("routing", catches="tie_highest_id", unique_for="ties of softmax scores")
def mixtral_ties(source: Source) -> Content:
    """Mixtral's router on logits that are all equal, or equal in pairs: ties go to the lowest id."""
    logits = _logits(source, 16, 8)
    logits[:, 4:] = logits[:, :4]
    logits[0] = 0.0
    return _routed("mixtral", {"logits": logits}, top_k=2)
