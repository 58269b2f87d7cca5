"""From logits to expert ids and final scales, by the record of a router.

Scores (`scoring.py`), then `select_experts` or `hash_experts`, then `routing_weights`: a router is these three in the
combination that its `Preset` names. Everything is float32: one IEEE operation at a time, in a stated order
(docs/arithmetic.md, section 7).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from mxfp4ref._choices import NORMALIZE, Normalize
from mxfp4ref._compiler import uncompiled
from mxfp4ref._ieee import to_fp32, to_fp64
from mxfp4ref._shown import Shown
from mxfp4ref._validate import (
    check_choice,
    check_float,
    check_ids,
    check_instance,
    check_int,
    check_same_device,
    check_tensor,
)
from mxfp4ref.routing.models import Preset
from mxfp4ref.routing.scoring import softmax
from mxfp4ref.routing.selection import AMBIGUOUS_ULPS, Selection, hash_experts, select_experts

__all__ = ["PADDING_ID", "Gate", "RoutedScaling", "Routing", "Tokens", "route", "routing_weights"]

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
    scores: Tensor, ids: Tensor, *, normalize: Normalize, epsilon: float = 0.0, factor: float = 1.0
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
    check_choice("normalize", normalize, NORMALIZE)
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


@dataclass(frozen=True, eq=False)
class Gate:
    """What a layer's router has besides its weights.

    Attributes:
        correction_bias: `[E] float32`, part of the selection only.
        image_bias: `[E] float32`, takes its place (and that of the table) for tokens of an image.
        tid2eid: `[V, k]`, the experts of each token id, which takes the place of the selection; see `hash_experts`.
    """

    correction_bias: Tensor | None = None
    image_bias: Tensor | None = None
    tid2eid: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a router is told of the M tokens besides their logits.

    Attributes:
        padded: `[M] bool`, rows that are no tokens: id -1, scale 0, whatever their logits and token ids.
        token_ids: `[M]` int32 or int64, for the table.
        image_mask: `[M] bool`, the tokens of images.
    """

    padded: Tensor | None = None
    token_ids: Tensor | None = None
    image_mask: Tensor | None = None


_NO_GATE, _NO_TOKENS = Gate(), Tokens()


@uncompiled
def route(
    preset: Preset,
    logits: Tensor,
    gate: Gate = _NO_GATE,
    tokens: Tokens = _NO_TOKENS,
    *,
    routed_scaling: RoutedScaling = RoutedScaling.IN_WEIGHTS,
    ambiguous_ulps: float = AMBIGUOUS_ULPS,
) -> Routing:
    """Route tokens as the record of a router says; `replace(DEEPSEEK_V4, normalize="none")` is another router.

    Args:
        preset: the router, all of whose fields count; `factor` must be a number.
        logits: `[M, E]` float32 or bf16. With a temperature other than 1 they are divided by it in float32.
        gate, tokens: what else decides. A bias for images counts where `image_mask` is true.
        routed_scaling: where the factor is applied; the weights contain it only with IN_WEIGHTS.
        ambiguous_ulps: see `select_experts`.

    Raises:
        TypeError, ValueError: as the three steps; or a table without token ids, or images without a bias for them.
    """
    check_instance("preset", preset, Preset)
    check_instance("gate", gate, Gate)
    check_instance("tokens", tokens, Tokens)
    if preset.factor is None:
        raise ValueError(
            f"routed_scaling_factor: expected a number in preset.factor, got None: the models of {preset.name} differ"
        )
    scores, padded = _scores(preset, logits, tokens.padded)
    images = _images(gate, tokens, padded)

    def select(bias: Tensor | None) -> Selection:
        return select_experts(
            scores,
            preset.top_k,
            correction_bias=bias,
            n_group=preset.n_group,
            topk_group=preset.topk_group,
            ambiguous_ulps=ambiguous_ulps,
        )

    if gate.tid2eid is None:
        selection = select(gate.correction_bias)
    else:
        check_float("ambiguous_ulps", ambiguous_ulps, minimum=0.0)
        selection = _from_table(gate.tid2eid, tokens.token_ids, scores, preset.top_k, padded | images)
    if bool(images.any()):
        of_images = select(gate.image_bias)
        ids = torch.where(images[:, None], of_images.ids, selection.ids)
        selection = Selection(ids, torch.where(images, of_images.ambiguous, selection.ambiguous))
    return _finish(preset, scores, selection, padded, routed_scaling)


def _images(gate: Gate, tokens: Tokens, padded: Tensor) -> Tensor:
    if tokens.image_mask is None:
        return torch.zeros_like(padded)
    check_tensor("image_mask", tokens.image_mask, dtype=torch.bool, shape=tuple(padded.shape))
    check_same_device({"logits": padded, "image_mask": tokens.image_mask})
    images = tokens.image_mask & ~padded
    if gate.image_bias is None and bool(images.any()):
        raise ValueError(
            "image_bias: expected a bias for the tokens of images that image_mask names, got None"
        )
    return images


def _from_table(
    table: Tensor, token_ids: Tensor | None, scores: Tensor, top_k: int, skipped: Tensor
) -> Selection:
    """The experts of the token ids; where a row is skipped, the first ones, which nobody looks at."""
    check_int("top_k", top_k, minimum=1, maximum=scores.shape[1])
    check_tensor("tid2eid", table, dtype=(torch.int32, torch.int64), shape=("V", top_k))
    check_tensor("token_ids", token_ids, dtype=(torch.int32, torch.int64), shape=(len(scores),))
    check_same_device({"logits": scores, "token_ids": token_ids, "tid2eid": table})
    assert token_ids is not None
    ids = torch.arange(top_k, dtype=torch.int32, device=scores.device).repeat(len(scores), 1)
    ids[~skipped] = hash_experts(token_ids[~skipped], table, num_experts=scores.shape[1])
    return Selection(ids, torch.zeros_like(skipped))


def _scores(preset: Preset, logits: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scores, those of padded rows from logits of zero, and the mask of padded rows."""
    check_tensor("logits", logits, dtype=(torch.float32, torch.bfloat16), shape=("M", "E"))
    if check_float("temperature", preset.temperature) <= 0:
        raise ValueError(f"temperature: expected a positive number, got {preset.temperature}")
    if preset.temperature != 1.0:
        logits = to_fp32(
            to_fp64(logits.detach().to(torch.float32)) / to_fp64(_float32(preset.temperature, like=logits))
        )
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
    routed_scaling: RoutedScaling,
) -> Routing:
    check_choice("routed_scaling", routed_scaling, tuple(RoutedScaling))
    factor = check_float("routed_scaling_factor", preset.factor)
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
