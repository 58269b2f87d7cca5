"""A server's routing for a checkpoint's layer, held against the router's, and the rule of what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mxfp4ref._choices import RouterName
from mxfp4ref._validate import check_tensor
from mxfp4ref.checkpoint.layer import CheckpointLayer
from mxfp4ref.checkpoint.router import gate_of, router_to_run
from mxfp4ref.checkpoint.run import ROUTING, route_input
from mxfp4ref.conformance.bounds.router_bounds import routing_outside
from mxfp4ref.conformance.comparison import differing, in_words, ulp_distance
from mxfp4ref.conformance.findings.finding import counted
from mxfp4ref.conformance.routers.routing_hypotheses import near
from mxfp4ref.conformance.routers.routing_words import routing_finding
from mxfp4ref.routing.route import PADDING_ID

__all__ = ["check_routing", "from_local_ids", "no_experts", "same"]

_ROUNDINGS = 8  # ulp, within which weights of the right ids tell only how the router's logits were rounded


def same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    whole = not one.is_floating_point()
    return torch.equal(one.long(), other.long()) if whole else not bool(differing(one, other).any())


def check_routing(
    layer: CheckpointLayer,
    given: Mapping[str, Tensor],
    served: Mapping[str, Tensor],
    result: Mapping[str, Tensor],
    router: RouterName | None,
    tell: Callable[[str], None],
) -> str:
    """What is wrong with the ids and weights that were served; "" if nothing is. A line of each is told."""
    expected: dict[str, Tensor] = {}
    for name in ROUTING:
        if name not in served:
            continue
        expected[name] = result[name]
        if layer.fused and served[name].shape[1:] == (result[name].shape[1] - layer.fused,):
            expected[name] = result[name][:, : -layer.fused]  # without the slots of the shared expert
        dtype = (torch.int32, torch.int64) if name == ROUTING[0] else torch.float32
        check_tensor(name, served[name], dtype=dtype, shape=tuple(expected[name].shape))
    if said := no_experts(served.get(ROUTING[0]), layer):
        tell(f"{ROUTING[0]}: {said}")
        return said
    got = {name: served[name].to(expected[name].dtype) for name in expected}
    for name in expected:
        tell(f"{name}: {in_words(got[name], expected[name])}")
    if all(same(got[name], expected[name]) for name in expected):
        return ""
    ids, weights = (got.get(name, result[name]) for name in ROUTING)
    if torch.equal(ids, expected.get(ROUTING[0], ids)) and ROUTING[1] in expected:
        most = int(ulp_distance(weights, expected[ROUTING[1]]).max())
        if most <= _ROUNDINGS:
            tell(f"the router is right: weights up to {most} ulp off are roundings")
            return ""
        right, wrong = _of_own_slots(layer, ids, weights, expected[ROUTING[1]])
        if right:
            tell(right)
        if right or wrong:
            return wrong
    outputs = {"ids": ids, "scales": weights}
    wanted = {"ids": result[ROUTING[0]], "scales": result[ROUTING[1]]}
    case = _routing_case(layer, given, router) if len(expected) == 2 else None
    if case is None:
        return _plain(outputs, wanted)
    if not routing_outside(case, outputs):
        tell("the router is right: a correct float32 evaluation may give these ids and weights")
        return ""
    if said := routing_finding(case, outputs, wanted).sentence:
        return said
    if "logits" in given:
        return _factor(outputs, wanted) or _plain(outputs, wanted)
    # As a router in float32 sums up, which changes small weights more than roundings do.
    rounded = {**case, "logits": given["hidden"].to(torch.float32) @ layer.router_weight.to(torch.float32).T}
    if said := _factor(outputs, wanted) or routing_finding(rounded, outputs, wanted).sentence:
        return said
    if _as_of_rounded_logits(outputs, wanted):
        tell(_OTHER_LOGITS)
    return _plain(outputs, wanted)


def from_local_ids(layer: CheckpointLayer, got: Tensor, want: Tensor) -> str:
    """How ids are a rank's own numbers of its experts, and one number for those of others, in words; "" if not."""
    if layer.expert_ids is None or layer.fused or got.shape != want.shape:
        return ""
    local = torch.full((layer.num_experts,), -1, dtype=torch.int64, device="cpu")
    local[list(layer.expert_ids)] = torch.arange(len(layer.expert_ids), device="cpu")
    mine = (want >= 0) & (local[want.long().clamp(min=0)] >= 0)
    others = set(got[~mine].tolist())
    if same(got, want) or not torch.equal(got[mine].long(), local[want[mine].long()]) or len(others) > 1:
        return ""
    of_others = f", {others.pop()} for those of other ranks" if others else ""
    first, last, count = layer.expert_ids[0], layer.expert_ids[-1], len(layer.expert_ids)
    return f"the rank's local ones: 0 to {count - 1} for its experts {first} to {last}{of_others}"


