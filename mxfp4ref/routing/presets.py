"""From router logits to expert ids and final scales, deterministic to the bit (docs/arithmetic.md, section 7).

Scores (`scoring.py`), then `select_experts` or `hash_experts`, then `routing_weights`: a preset is these three
in the combination of a published model. Everything is float32: one IEEE operation at a time, in a stated
order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._ieee import to_fp32, to_fp64
from mxfp4ref._shown import Shown
from mxfp4ref._validate import (
    check_choice,
    check_float,
    check_ids,
    check_int,
    check_same_device,
    check_tensor,
)
from mxfp4ref.routing.models import DEEPSEEK_V3, DEEPSEEK_V4, GPT_OSS, MIXTRAL, PRESETS, Preset
from mxfp4ref.routing.scoring import softmax
from mxfp4ref.routing.selection import AMBIGUOUS_ULPS, Selection, hash_experts, select_experts

__all__ = [
    "ROUTERS",
    "RoutedScaling",
    "Routing",
    "deepseek_v3",
    "deepseek_v4",
    "gpt_oss",
    "mixtral",
    "pack_top_k",
    "routing_weights",
    "unpack_top_k",
]

PADDING_ID = -1


class RoutedScaling(Enum):
    """Where `routed_scaling_factor` is applied; the roundings differ."""

    IN_WEIGHTS = "in_weights"
    """float32 weight times float32 factor, rounded, before the kernel. Right, and the default."""
    ON_OUTPUT_BF16 = "on_output_bf16"
    """The kernel's bf16 output times the factor, to float32, to bf16; a shared expert is added afterwards."""
    FUSED_WITH_SHARED_ADD_BF16 = "fused_with_shared_add_bf16"
    """shared + factor * output as one float32 FMA, to bf16."""
    NONE = "none"
    """Not applied at all."""


@dataclass(frozen=True, eq=False, repr=False)
class Routing(Shown):
    """What a router decides, ready for the kernel.

    Attributes:
        ids: `[M, k] int32` global expert ids by descending selection score; -1 in padded rows.
        scales: `[M, k] float32` final scales; 0 in padded rows.
        ambiguous: `[M] bool`, tokens whose ids or their order hang on less than the ulps asked for.
        routed_scaling: where the factor belongs. Only with IN_WEIGHTS do `scales` contain it.
        routed_scaling_factor: the factor; 1 for models without one.
    """

    ids: Tensor
    scales: Tensor
    ambiguous: Tensor
    routed_scaling: RoutedScaling = RoutedScaling.NONE
    routed_scaling_factor: float = 1.0


@uncompiled
def routing_weights(
    scores: Tensor, ids: Tensor, *, normalize: str, epsilon: float = 0.0, factor: float = 1.0
) -> Tensor:
    """The final scales `[M, k] float32` of the selected experts, from their unbiased scores.

    Args:
        scores: `[M, E] float32`.
        ids: `[M, k] int32`, in range.
        normalize: "sum" divides each score by (s_0 + s_1 + ... + s_(k-1)) + epsilon, added in slot order;
            "softmax" takes the softmax of the k scores, correctly rounded; "none" leaves them.
        epsilon: rounded to float32; 0 or, in DeepSeek-V3, 1e-20.
        factor: rounded to float32; multiplied in last. Each operation is rounded to float32 once.

    Raises:
        ValueError: an id out of range, no ids, or a sum of zero.
    """
    check_tensor("scores", scores, dtype=torch.float32, shape=("M", "E"))
    check_tensor("ids", ids, dtype=torch.int32, shape=("M", "k"), sizes={"M": len(scores)})
    check_same_device({"scores": scores, "ids": ids})
    check_choice("normalize", normalize, ("sum", "softmax", "none"))
    epsilon = check_float("epsilon", epsilon, minimum=0.0)
    factor = check_float("factor", factor)
    if ids.shape[1] == 0:
        raise ValueError(f"ids: expected at least one expert a token, got {list(ids.shape)}")
    check_ids("ids", ids, maximum=scores.shape[1] - 1)
    weights = scores.detach().gather(1, ids.long())
    if normalize == "softmax":
        weights = softmax(weights)
    elif normalize == "sum":
        weights = to_fp64(weights)
        total = weights[:, 0]
        for addend in (*weights.unbind(1)[1:], to_fp64(_float32(epsilon, like=scores))):
            total = to_fp64(to_fp32(total + addend))
        if bool((total == 0).any()):
            row = int((total == 0).nonzero()[0, 0])
            raise ValueError(f"scores: expected a sum other than 0 to divide by, got 0 in row {row}")
        weights = to_fp32(weights / total[:, None])
    return to_fp32(to_fp64(weights) * to_fp64(_float32(factor, like=weights)))


