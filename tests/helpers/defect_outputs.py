"""What defects and the right pipelines give on the calls of `defect_calls`, each computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mxfp4ref.defects import DEFECTS, dequantize_call, route
from mxfp4ref.model.call import MoeCall
from mxfp4ref.model.forward import forward
from mxfp4ref.sm90.tactics import TILE_K, Sm90Kernel
from tests.helpers import defect_calls

BUILDERS: dict[str, dict[str, Callable[[], Any]]] = {
    "moe": defect_calls.MOE_CALLS,
    "routing": defect_calls.ROUTING_CALLS,
    "dequantize": defect_calls.DEQUANTIZE_CALLS,
    "w4a8": defect_calls.W4A8_CALLS,
}
REFERENCES: dict[str, Callable[[Any], Any]] = {
    "moe": forward,
    "routing": route,
    "dequantize": dequantize_call,
    "w4a8": forward,
}


@cache
def build(target: str, call_name: str) -> Any:
    return BUILDERS[target][call_name]()


def as_bytes(output: Any) -> bytes:
    """The bits of an output: of a Routing those that reach the kernel."""
    tensors = [output] if isinstance(output, Tensor) else [output.ids, output.scales]
    return b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)


@cache
def reference_bytes(target: str, call_name: str) -> bytes:
    return as_bytes(REFERENCES[target](build(target, call_name)))


@cache
def legitimate_bytes(target: str, call_name: str) -> set[bytes]:
    """The outputs of every tactic: K tiles that divide K, and their group orders."""
    if target != "moe":
        return {reference_bytes(target, call_name)}
    call: MoeCall = build(target, call_name)
    depths = call.experts.hidden_size, call.experts.intermediate_size
    fitting = ([tile for tile in TILE_K if depth % tile == 0] for depth in depths)
    return {as_bytes(forward(replace(call, kernel=Sm90Kernel.of_tiles(pair)))) for pair in product(*fitting)}


@cache
def defect_bytes(name: str, call_name: str) -> bytes:
    """What a defect gives on a call; where it says that it cannot show, what the kernel gives."""
    defect = DEFECTS[name]
    call = build(defect.target, call_name)
    return as_bytes(defect.run(call)) if defect.applies(call) else reference_bytes(defect.target, call_name)


def differs(name: str, call_name: str) -> bool:
    """Whether no tactic of the kernel gives what the defect gives."""
    return defect_bytes(name, call_name) not in legitimate_bytes(DEFECTS[name].target, call_name)
