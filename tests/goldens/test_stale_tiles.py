"""A tile that still holds another expert's numbers shows in several cases of the GEMM suite, whichever expert's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxfp4ref import MoeCall, forward
from mxfp4ref.conformance import differing
from mxfp4ref.goldens import open_goldens

GOLDENS = open_goldens()
CALLS = {
    case.id: case.call()
    for case in (GOLDENS.load(name) for name in GOLDENS.names("gemm"))
    if case.kind == "moe"
}


def before_by_number(call: MoeCall) -> Tensor:
    return torch.arange(call.experts.num_experts) - 1


def before_of_those_used(call: MoeCall) -> Tensor:
    used = call.token_selected_experts.unique()
    used = used[used >= 0].tolist()
    source = torch.arange(call.experts.num_experts)
    for one, other in zip(used[1:], used, strict=False):
        source[one] = other
    return source


def the_last(call: MoeCall) -> Tensor:
    source = torch.arange(call.experts.num_experts)
    source[1:-1] = len(source) - 1
    return source


@pytest.mark.parametrize("source", [before_by_number, before_of_those_used, the_last])
@pytest.mark.parametrize("gemm", ["fc1", "fc2"])
@pytest.mark.parametrize(
    "tile", [(slice(64), slice(None)), (slice(None), slice(-2, None))], ids=["rows", "K"]
)
def test_a_stale_tile_shows_in_three_cases_of_the_suite(
    source: Callable[[MoeCall], Tensor], gemm: str, tile: tuple[slice, slice]
) -> None:
    def shows(call: MoeCall) -> bool:
        rows, groups = tile
        first = None if groups.start is None else groups.start * 16
        parts = {f"{gemm}_weights": (rows, slice(first, None)), f"{gemm}_scales": tile}
        changed = {}
        for name, part in parts.items():
            tensor = getattr(call.experts, name)
            changed[name] = tensor.clone()
            changed[name][:, *part] = tensor[source(call)][:, *part]
        wrong = forward(replace(call, experts=replace(call.experts, **changed)))
        return bool(differing(wrong, forward(call)).any())

    several = [name for name, call in CALLS.items() if call.experts.num_experts > 2]
    assert len([name for name in several if shows(CALLS[name])]) >= 3