@uncompiled
def deepseek_v4(
    logits: Tensor,
    correction_bias: Tensor | None = None,
    *,
    token_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    top_k: int = DEEPSEEK_V4.top_k,
    routed_scaling_factor: float | None = None,
    routed_scaling: RoutedScaling = RoutedScaling.IN_WEIGHTS,
    padded: Tensor | None = None,
    ambiguous_ulps: float = AMBIGUOUS_ULPS,
) -> Routing:
    """DeepSeek-V4: sqrt(softplus), top-k of score + bias without groups, unbiased scores over their sum.

    Args:
        logits: `[M, E]` float32 or bf16.
        correction_bias: `[E] float32`. The first three layers have none; they take
        token_ids, tid2eid: `[M]` and `[V, k]`, see `hash_experts`.
        top_k: k; 6 in both models.
        routed_scaling_factor: by default that of the model with this E: 1.5 for V4-Flash (256), 2.5 for
            V4-Pro (384). For any other E it has to be given.
        routed_scaling: where the factor is applied; the weights contain it only with IN_WEIGHTS.
        padded: `[M] bool`, rows that are no tokens: id -1, scale 0, whatever their logits and token ids.
        ambiguous_ulps: see `select_experts`.

    Raises:
        TypeError, ValueError: as the three steps, and unless exactly one of bias and table is given.
    """
    scores, padded = _scores(DEEPSEEK_V4, logits, padded)
    num_experts = scores.shape[1]
    if routed_scaling_factor is None:
        routed_scaling_factor = DEEPSEEK_V4.factors.get(num_experts)
        if routed_scaling_factor is None:
            sizes = " or ".join(map(str, DEEPSEEK_V4.factors))
            raise ValueError(
                f"routed_scaling_factor: expected a number unless E is {sizes}, got None with E={num_experts}"
            )
    if (token_ids is None) != (tid2eid is None) or (correction_bias is None) == (tid2eid is None):
        raise ValueError(
            "correction_bias, token_ids, tid2eid: expected either the bias or both of the others, got "
            f"{_given(correction_bias=correction_bias, token_ids=token_ids, tid2eid=tid2eid)}"
        )
    if tid2eid is not None:
        check_float("ambiguous_ulps", ambiguous_ulps, minimum=0.0)
        check_int("top_k", top_k, minimum=1, maximum=num_experts)
        check_tensor("tid2eid", tid2eid, dtype=(torch.int32, torch.int64), shape=("V", top_k))
        check_tensor("token_ids", token_ids, dtype=(torch.int32, torch.int64), shape=(len(scores),))
        check_same_device({"logits": logits, "token_ids": token_ids, "tid2eid": tid2eid})
        assert token_ids is not None
        ids = torch.arange(top_k, dtype=torch.int32, device=logits.device).repeat(len(logits), 1)
        ids[~padded] = hash_experts(token_ids[~padded], tid2eid, num_experts=num_experts)
        selection = Selection(ids, torch.zeros_like(padded))
    else:
        selection = select_experts(
            scores, top_k, correction_bias=correction_bias, ambiguous_ulps=ambiguous_ulps
        )
    return _finish(DEEPSEEK_V4, scores, selection, padded, routed_scaling, routed_scaling_factor)


@uncompiled
def deepseek_v3(
    logits: Tensor,
    correction_bias: Tensor,
    *,
    top_k: int = DEEPSEEK_V3.top_k,
    n_group: int = DEEPSEEK_V3.n_group,
    topk_group: int = DEEPSEEK_V3.topk_group,
    routed_scaling_factor: float = DEEPSEEK_V3.factor,
    routed_scaling: RoutedScaling = RoutedScaling.IN_WEIGHTS,
    padded: Tensor | None = None,
    ambiguous_ulps: float = AMBIGUOUS_ULPS,
) -> Routing:
    """DeepSeek-V3: sigmoid, bias, group-limited top-k, unbiased scores over (their sum + 1e-20).

    Arguments as for `deepseek_v4` and `select_experts`; the defaults are the published model's.
    """
    scores, padded = _scores(DEEPSEEK_V3, logits, padded)
    check_tensor("correction_bias", correction_bias, dtype=torch.float32, shape=(scores.shape[1],))
    selection = select_experts(
        scores,
        top_k,
        correction_bias=correction_bias,
        n_group=n_group,
        topk_group=topk_group,
        ambiguous_ulps=ambiguous_ulps,
    )
    return _finish(DEEPSEEK_V3, scores, selection, padded, routed_scaling, routed_scaling_factor)


