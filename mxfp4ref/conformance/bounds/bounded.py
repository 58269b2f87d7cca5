"""Mode "bounded": how much of an output no correct evaluation gives, for the kinds of cases that have bounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from mxfp4ref._choices import Storage
from mxfp4ref.conformance.bounds.call_bounds import bound, intermediates_within, specials_alone
from mxfp4ref.conformance.bounds.router_bounds import routing_outside
from mxfp4ref.conformance.isolation.handing import to_device
from mxfp4ref.goldens.runs import Run
from mxfp4ref.model.call import MoeCall

__all__ = ["all_within", "outside_bounds", "where_outside"]


def outside_bounds(
    kind: str, one: Run, outputs: Mapping[str, Tensor], storage: Storage, confidence: float | None
) -> tuple[int | None, Tensor | None]:
    """How many elements lie outside their bounds, None where the kind has none and stays exact; and which, of a call.

    Args:
        kind: of the case.
        one: its inputs and expected outputs.
        outputs: what the kernel gave.
        storage, confidence: as in `bounds.bound`, for kind "moe".
    """
    if kind == "routing":
        return routing_outside(one.inputs, outputs), None
    where = where_outside(one, outputs, storage, confidence)
    return (None if where is None else int(where.sum())), where


def where_outside(
    one: Run, outputs: Mapping[str, Tensor], storage: Storage = "wider", confidence: float | None = None
) -> Tensor | None:
    """Which elements of a call's output lie outside their bounds, `[M, H] bool`; None of what is no such call."""
    if not isinstance(one.inputs, MoeCall) or not one.inputs.experts.tactics_show:
        return None
    bounds = bound(one.inputs, storage=storage, confidence=confidence)
    return ~bounds.contains(outputs["output"], one.expected["output"])


def all_within(kind: str, runs: Iterable[tuple[Run, Mapping[str, Tensor]]]) -> bool | None:
    """Whether all outputs of a router, or of a call by whatever K tiles, lie within bounds, and intermediates too.

    None of all else, and where special values alone lie outside: how these are handled is no matter of the order.
    """
    if kind == "routing":
        return all(routing_outside(one.inputs, outputs) == 0 for one, outputs in runs)
    bounds, within = None, None
    for one, outputs in runs:
        call = one.inputs
        if not isinstance(call, MoeCall) or not call.experts.tactics_show:
            return None
        call, got = to_device(call, "cpu"), outputs["output"].cpu()
        bounds = bounds or bound(call)
        outside = ~bounds.contains(got, one.expected["output"].cpu())
        if bool(outside.any()):
            return None if specials_alone(call, got, outside) else False
        returned = {name: tensor.cpu() for name, tensor in outputs.items() if name != "output"}
        if not intermediates_within(call, returned):
            return False
        within = True
    return within
