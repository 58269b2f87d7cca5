"""Wrong routers: in this package's operations, and in plain torch as most are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.routing.models import PRESETS
from tests.held_out_kernels.by_hand import right_routing
from tests.held_out_kernels.definition import wrong

Routed = dict[str, Tensor]
WEIGHTS = "weight|scale"


def _times(routed: Routed, factor: float | Tensor) -> Routed:
    return {"ids": routed["ids"], "scales": routed["scales"] * factor}


def in_torch(inputs: dict[str, Any], **changes: Callable[..., Tensor]) -> Routed:
    """A router in float64, rounded once. `changes` replace scores(logits), biased(scores, bias), keys(biased),
    weights(scores, ids, biased) and the normalised weights `final(weights)`."""
    preset, logits = PRESETS[inputs["preset"]], inputs["logits"].double()
    softplus = torch.nn.functional.softplus
    by_name: dict[str, Callable[[Tensor], Tensor]] = {
        "deepseek_v4": lambda x: softplus(x).sqrt(),
        "deepseek_v3": torch.sigmoid,
        "gpt_oss": lambda x: x,
        "mixtral": lambda x: x.softmax(1),
    }
    padded = inputs.get("padded", torch.zeros(len(logits), dtype=torch.bool))
    logits = logits.masked_fill(padded[:, None], 0.0)
    scores = changes.get("scores", by_name[preset.name])(logits).float()
    bias, top_k = inputs.get("correction_bias"), inputs["top_k"]
    biased = scores if bias is None else scores + bias
    keys = changes["keys"](biased) if "keys" in changes else _grouped(biased, inputs)
    if "tid2eid" in inputs:
        ids = inputs["tid2eid"][inputs["token_ids"].long().masked_fill(padded, 0)].long()
    else:
        ids = keys.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    taken = changes["taken"](scores, ids, biased) if "taken" in changes else scores.gather(1, ids)
    taken = taken.double()
    normalised = (
        taken.softmax(1)
        if preset.normalize == "softmax"
        else taken / (taken.sum(1, keepdim=True) + preset.epsilon)
    )
    weights = changes["final"](normalised) if "final" in changes else normalised
    if inputs.get("routed_scaling") == "in_weights":
        weights = weights.float().double() * inputs["routed_scaling_factor"]
    return {
        "ids": ids.int().masked_fill(padded[:, None], -1),
        "scales": weights.float().masked_fill(padded[:, None], 0.0),
    }


def _grouped(biased: Tensor, inputs: dict[str, Any], shift: int = 0) -> Tensor:
    groups = inputs.get("n_group", 1)
    if groups == 1:
        return biased
    by_group = biased.unflatten(1, (groups, -1))
    best = by_group.topk(2, 2).values.sum(2).sort(dim=1, descending=True, stable=True).indices
    kept = torch.zeros(by_group.shape[:2], dtype=torch.bool)
    kept.scatter_(1, (best[:, : inputs["topk_group"]] + shift) % groups, True)
    return by_group.masked_fill(~kept[..., None], -torch.inf).flatten(1)


@wrong(
    kind="routing",
    stage="routing",
    says=("softmax", "twice|two|double|again|second"),
    story="softmax of a softmax",
)
def softmax_twice(**inputs: Any) -> Routed:
    twice = dict(inputs)
    if inputs["preset"] in ("mixtral", "gpt_oss"):
        twice["logits"] = inputs["logits"].float().softmax(1)
    return right_routing(twice)


@wrong(
    kind="routing",
    stage="routing",
    says=(WEIGHTS, "1\\.66\\d*|5/3|factor|uniform|constant"),
    story="the weights of the model with factor 2.5 for one with 1.5: all 1.667 times too large",
)
def weights_five_thirds(**inputs: Any) -> Routed:
    return _times(right_routing(inputs), 2.5 / 1.5)


@wrong(
    kind="routing",
    stage="routing",
    says=("tie|equal", "high|last|descend|larger|largest"),
    story="a sort from below breaks ties to the higher id",
)
def ties_to_the_higher_id(**inputs: Any) -> Routed:
    if "tid2eid" in inputs:
        return right_routing(inputs)
    count, mirrored = inputs["logits"].shape[1], dict(inputs)
    mirrored["logits"] = inputs["logits"].flip(1)
    if "correction_bias" in inputs:
        mirrored["correction_bias"] = inputs["correction_bias"].flip(0)
    routed = right_routing(mirrored)
    ids = torch.where(routed["ids"] < 0, -1, count - 1 - routed["ids"])
    return {"ids": ids, "scales": routed["scales"]}


@wrong(
    kind="routing",
    mode="bounded",
    stage="routing",
    says=("bias", WEIGHTS + "|score"),
    story="the correction bias gets into the weights",
)
def bias_in_the_weights(**inputs: Any) -> Routed:
    return in_torch(inputs, taken=lambda scores, ids, biased: biased.gather(1, ids))


@wrong(
    kind="routing",
    mode="bounded",
    stage="routing",
    says=("normali|divided|sum",),
    story="the chosen scores are not divided by their sum",
)
def not_renormalised(**inputs: Any) -> Routed:
    if inputs["preset"] == "gpt_oss":
        return in_torch(inputs)
    sums: list[Tensor] = []

    def taken(scores: Tensor, ids: Tensor, biased: Tensor) -> Tensor:
        sums.append(scores.gather(1, ids).double())
        return sums[0]

    return in_torch(inputs, taken=taken, final=lambda weights: sums[0])


@wrong(
    kind="routing",
    mode="bounded",
    stage="routing",
    says=("normali|softmax|divided|sum", "all|every"),
    story="weights over the sum of all experts' scores, not of the chosen ones",
)
def normalised_over_all_experts(**inputs: Any) -> Routed:
    held: list[Tensor] = []

    def taken(scores: Tensor, ids: Tensor, biased: Tensor) -> Tensor:
        whole = scores.double()
        whole = whole.softmax(1) if inputs["preset"] == "gpt_oss" else whole / whole.sum(1, keepdim=True)
        held.append(whole.gather(1, ids))
        return scores.gather(1, ids)

    return in_torch(inputs, taken=taken, final=lambda weights: held[0])


@wrong(
    kind="routing",
    mode="bounded",
    stage="routing",
    says=("group", "shift|next|off by one|another|wrong|neighbou?r|other|one too"),
    story="the chosen groups are off by one",
)
def groups_off_by_one(**inputs: Any) -> Routed:
    return in_torch(inputs, keys=lambda biased: _grouped(biased, inputs, shift=1))


@wrong(
    kind="routing",
    mode="bounded",
    stage="routing",
    says=("softmax|sigmoid|softplus|score", "softmax|instead|exchang|where"),
    story="softmax scores where sigmoid or softplus is meant, and sigmoid where softmax is",
)
def softmax_and_sigmoid_exchanged(**inputs: Any) -> Routed:
    other = torch.sigmoid if inputs["preset"] == "mixtral" else (lambda x: x.softmax(1))
    return in_torch(inputs) if inputs["preset"] == "gpt_oss" else in_torch(inputs, scores=other)


@wrong(
    kind="routing",
    mode="bounded",
    stage="routing",
    says=("softplus|sqrt|square root|score", "sqrt|square|root|without|instead|softplus"),
    story="softplus without its square root",
)
def softplus_without_the_root(**inputs: Any) -> Routed:
    if inputs["preset"] != "deepseek_v4":
        return in_torch(inputs)
    return in_torch(inputs, scores=torch.nn.functional.softplus)


@wrong(
    kind="routing",
    stage="routing",
    says=("factor|scal", "before|normali|lost|missing|cancel|not applied|left out|1/|0\\.4|0\\.66"),
    story="the scaling factor is applied before the normalisation, which takes it away again",
)
def factor_before_normalisation(**inputs: Any) -> Routed:
    if inputs.get("routed_scaling") != "in_weights":
        return right_routing(inputs)
    return right_routing({**inputs, "routed_scaling": "none"})


@wrong(
    kind="routing",
    stage="routing",
    says=("\\bids?\\b|order|sort|slot", "order|sort|ascend|permut"),
    story="ids are sorted ascending, the weights stay in the order of the scores",
)
def ids_sorted_weights_not(**inputs: Any) -> Routed:
    routed = right_routing(inputs)
    return {"ids": routed["ids"].sort(1).values, "scales": routed["scales"]}


@wrong(
    kind="routing",
    stage="routing",
    says=("factor|scal", "twice|again|two times|squared|once more", "2\\.5|1\\.5|factor"),
    story="the routed scaling factor is applied by the router and by what calls it",
)
def factor_applied_twice(**inputs: Any) -> Routed:
    scaled = inputs.get("routed_scaling") == "in_weights"
    return _times(right_routing(inputs), inputs["routed_scaling_factor"] if scaled else 1.0)


@wrong(
    kind="routing",
    mode="bounded",
    stage="routing",
    says=("bias", "ignored|missing|without|left out|not|choice|chosen|select|ids"),
    story="experts are chosen without the correction bias",
)
def chosen_without_the_bias(**inputs: Any) -> Routed:
    return in_torch({name: value for name, value in inputs.items() if name != "correction_bias"})


@wrong(
    kind="routing",
    mode="bounded",
    stage="routing",
    says=("group", "max|best|top|sum|two|one|score|wrong|other"),
    story="groups are ranked by their best expert instead of the sum of their two best",
)
def groups_by_their_best_expert(**inputs: Any) -> Routed:
    def keys(biased: Tensor) -> Tensor:
        groups = inputs.get("n_group", 1)
        if groups == 1:
            return biased
        by_group = biased.unflatten(1, (groups, -1))
        best = by_group.amax(2).sort(dim=1, descending=True, stable=True).indices[:, : inputs["topk_group"]]
        kept = torch.zeros(by_group.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        return by_group.masked_fill(~kept[..., None], -torch.inf).flatten(1)

    return in_torch(inputs, keys=keys)


@wrong(
    kind="routing",
    mode="bounded",
    stage="routing",
    says=("round|bf16|bfloat16|precis", "score|weight|logit|bf16"),
    story="scores are kept as bf16",
)
def scores_in_bf16(**inputs: Any) -> Routed:
    def taken(scores: Tensor, ids: Tensor, biased: Tensor) -> Tensor:
        return scores.bfloat16().float().gather(1, ids)

    return in_torch(inputs, taken=taken)