@uncompiled
def gpt_oss(
    logits: Tensor,
    *,
    top_k: int = GPT_OSS.top_k,
    padded: Tensor | None = None,
    ambiguous_ulps: float = AMBIGUOUS_ULPS,
) -> Routing:
    """gpt-oss: top-k of the logits, softmax over the k. Its bf16 logits may be passed as they are."""
    scores, padded = _scores(GPT_OSS, logits, padded)
    selection = select_experts(scores, top_k, ambiguous_ulps=ambiguous_ulps)
    return _finish(GPT_OSS, scores, selection, padded)


@uncompiled
def mixtral(
    logits: Tensor,
    *,
    top_k: int = MIXTRAL.top_k,
    padded: Tensor | None = None,
    ambiguous_ulps: float = AMBIGUOUS_ULPS,
) -> Routing:
    """Mixtral, Qwen and flashinfer's tests: softmax over all experts, top-k, over their sum."""
    scores, padded = _scores(MIXTRAL, logits, padded)
    selection = select_experts(scores, top_k, ambiguous_ulps=ambiguous_ulps)
    return _finish(MIXTRAL, scores, selection, padded)


# The functions above by their names, which are those of their records.
ROUTERS: dict[str, Callable[..., Routing]] = {name: globals()[name] for name in PRESETS}


@uncompiled
def pack_top_k(ids: Tensor, scales: Tensor) -> Tensor:
    """Other kernels' one-word form: int32 `id << 16 | bits(bf16(scale))`, both arguments `[M, k]`.

    The scale is rounded to bf16, nearest even: the form holds no more. Id -1 fills the upper half with ones.

    Raises:
        ValueError: an id outside [-1, 32767], or a NaN scale.
    """
    check_tensor("ids", ids, dtype=torch.int32, shape=("M", "k"))
    check_tensor("scales", scales, dtype=torch.float32, shape=tuple(ids.shape))
    check_same_device({"ids": ids, "scales": scales})
    check_ids("ids", ids, minimum=PADDING_ID, maximum=32767)
    if bool(torch.isnan(scales).any()):
        raise ValueError(f"scales: expected no NaN, got one at {torch.isnan(scales).nonzero()[0].tolist()}")
    bits = scales.detach().to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    return (ids << 16) | bits


@uncompiled
def unpack_top_k(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The `ids` int32 and `scales` float32 (bf16 values) of `pack_top_k`'s `[M, k] int32`."""
    check_tensor("packed", packed, dtype=torch.int32, shape=("M", "k"))
    return packed >> 16, (packed << 16).view(torch.float32)


def _scores(preset: Preset, logits: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scores, those of padded rows from logits of zero, and the mask of padded rows."""
    check_tensor("logits", logits, dtype=(torch.float32, torch.bfloat16), shape=("M", "E"))
    if padded is None:
        return preset.score(logits), torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    check_tensor("padded", padded, dtype=torch.bool, shape=(len(logits),))
    check_same_device({"logits": logits, "padded": padded})
    return preset.score(logits.masked_fill(padded[:, None], 0.0)), padded


def _finish(
    preset: Preset,
    scores: Tensor,
    selection: Selection,
    padded: Tensor,
    routed_scaling: RoutedScaling = RoutedScaling.NONE,
    factor: float = 1.0,
) -> Routing:
    check_choice("routed_scaling", routed_scaling, tuple(RoutedScaling))
    factor = check_float("routed_scaling_factor", factor)
    scales = routing_weights(
        scores,
        selection.ids,
        normalize=preset.normalize,
        epsilon=preset.epsilon,
        factor=factor if routed_scaling is RoutedScaling.IN_WEIGHTS else 1.0,
    )
    return Routing(
        selection.ids.masked_fill(padded[:, None], PADDING_ID),
        scales.masked_fill(padded[:, None], 0.0),
        selection.ambiguous & ~padded,
        routed_scaling,
        factor,
    )


def _float32(value: float, *, like: Tensor) -> Tensor:
    # A tensor, not a Python scalar: torch divides and multiplies by scalars in its own ways.
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def _given(**arguments: object) -> str:
    return ", ".join(name for name, value in arguments.items() if value is not None) or "none"
