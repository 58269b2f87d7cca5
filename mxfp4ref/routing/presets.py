"""The routers of the published models, a function each: their records of `models.py`, run by `route`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref._compiler import uncompiled
from mxfp4ref._validate import check_ids, check_same_device, check_tensor
from mxfp4ref.routing.models import DEEPSEEK_V3, DEEPSEEK_V4, GPT_OSS, MIXTRAL, PRESETS
from mxfp4ref.routing.route import PADDING_ID, Gate, RoutedScaling, Routing, Tokens, route, routing_weights
from mxfp4ref.routing.selection import AMBIGUOUS_ULPS

__all__ = [
    "PADDING_ID",
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


@uncompiled
def deepseek_v4(
    logits: Tensor,
    correction_bias: Tensor | None = None,
    *,
    routed_scaling_factor: float,
    token_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    top_k: int = DEEPSEEK_V4.top_k,
    routed_scaling: RoutedScaling = RoutedScaling.IN_WEIGHTS,
    padded: Tensor | None = None,
    ambiguous_ulps: float = AMBIGUOUS_ULPS,
) -> Routing:
    """DeepSeek-V4: sqrt(softplus), top-k of score + bias without groups, unbiased scores over their sum.

    Args:
        logits: `[M, E]` float32 or bf16.
        correction_bias: `[E] float32`. The first three layers have none; they take
        token_ids, tid2eid: `[M]` and `[V, k]`, see `hash_experts`.
        routed_scaling_factor: of config.json: 1.5 in V4-Flash and V4.1-Flash, 2.5 in V4-Pro.
        top_k: k; 6 in all of them.
        routed_scaling: where the factor is applied; the weights contain it only with IN_WEIGHTS.
        padded: `[M] bool`, rows that are no tokens: id -1, scale 0, whatever their logits and token ids.
        ambiguous_ulps: see `select_experts`.

    Models that see images have a bias for these too, which `route` takes.

    Raises:
        TypeError, ValueError: as the three steps, and unless exactly one of bias and table is given.
    """
    if (token_ids is None) != (tid2eid is None) or (correction_bias is None) == (tid2eid is None):
        raise ValueError(
            "correction_bias, token_ids, tid2eid: expected either the bias or both of the others, got "
            f"{_given(correction_bias=correction_bias, token_ids=token_ids, tid2eid=tid2eid)}"
        )
    return route(
        replace(DEEPSEEK_V4, top_k=top_k, factor=routed_scaling_factor),
        logits,
        Gate(correction_bias, tid2eid=tid2eid),
        Tokens(padded, token_ids),
        routed_scaling=routed_scaling,
        ambiguous_ulps=ambiguous_ulps,
    )


@uncompiled
def deepseek_v3(
    logits: Tensor,
    correction_bias: Tensor,
    *,
    top_k: int = DEEPSEEK_V3.top_k,
    n_group: int = DEEPSEEK_V3.n_group,
    topk_group: int = DEEPSEEK_V3.topk_group,
    routed_scaling_factor: float = 2.5,
    routed_scaling: RoutedScaling = RoutedScaling.IN_WEIGHTS,
    padded: Tensor | None = None,
    ambiguous_ulps: float = AMBIGUOUS_ULPS,
) -> Routing:
    """DeepSeek-V3: sigmoid, bias, group-limited top-k, unbiased scores over (their sum + 1e-20).

    Arguments as for `deepseek_v4` and `select_experts`; the defaults are the published model's.
    """
    check_tensor("logits", logits, dtype=(torch.float32, torch.bfloat16), shape=("M", "E"))
    check_tensor("correction_bias", correction_bias, dtype=torch.float32, shape=(logits.shape[1],))
    return route(
        replace(
            DEEPSEEK_V3, top_k=top_k, n_group=n_group, topk_group=topk_group, factor=routed_scaling_factor
        ),
        logits,
        Gate(correction_bias),
        Tokens(padded),
        routed_scaling=routed_scaling,
        ambiguous_ulps=ambiguous_ulps,
    )


@uncompiled
def gpt_oss(
    logits: Tensor,
    *,
    top_k: int = GPT_OSS.top_k,
    padded: Tensor | None = None,
    ambiguous_ulps: float = AMBIGUOUS_ULPS,
) -> Routing:
    """gpt-oss: top-k of the logits, softmax over the k. Its bf16 logits may be passed as they are."""
    return route(
        replace(GPT_OSS, top_k=top_k),
        logits,
        tokens=Tokens(padded),
        routed_scaling=RoutedScaling.NONE,
        ambiguous_ulps=ambiguous_ulps,
    )


@uncompiled
def mixtral(
    logits: Tensor,
    *,
    top_k: int = MIXTRAL.top_k,
    padded: Tensor | None = None,
    ambiguous_ulps: float = AMBIGUOUS_ULPS,
) -> Routing:
    """Mixtral, Qwen and flashinfer's tests: softmax over all experts, top-k, over their sum."""
    return route(
        replace(MIXTRAL, top_k=top_k),
        logits,
        tokens=Tokens(padded),
        routed_scaling=RoutedScaling.NONE,
        ambiguous_ulps=ambiguous_ulps,
    )


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


def _given(**arguments: object) -> str:
    return ", ".join(name for name, value in arguments.items() if value is not None) or "none"
