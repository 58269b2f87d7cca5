"""What an output that is right does not show, since nothing in its call depends on it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mxfp4ref._choices import RouterName
from mxfp4ref.checkpoint.layer import CheckpointLayer, ExpertsInFiles
from mxfp4ref.checkpoint.run import layer_call, route_input
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import trace

__all__ = ["owned", "shown", "shown_by_layer", "unshown"]

_LOOKED_AT = 64  # tokens
_AT_ONCE = 16  # experts of a layer in files that are in memory together
_OF = f"of this rank's slots (of {_LOOKED_AT} tokens at most)"
_WORDS = {
    "limit": f"No up or gate value {_OF} reaches swiglu_limit: this does not show whether the kernel applies it.",
    "weights": f"No routing weight {_OF} differs from another: this does not show which slot gets which.",
    "experts": f"All slots {_OF} have one expert: this does not show whether each slot takes its own.",
    "fc1_biases": f"No fc1 bias {_OF} is other than zero: this does not show whether the kernel adds it.",
    "fc2_biases": f"No fc2 bias {_OF} is other than zero: this does not show whether the kernel adds it.",
}


def unshown(found: Collection[Mapping[str, bool]]) -> list[str]:
    """A sentence for each thing that some calls have and none shows; `found` is of each call, as `shown` gives it."""
    missing = {name for one in found for name in one} - {name for one in found for name in one if one[name]}
    return [words for name, words in _WORDS.items() if name in missing]


def shown(call: MoeCall, known: Collection[str] = ()) -> dict[str, bool]:
    """By name, whether a right output of a call shows that a thing it has is done as it ought to be.

    Args:
        call: whose first 64 tokens are looked at.
        known: names that need no look any more.

    Returns:
        "limit", "weights", "experts", "fc1_biases" and "fc2_biases", of what the call has; nothing if it has no slot
        to compute.
    """
    call = call.select(slice(_LOOKED_AT))
    here = owned(call)
    if not bool(here.any()):
        return {}
    weights, ids = call.token_final_scales[here], call.token_selected_experts[here]
    found = {"weights": bool((weights != weights[0]).any()), "experts": bool((ids != ids[0]).any())}
    for name in ("fc1_biases", "fc2_biases"):
        if (biases := getattr(call.experts, name)) is not None:
            found[name] = bool((biases[(ids - call.ep_rank * call.experts.num_experts).long()] != 0).any())
    if "limit" not in known and (reached := _reaches_limit(call)) is not None:
        found["limit"] = reached
    return {name: value for name, value in found.items() if name not in known}


def owned(call: MoeCall) -> Tensor:
    """`[M, k] bool`: the slots whose expert this rank has."""
    first = call.ep_rank * call.experts.num_experts
    ids = call.token_selected_experts
    return (ids >= first) & (ids < first + call.experts.num_experts)


def shown_by_layer(
    layer: CheckpointLayer, given: Mapping[str, Tensor], router: RouterName | None = None
) -> dict[str, bool]:
    """As `shown`, for a layer's input as `read_input` gives it; of experts in files, some are read at a time."""
    found: dict[str, bool] = {}
    given = {name: tensor[:_LOOKED_AT] for name, tensor in given.items()}
    several: dict[str, set[float | int]] = {"weights": set(), "experts": set()}
    for part in _parts(layer, given, router):
        call = layer_call(part, given, router=router)
        here = owned(call)
        several["weights"].update(call.token_final_scales[here].tolist())
        if bool(here.any()):
            several["experts"].add((part.expert_ids or (0,))[0])
        for name, value in shown(call, [name for name in found if found[name]]).items():
            found[name] = value or found.get(name, False)
    for name, values in several.items():
        if name in found:
            found[name] = found[name] or len(values) > 1
    return found


def _parts(
    layer: CheckpointLayer, given: Mapping[str, Tensor], router: RouterName | None
) -> Iterator[CheckpointLayer]:
    """The layer, or one with some of the experts that its tokens have, and another with others, ..."""
    if layer.fused or not isinstance(layer.experts, ExpertsInFiles):
        yield layer
        return
    ids = set(route_input(layer, given, router)[1].ids.flatten().tolist())
    have = layer.expert_ids or tuple(range(layer.num_experts))
    used = [n for n, expert in enumerate(have) if expert in ids]
    for first in range(0, len(used), _AT_ONCE):
        index = used[first : first + _AT_ONCE]
        experts = layer.experts.select(torch.tensor(index, dtype=torch.int64, device="cpu"))
        yield replace(layer, experts=experts, expert_ids=tuple(have[n] for n in index))


def _reaches_limit(call: MoeCall) -> bool | None:
    """Whether an up or gate value reaches `swiglu_limit`; None without a limit."""
    experts = call.experts
    limits = experts.swiglu_limit
    if limits is None or not experts.tactics_show or not bool(limits.isfinite().any()):
        return None
    rows = trace(call)
    up, gate = rows.fc1_output.to(torch.float32).chunk(2, dim=1)
    if experts.fc1_biases is not None:
        biases = experts.fc1_biases[rows.expert].to(torch.float32).chunk(2, dim=1)
        up, gate = up + biases[0], gate + biases[1]
    limit = limits[rows.expert][:, None]
    return bool(((up.abs() >= limit) | (gate >= limit)).any())