def no_experts(ids: Tensor | None, layer: CheckpointLayer) -> str:
    """Which id is no expert's, or which token names one twice, in words; "" if the kernel may be given them all."""
    if ids is None:
        return ""
    outside = (ids < PADDING_ID) | (ids >= layer.num_experts + layer.fused)
    if bool(outside.any()):
        token, slot = outside.nonzero()[0].tolist()
        return f"id {int(ids[token, slot])} at token {token}, slot {slot} is no expert's"
    ordered = ids.sort(1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
    token = int(twice.nonzero()[0]) if bool(twice.any()) else -1
    return f"token {token} names an expert twice: {ids[token].tolist()}" if token >= 0 else ""


def _factor(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str:
    """The factor between weights of equal ids, wherever roundings leave it clear, in words."""
    if not torch.equal(got["ids"], want["ids"]):
        return ""
    ratios = (got["scales"].to(torch.float64) / want["scales"].to(torch.float64))[want["scales"] != 0]
    factor = float(ratios.median()) if ratios.numel() else 1.0
    apart = (ratios / factor - 1).abs().max() if ratios.numel() else 0.0
    one = abs(factor - 1) < _CLEAR
    return "" if one or not apart < _CLEAR else f"ids are right; all weights are {factor:.4g}x the right ones"


_CLEAR = 2.0**-12
_OTHER_LOGITS = "if the server's logits are others, as bf16 ones are: put them into the input, as logits"
_OF_ROUNDED_LOGITS = 2.0**-4  # relative, that rounding logits to bf16 changes weights by, at most


def _plain(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str:
    """What differs, where nothing explains it."""
    if (off := (got["ids"] != want["ids"]).any(1)).any():
        return f"{int(off.sum())} of {counted(len(off), 'token')} have other ids"
    return "ids are right, and weights are others"


def _as_of_rounded_logits(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> bool:
    """Whether most tokens have their ids, and there weights that rounded logits may give."""
    alike = (got["ids"] == want["ids"]).all(1)
    apart = (got["scales"] - want["scales"])[alike].abs()
    near = bool((apart <= _OF_ROUNDED_LOGITS * want["scales"][alike].abs()).all())
    return near and 2 * int(alike.sum()) >= len(alike)


def _of_own_slots(layer: CheckpointLayer, ids: Tensor, got: Tensor, want: Tensor) -> tuple[str, str]:
    """Of right ids' weights, by the rank's own slots: why they are right, or what is wrong; "" if unknown."""
    if layer.expert_ids is None or layer.fused:
        return "", ""
    mine = torch.isin(ids.long(), torch.tensor(layer.expert_ids, device="cpu"))
    if not bool(mine.any()) or bool(mine.all()):
        return "", ""
    zero = not bool(got[~mine].any())
    if zero and int(ulp_distance(got[mine], want[mine]).max()) <= _ROUNDINGS:
        return "the router is right: weights of other ranks' slots are 0, which this rank does not read", ""
    exact = want.to(torch.float64)
    over_own = exact * exact.sum(1, keepdim=True) / (exact * mine).sum(1, keepdim=True)
    if not bool(near(got.to(torch.float64), over_own)[mine].all()):
        return "", ""
    others = "; those of other ranks' slots are 0" * zero
    return "", (
        "ids are right; weights are normalised over the slots of this rank's experts instead of all of a token's: "
        f"w / (sum of the rank's own w){others}"
    )


def _routing_case(
    layer: CheckpointLayer, given: Mapping[str, Tensor], router: RouterName | None
) -> dict[str, Any] | None:
    """The router's inputs as a golden case has them; None where no search knows such a router."""
    logits, _ = route_input(layer, given, None if ROUTING[0] in given else router)
    if logits is None or layer.fused or "image_mask" in given:
        return None
    preset = router_to_run(layer, router)
    if preset.normalize == "none":
        return None
    gate = gate_of(layer, router)
    tables = {} if gate.tid2eid is None else {"tid2eid": gate.tid2eid, "token_ids": given["token_ids"]}
    return {
        "preset": replace(preset, temperature=1.0),
        "logits": logits.to(torch.float32) / preset.temperature,
        "correction_bias": gate.correction_bias,
        "padded": given.get("padded"),
        **tables,
        **({} if "logits" in given else {"logit_errors": _logit_errors(layer, given["hidden"], logits)}),
    }


def _logit_errors(layer: CheckpointLayer, hidden: Tensor, logits: Tensor) -> Tensor:
    """How far logits that a server summed up in float32, in some order, may lie from these.

    sqrt(K) units of the sum of the products' magnitudes, which sums of random roundings stay below (Higham and Mary,
    2019); sums in blocks, as GPUs have them, are far within. Logits in bf16, as gpt-oss has them, are rounded then.
    """
    x, weights = hidden.to(torch.float64), layer.router_weight.to(torch.float64)
    errors: Tensor = x.abs() @ weights.abs().T * (hidden.shape[1] ** 0.5 * 2.0**-24)
    if logits.dtype != torch.bfloat16 or layer.router_bias is None:
        return errors
    exact = x @ weights.T + layer.router_bias.to(torch.float64)
    ends = [(exact + sign * errors).to(torch.bfloat16).to(torch.float64) for sign in (-1, 1)]
    return torch.maximum(*((end - logits.to(torch.float64)).abs() for end in ends))
